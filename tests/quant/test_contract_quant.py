"""The laws that every compressing Method obeys, alone and under every method of the library."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LAYERS, MODELS, make_model
from test_contract import METHODS, calibration, close, inputs_of, loss_of, moved, weights_of, why_not_merge

import jpeft
from jpeft.core.weight import Weight
from jpeft.quant import quantizers
from jpeft.quant.packed import Packed
from jpeft.train import adapter

KEY = jax.random.key(1)
EVERYTHING = {"plain": ["all-linear", "embedding", "conv", "experts"]}
QUANTIZERS = {name: cls(**cls.SMALL) for name, cls in quantizers().items()}
QUANTIZERS["NF4 with plain scales"] = jpeft.NF4(**jpeft.NF4.SMALL, double_quant=False)


def made(name, kind):
    """The quantizer of a name, for all kinds of sites that a model has."""
    targets = EVERYTHING.get(kind, ["all-linear", "embedding"])
    cls, fields = type(QUANTIZERS[name]), vars(QUANTIZERS[name])
    return cls(**{**fields, "targets": targets})


EVERY = [pytest.param(kind, name, id=f"{name}-{kind}") for name in QUANTIZERS for kind in MODELS]
law = pytest.mark.parametrize(("kind", "name"), EVERY)


@functools.cache
def start(kind, name):
    model, method = make_model(kind), made(name, kind)
    return model, method, *jax.jit(lambda key, params: method.init(key, params, model.sites))(KEY, model.params)


@law
def test_the_lifted_function_equals_the_function_of_the_merged_tree(kind, name):
    model, method, trainable, frozen = start(kind, name)

    @jax.jit
    def run(frozen):
        bound = method.bind(trainable, frozen)
        return jpeft.lift(model.apply)(bound, *model.inputs), model.apply(jpeft.merge(bound), *model.inputs)

    lifted, merged = run(frozen)
    close(lifted, merged)
    pretrained = model.apply(model.params, *model.inputs)
    assert np.allclose(merged, pretrained, atol=1e-5) == method.NO_OP_AT_START


@law
def test_nothing_trains_and_every_array_is_there_once(kind, name):
    model, method, trainable, frozen = start(kind, name)
    assert jax.tree.leaves(trainable) == []
    bound = method.bind(trainable, frozen)
    assert {id(x) for x in jax.tree.leaves(bound)} == {id(x) for x in jax.tree.leaves(frozen)}
    assert jpeft.count(bound).trainable == 0 and not any(jax.tree.leaves(jpeft.trainable_mask(bound)))
    assert bits(frozen) < bits(model.params)
    shapes = jax.eval_shape(lambda key, params: method.init(key, params, model.sites), KEY, model.params)
    describe = lambda tree: (jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)])
    assert describe(shapes) == describe((trainable, frozen))


@law
def test_merging_gives_full_precision_and_compressing_again_changes_little(kind, name):
    model, method, trainable, frozen = start(kind, name)
    merged = jpeft.merge(method.bind(trainable, frozen))
    describe = lambda x: (x.shape, x.dtype, x.sharding, x.weak_type)
    assert jax.tree.map(describe, merged) == jax.tree.map(describe, model.params)
    targets = method.chosen(model.sites)
    error, again = [], jpeft.merge(method.bind(*method.init(KEY, merged, model.sites)))
    for (path, w), m, a in zip(flat(model.params), jax.tree.leaves(merged), jax.tree.leaves(again), strict=True):
        if path not in targets:
            assert np.array_equal(w, m)
            continue
        error.append(relative(m, w))
        assert relative(a, m) < error[-1] / 4
    assert 0 < max(error) < 0.2


@pytest.mark.parametrize("name", QUANTIZERS)
def test_transforms_commute_with_the_compressed_step(name):
    model = make_model("linen-scanned")
    both = jpeft.chain(QUANTIZERS[name], jpeft.LoRA(rank=2))
    trainable, frozen = both.init(KEY, model.params, model.sites)
    loss = loss_of(model, both)
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), moved(trainable), moved(trainable, 0.2))
    each = [jax.jit(jax.value_and_grad(loss))(jax.tree.map(lambda x, n=n: x[n], two), frozen) for n in range(2)]

    @jax.jit
    def transforms(two, frozen):
        mapped = jax.vmap(jax.value_and_grad(loss), (0, None))(two, frozen)
        step = lambda carry, t: (carry, jax.checkpoint(jax.value_and_grad(loss))(t, frozen))
        return mapped, jax.lax.scan(step, None, two)[1]

    for got in transforms(two, frozen):
        for n in range(2):
            close(jax.tree.map(lambda x, n=n: x[n], got), each[n])


def without_codes(bound):
    """The tree whose compressed weights are arrays, in the Weights that hold them too."""

    def decoded(leaf):
        if isinstance(leaf, Packed):
            return leaf.dense()
        return leaf.replace(base=decoded(leaf.base)) if isinstance(leaf, Weight) else leaf

    return jax.tree.map(decoded, bound, is_leaf=lambda x: isinstance(x, Weight))


@pytest.mark.parametrize("kind", ["linen-scanned", "plain"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_works_on_compressed_weights_or_says_why_not(kind, method):
    model, both = make_model(kind), jpeft.chain(QUANTIZERS["NF4"], method)
    try:
        trainable, frozen = both.init(KEY, model.params, model.sites, (None, calibration(kind, method)))
    except ValueError as refusal:
        assert "chain" in str(refusal)
        return
    assert len(trainable) == 2 and jax.tree.leaves(trainable[0]) == []
    trainable = moved(trainable)
    lifted_fn, inputs = jpeft.lift(model.apply), inputs_of(model, both)
    through_merge = lambda bound, *inputs: model.apply(jpeft.merge(bound), *inputs)
    decoded = lambda bound, *inputs: lifted_fn(without_codes(bound), *inputs)
    oracle = decoded if why_not_merge(both.bind(trainable, frozen)) else through_merge

    @jax.jit
    def run(trainable, frozen):
        bound = both.bind(trainable, frozen)
        return (
            (lifted_fn(bound, *inputs), jax.grad(loss_of(model, both))(trainable, frozen)),
            (oracle(bound, *inputs), jax.grad(loss_of(model, both, oracle))(trainable, frozen)),
        )

    lifted, merged = run(trainable, frozen)
    close(lifted, merged, 5e-5)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(lifted[1]))
    arrays = jax.tree.leaves((trainable, frozen))
    assert len({id(x) for x in arrays}) == len(arrays)
    assert any(x.dtype == jnp.uint4 for x in arrays)
    shapes = {w.shape for w in weights_of(both.bind(trainable, frozen)) if w.ndim > 1}
    kept = [x for x in jax.tree.leaves(frozen[1:]) if jnp.issubdtype(x.dtype, jnp.floating) and x.shape in shapes]
    assert not kept or method.ADDS_FROZEN, "a dense copy stands beside the codes"


def test_a_compiled_step_keeps_no_dense_weights():
    model = make_model("linen-scanned")
    both = jpeft.chain(QUANTIZERS["NF4"], jpeft.LoRA(rank=2))
    trainable, frozen = both.init(KEY, model.params, model.sites)
    text = jax.jit(jax.value_and_grad(loss_of(model, both))).lower(trainable, frozen).compile().as_text()
    packed = [w.base.shape for w in weights_of(frozen[0])]
    assert len(packed) == 6 and all(shape[0] == LAYERS for shape in packed)
    for shape in packed:
        assert not re.search(rf"(f32|bf16)\[{','.join(map(str, shape))}\]", text), shape


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_adapter_on_compressed_weights_is_saved_and_loaded(name, tmp_path):
    model, both = make_model("plain"), jpeft.chain(QUANTIZERS[name], jpeft.LoRA(rank=2))
    trainable, frozen = both.init(jax.random.key(7), model.params, model.sites)
    trainable, mark = moved(trainable), adapter.fingerprint(model.params)
    adapter.save_adapter(tmp_path, both, trainable, frozen, base="here", base_fingerprint=mark, seed=7)
    loaded = adapter.load_adapter(tmp_path, model.params, model.sites, {**jpeft.methods(), **quantizers()})
    assert loaded[0] == both and jax.tree.structure(loaded[1:]) == jax.tree.structure((trainable, frozen))
    assert all(map(np.array_equal, jax.tree.leaves(loaded[1:]), jax.tree.leaves((trainable, frozen))))


def flat(tree):
    from jpeft.core.tree import leaves_with_paths

    return leaves_with_paths(tree)


def bits(tree):
    return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)
