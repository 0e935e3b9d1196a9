"""init and bind, chains, merging, masks and counts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import make_model

import jpeft
from jpeft.core.weight import Unfrozen, Weight

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": np.full((6, 8), 0.1, np.float32), "bias": np.zeros(8, np.float32)},
    "norm": {"scale": np.ones(8, np.float32)},
    "down": {"kernel": np.full((8, 6), 0.1, np.float32)},
}
X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)


def fn(p, x):
    return (jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) * p["norm"]["scale"]) @ p["down"]["kernel"]


SITES = jpeft.find_sites(fn, PARAMS, X)


def halves(method, params=PARAMS):
    return jax.jit(lambda key, p: method.init(key, p, SITES))(KEY, params)


def filled(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype), tree)


def equals_merged(method, trainable, frozen):
    @jax.jit
    def run(trainable, frozen):
        bound = method.bind(trainable, frozen)
        return jpeft.lift(fn)(bound, X), fn(jpeft.merge(bound), X)

    lifted, merged = run(trainable, frozen)
    np.testing.assert_allclose(lifted, merged, atol=1e-5)
    return merged


# ---- init ----


def test_modules_to_save_train_in_full_beside_the_method():
    method = jpeft.LoRA(rank=2, targets="up", modules_to_save=["norm", "down"])
    trainable, frozen = halves(method)
    assert trainable["norm"]["scale"].base.shape == (8,) and frozen["norm"]["scale"].base is None
    assert jpeft.count(method.bind(trainable, frozen)).trainable == 2 * (6 + 8) + 8 + 48
    trainable = filled(trainable)
    equals_merged(method, trainable, frozen)
    merged = jpeft.merge(method.bind(trainable, frozen))["down"]["kernel"]
    np.testing.assert_array_equal(merged, trainable["down"]["kernel"].base)
    with pytest.raises(ValueError, match="'nrom' matches no site"):
        halves(jpeft.LoRA(rank=2, modules_to_save=["nrom"]))


def test_a_target_matched_only_in_part_is_refused_with_everything_that_is_wrong():
    with pytest.raises(ValueError) as error:
        halves(jpeft.LoRA(rank=2, targets=["up", "dwon", "nrom"]))
    assert "'dwon'" in str(error.value) and "'down'" in str(error.value) and "'nrom'" in str(error.value)


def test_all_sites_with_too_high_a_rank_are_told_together():
    with pytest.raises(ValueError, match=r"LoRA cannot adapt\nup/kernel: rank 7 .*\ndown/kernel: rank 7") as error:
        halves(jpeft.LoRA(rank=7))
    assert "min(6, 8)" in str(error.value)
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more"):
        model = make_model("linen-unrolled")
        jpeft.LoRA(rank=99).init(KEY, model.params, model.sites)


def test_sites_of_another_tree_are_refused():
    other = {"up": {"kernel": np.zeros((6, 9)), "bias": np.zeros(8)}, "norm": PARAMS["norm"]}
    with pytest.raises(ValueError, match="of another tree; call find_sites on this one") as error:
        jpeft.LoRA(rank=2).init(KEY, other, SITES)
    assert "up/kernel: the sites say (6, 8), the tree has (6, 9)" in str(error.value)
    assert "down/kernel: the sites say (8, 6), the tree has no such leaf" in str(error.value)


def test_a_method_without_wrap_says_so():
    class Bare(jpeft.Method):
        pass

    with pytest.raises(TypeError, match="Bare defines no wrap"):
        Bare().init(KEY, PARAMS, SITES)
    assert Bare().optimizer("tx") == "tx" and Bare().penalty({}) == 0.0


# ---- chains ----


def test_a_chain_of_three():
    inner, last = jpeft.chain(jpeft.LoRA(rank=2), jpeft.LoRA(rank=3, targets="up")), jpeft.LoRA(rank=1)
    method = jpeft.chain(inner, last)
    assert len(method.methods) == 3 and method == jpeft.chain(*inner.methods, last)
    trainable, frozen = halves(method)
    assert len(trainable) == 3
    arrays = jax.tree.leaves((trainable, frozen))
    assert len(arrays) == 4 + 5 * 2, "the four of the model once, and two factors for each adapted site"
    trainable = filled(trainable)
    merged = equals_merged(method, trainable, frozen)
    update = sum(np.asarray(t["up"]["kernel"].a @ t["up"]["kernel"].b) * s for t, s in zip(trainable, (4, 8 / 3, 8)))  # noqa: B905
    bound = method.bind(trainable, frozen)
    np.testing.assert_allclose(jpeft.merge(bound)["up"]["kernel"], PARAMS["up"]["kernel"] + update, atol=1e-5)
    grads = jax.grad(lambda t: jpeft.lift(fn)(method.bind(t, frozen), X).sum())(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable) and merged.shape == (3, 6)
    assert sum(jax.tree.leaves(jpeft.trainable_mask(bound))) == 10


def test_a_chain_with_leaves_that_train_in_full():
    first = jpeft.LoRA(rank=2, targets="up", modules_to_save=["down", "norm"])
    method = jpeft.chain(first, jpeft.LoRA(rank=2, targets="down"))
    trainable, frozen = halves(method)
    equals_merged(method, filled(trainable), frozen)
    assert jpeft.count(method.bind(trainable, frozen)).trainable == 2 * 14 + 48 + 8 + 2 * 14

    later = jpeft.chain(jpeft.LoRA(rank=2, targets="up"), jpeft.LoRA(rank=2, targets="down", modules_to_save=["norm"]))
    trainable, frozen = halves(later)
    assert len(jax.tree.leaves((trainable, frozen))) == 4 + 4
    assert trainable[1]["norm"]["scale"].base.shape == (8,)
    equals_merged(later, filled(trainable), frozen)


def test_a_chain_of_one_is_the_method_and_of_none_an_error():
    assert jpeft.chain(jpeft.LoRA()) == jpeft.LoRA()
    with pytest.raises(ValueError, match="at least one method"):
        jpeft.chain()


@dataclasses.dataclass(frozen=True)
class Planned(jpeft.LoRA):
    """A LoRA that wants to know the steps, and keeps half of its rank."""

    steps: int = 0

    def for_steps(self, steps):
        return dataclasses.replace(self, steps=steps)

    def after_training(self, trainable, frozen):
        half = self.rank // 2
        mine = lambda w: isinstance(w, Weight) and w.a is not None
        cut = lambda w: w.replace(a=w.a[..., :half], b=w.b[..., :half, :]) if mine(w) else w
        kept = jax.tree.map(cut, trainable, is_leaf=lambda x: isinstance(x, Weight))
        return dataclasses.replace(self, rank=half, alpha=self.alpha / 2), kept, frozen


def test_a_method_plans_its_steps_and_says_what_to_keep_of_it_alone_and_in_a_chain():
    assert jpeft.LoRA().for_steps(7) == jpeft.LoRA()
    both = jpeft.chain(jpeft.LoRA(rank=2, targets="up"), Planned(rank=4, targets="down")).for_steps(7)
    assert [getattr(m, "steps", None) for m in both.methods] == [None, 7]
    trainable, frozen = halves(both)
    method, kept, frozen = both.after_training(filled(trainable), frozen)
    assert [m.rank for m in method.methods] == [2, 2]
    assert kept[1]["down"]["kernel"].a.shape == (8, 2) and kept[0]["up"]["kernel"].a.shape == (6, 2)
    equals_merged(method, kept, frozen)


def test_dropout_in_a_chain_is_switched_on_by_the_key():
    method = jpeft.chain(jpeft.LoRA(rank=2, dropout=0.5), jpeft.LoRA(rank=2, dropout=0.5))
    trainable, frozen = halves(method)
    trainable = filled(trainable)
    run = lambda key: jpeft.lift(fn)(method.bind(trainable, frozen, key), X)
    assert np.allclose(run(KEY), run(KEY)) and not np.allclose(run(KEY), run(None))


# ---- merge ----


def test_merging_keeps_the_shardings():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P(*([None, "y"][: x.ndim]))))
    params = jax.tree.map(put, PARAMS)
    method = jpeft.chain(jpeft.LoRA(rank=2), jpeft.LoRA(rank=2, targets="up"))
    trainable, frozen = method.init(KEY, params, SITES)
    merged = jpeft.merge(method.bind(trainable, frozen))
    assert jax.tree.map(lambda x: x.sharding, merged) == jax.tree.map(lambda x: x.sharding, params)
    np.testing.assert_allclose(merged["up"]["kernel"], PARAMS["up"]["kernel"])


def test_what_cannot_be_merged_says_why():
    class Stuck(Unfrozen):
        def why_not_merge(self):
            return "it depends on the input"

    with pytest.raises(ValueError, match="a/w: it depends on the input"):
        jpeft.merge({"a": {"w": Stuck(np.ones(2))}, "v": np.ones(2)})
    assert Unfrozen(Stuck(np.ones(2))).why_not_merge() == "it depends on the input"
    assert Weight.why_not_merge(Unfrozen(np.ones(2))) is None


# ---- masks for optax ----


@pytest.mark.parametrize("way", ["masked", "multi_transform"])
def test_masks_and_labels_train_the_trainable_leaves_alone(way):
    method = jpeft.LoRA(rank=2, targets="up", modules_to_save=["norm"])
    trainable, frozen = halves(method)
    bound = method.bind(filled(trainable), frozen)
    mask = jpeft.trainable_mask(bound)
    assert jax.tree.structure(jpeft.labels(bound)) == jax.tree.structure(bound) == jax.tree.structure(mask)
    if way == "masked":  # masked passes what it does not transform: the frozen leaves' gradients must be put to zero
        others = jax.tree.map(lambda m: not m, mask)
        tx = optax.chain(optax.masked(optax.adam(0.1), mask), optax.masked(optax.set_to_zero(), others))
    else:
        tx = optax.multi_transform({"trainable": optax.adam(0.1), "frozen": optax.set_to_zero()}, jpeft.labels(bound))

    @jax.jit
    def step(bound, state):
        grads = jax.grad(lambda b: jnp.sum(jpeft.lift(fn)(b, X) ** 2))(bound)
        updates, state = tx.update(grads, state, bound)
        return optax.apply_updates(bound, updates), state

    new, state = step(bound, tx.init(bound))
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), bound, new)
    assert jax.tree.leaves(same) == [not train for train in jax.tree.leaves(mask)]
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * jpeft.count(bound).trainable, "no moments for what is frozen"


# ---- counts ----


def test_the_count_is_a_table():
    method = jpeft.LoRA(rank=2, targets="up")
    bound = method.bind(*halves(method))
    count = jpeft.count(bound)
    assert (count.trainable, count.total) == (28, 48 + 8 + 8 + 48 + 28)
    assert count.fraction == pytest.approx(28 / 140)
    lines = str(count).splitlines()
    assert lines[0].split() == ["parameters", "trainable", "total", "%"]
    row = next(line for line in lines if line.startswith("up/kernel"))
    assert row.split() == ["up/kernel", "28", "76", "36.8421"]
    assert re.fullmatch(r"all +28 +140 +20\.0000", lines[-1])
    assert jpeft.count(jax.eval_shape(lambda: bound)) == count
    assert jpeft.count({}).fraction == 0.0
