"""Paths, and splitting a tree in two halves that join again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft.core.tree import key_for_path, leaves_with_paths, map_with_paths
from jpeft.core.weight import Unfrozen

TREES = st.recursive(
    st.integers(0, 9).map(np.asarray) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(TREES, st.randoms(use_true_random=False))
def test_combine_is_the_inverse_of_partition(tree, random):
    leaves, structure = jax.tree.flatten(tree)
    mask = jax.tree.unflatten(structure, [random.random() < 0.5 for _ in leaves])
    true, false = jpeft.partition(tree, mask)
    assert len(jax.tree.leaves(true)) + len(jax.tree.leaves(false)) == len(leaves)
    for joined in (jpeft.combine(true, false), jpeft.combine(false, true)):
        assert jax.tree.structure(joined) == structure
        assert all(a is b for a, b in zip(jax.tree.leaves(joined), leaves, strict=True))


def test_halves_that_do_not_fit_are_refused():
    one = np.ones(2)
    with pytest.raises(ValueError, match="both hold 'a/b'"):
        jpeft.combine({"a": {"b": one}}, {"a": {"b": one}})
    with pytest.raises(ValueError):
        jpeft.combine({"a": one}, {"b": one})


def test_paths_count_a_weight_as_one_leaf():
    tree = {"layers": [{"kernel": np.ones((2, 3))}, {"kernel": Unfrozen(np.ones((2, 3)))}], "x": (np.ones(1),)}
    assert [path for path, _ in leaves_with_paths(tree)] == ["layers/0/kernel", "layers/1/kernel", "x/0"]
    shapes = map_with_paths(lambda path, leaf: (path, leaf.shape), tree)
    assert shapes["layers"][1]["kernel"] == ("layers/1/kernel", (2, 3))
    from flax import nnx

    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert {path.split("/")[0] for path, _ in leaves_with_paths(state)} == {"kernel", "bias"}


def test_every_path_has_a_key_of_its_own():
    key = jax.random.key(0)
    keys = {path: jax.random.key_data(key_for_path(key, path)).tobytes() for path in ("a", "b", "a/b", "b/a", "")}
    assert len(set(keys.values())) == len(keys)
    assert jnp.array_equal(jax.random.key_data(key_for_path(key, "a")), jax.random.key_data(key_for_path(key, "a")))
