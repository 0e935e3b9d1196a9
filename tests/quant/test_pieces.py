"""Stacks whose layers are not alike: cut along the layers by whatever takes them, refused where none can tell which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jpeft
from jpeft.interop import bitsandbytes
from jpeft.quant.pieces import Pieces, stacked

KERNELS = jax.random.normal(jax.random.key(0), (5, 64, 64)) / 8
PACKED = [bitsandbytes.quantize(kernel, double_quant=True) for kernel in KERNELS]
LEAF = stacked([PACKED[0], KERNELS[1], PACKED[2], PACKED[3], KERNELS[4]], "io")
TREE, X = {"w": LEAF}, jax.random.normal(jax.random.key(1), (2, 64))


def unrolled(p, x):
    for n in range(5):
        x = jnp.tanh(x @ p["w"][n])
    return x


def parts(p, x):
    """Slices within a piece, across pieces, and with a step."""
    for w in (*p["w"][2:4], *p["w"][1:4], *p["w"][::2]):
        x = jnp.tanh(x @ w)
    return x


def columns(p, x):
    return lax.scan(lambda x, w: (x + jnp.pad(x @ w[:, 3:40], ((0, 0), (0, 27))), None), x, p["w"])[0]


def test_layers_alike_are_one_weight_and_others_are_pieces():
    assert type(stacked(PACKED, "io")) is type(PACKED[0]) and isinstance(stacked(list(KERNELS), "io"), jax.Array)
    assert LEAF.shape == (5, 64, 64) and LEAF.labels == "sio" and LEAF.cuts() == (1, 2, 4)
    assert [piece.shape[0] for piece in LEAF.base] == [1, 1, 2, 1]
    dense = jnp.stack(
        [
            w if isinstance(w, jax.Array) else w.dense()
            for w in (PACKED[0], KERNELS[1], PACKED[2], PACKED[3], KERNELS[4])
        ]
    )
    np.testing.assert_array_equal(LEAF.dense(), dense)


@pytest.mark.parametrize("fn", [unrolled, parts, columns])
def test_its_layers_are_taken_as_a_dense_stacks_are(fn):
    np.testing.assert_allclose(jax.jit(jpeft.lift(fn))(TREE, X), fn(jpeft.merge(TREE), X), atol=1e-5)


def test_a_cut_that_a_piece_cannot_take_is_refused():
    fn = lambda p, x: lax.scan(lambda x, w: (x + x[:, :5] @ w, None), x, p["w"][:, :5])[0]
    with pytest.raises(jpeft.DensifyError, match="'w' holds a Pieces"):
        jpeft.lift(fn)(TREE, X)


def test_a_layer_that_is_known_only_when_it_runs_is_refused():
    fn = lambda p, x, n: x @ lax.dynamic_index_in_dim(p["w"], n, keepdims=False)
    with pytest.raises(jpeft.DensifyError, match="'w' holds a Pieces"):
        jax.jit(jpeft.lift(fn))(TREE, X, 3)
    lifted = jax.jit(jpeft.lift(fn, densify="w"))(TREE, X, 3)
    np.testing.assert_allclose(lifted, X @ LEAF.dense()[3], atol=1e-5)


def test_a_method_that_changes_the_base_changes_every_piece():
    moved = LEAF.standing_for(LEAF.dense() * 2)
    assert isinstance(moved, Pieces) and jax.tree.structure(moved) == jax.tree.structure(LEAF)
    np.testing.assert_allclose(moved.dense(), LEAF.dense() * 2, atol=0.02)
    np.testing.assert_array_equal(moved.dense()[1], KERNELS[1] * 2)
