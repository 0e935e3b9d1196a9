"""The laws that every method obeys, on every kind of model. Methods are found, not named."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import MODELS, make_model

import jpeft
from jpeft.core.tree import path_string
from jpeft.core.weight import Weight
from jpeft.train import adapter

METHODS = {name: cls(**cls.SMALL) for name, cls in jpeft.methods().items()}
EVERY = [pytest.param(kind, method, id=f"{name}-{kind}") for name, method in METHODS.items() for kind in MODELS]
law = pytest.mark.parametrize(("kind", "method"), EVERY)
# Laws that compile a step of their own are held on fewer models: a scanned one, NNX, and the plain one that has it all.
on = lambda *kinds: pytest.mark.parametrize(("kind", "method"), [case for case in EVERY if case.values[0] in kinds])
KEY = jax.random.key(1)


def _exports_another(method):
    return type(method).exported is not jpeft.Method.exported


@functools.cache
def calibration(kind, method):
    """What the method learns from the model's own inputs; None for the methods that ask for nothing."""
    model = make_model(kind)
    loss = lambda params, *inputs: jnp.mean(jnp.sin(model.apply(params, *inputs)))
    made = jpeft.calibrate(model.apply, model.params, model.sites, [model.inputs], method=method, loss=loss)
    return made or None


@functools.cache
def start(kind, method):
    """The model and the two halves; initialised once a session, under `jit`."""
    model, given = make_model(kind), calibration(kind, method)
    init = jax.jit(lambda key, params: method.init(key, params, model.sites, given))
    return model, *init(KEY, model.params)


def distinct(tree):
    """The arrays of a tree, one that stands in several places once."""
    return list({id(x): x for x in jax.tree.leaves(tree)}.values())


def moved(trainable, size=0.1):
    """Trainables away from their start, so that no zero hides a mistake."""
    leaves, structure = jax.tree.flatten(trainable)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype) for x in leaves])


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance, rtol=0)


def weights_of(bound):
    leaves = jax.tree.leaves(bound, is_leaf=lambda x: isinstance(x, Weight))
    return [w for w in leaves if isinstance(w, Weight)]


def shares_trainables(bound):
    return any(set(w.tied()) & w.trainable_fields() for w in weights_of(bound))


def inputs_of(model, method):
    """The model's inputs as the method needs them: with its virtual tokens, all prompts of a multi-task one used."""
    tasks = jnp.arange(len(model.inputs[0])) % method.num_prompts
    batch = {"tokens": model.inputs[0]} | ({"tasks": tasks} if method.num_prompts > 1 else {})
    return (jpeft.prompted(batch, method)["tokens"], *model.inputs[1:])


def loss_of(model, method, apply=None):
    inputs = inputs_of(model, method)

    def loss(trainable, frozen):
        out = (apply or jpeft.lift(model.apply))(method.bind(trainable, frozen), *inputs)
        return jnp.mean(jnp.sin(out))

    return loss


def why_not_merge(bound):
    """The reasons of the Weights that have no dense form; empty where all have one."""
    return [w.why_not_merge() for w in weights_of(bound) if w.why_not_merge()]


@functools.cache
def evidence(kind, method):
    """Everything that the numerical laws compare, from one compilation."""
    model, trainable, frozen = start(kind, method)
    inputs = inputs_of(model, method)
    merges = not why_not_merge(method.bind(trainable, frozen))
    through_merge = lambda bound, *inputs: model.apply(jpeft.merge(bound), *inputs)
    loss = loss_of(model, method)

    @jax.jit
    def run(trainable, other, frozen, params):
        bound = method.bind(other, frozen)
        found = {
            "pretrained": model.apply(params, *model.inputs),
            "start": jpeft.lift(model.apply)(method.bind(trainable, frozen), *inputs),
            "lifted": jpeft.lift(model.apply)(bound, *inputs),
            "gradients": jax.grad(loss)(other, frozen),
        }
        if merges:
            found["through merge"] = through_merge(bound, *inputs)
            found["gradients through merge"] = jax.grad(loss_of(model, method, through_merge))(other, frozen)
        else:
            direction = moved(jax.tree.map(jnp.zeros_like, other), 1.0)
            along = lambda size: loss(jax.tree.map(lambda x, d: x + size * d, other, direction), frozen)
            found["slope"] = (along(1e-3) - along(-1e-3)) / 2e-3
            products = jax.tree.map(lambda g, d: jnp.sum(g * d), found["gradients"], direction)
            found["slope by gradients"] = sum(jax.tree.leaves(products))
        return found

    return run(trainable, moved(trainable), frozen, model.params)


@law
def test_it_starts_at_the_pretrained_function(kind, method):
    found = evidence(kind, method)
    at_start = found["start"].shape == found["pretrained"].shape
    at_start = at_start and np.allclose(found["start"], found["pretrained"], atol=1e-5)
    assert at_start == method.NO_OP_AT_START


@law
def test_the_lifted_function_equals_the_function_of_the_merged_tree(kind, method):
    found = evidence(kind, method)
    if "through merge" in found:
        close(found["lifted"], found["through merge"])
    last = found["lifted"][:, -1], found["pretrained"][:, -1]  # a prompt makes rows longer, in front
    assert not np.allclose(*last, atol=1e-3)


@law
def test_merging_gives_back_structure_shapes_dtypes_and_shardings(kind, method):
    model, trainable, frozen = start(kind, method)
    bound = method.bind(trainable, frozen)
    if reasons := why_not_merge(bound):
        with pytest.raises(ValueError, match=re.escape(reasons[0])):
            jpeft.merge(bound)
        return
    merged = jpeft.merge(bound)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    describe = lambda x: (x.shape, x.dtype, x.sharding, x.weak_type)
    assert jax.tree.map(describe, merged) == jax.tree.map(describe, model.params)


@law
def test_every_base_array_is_in_exactly_one_half(kind, method):
    model, trainable, frozen = start(kind, method)
    halves = jax.tree.leaves(trainable) + jax.tree.leaves(frozen)
    assert len({id(x) for x in halves}) == len(halves)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert size(frozen) <= size(model.params) or method.ADDS_FROZEN.strip()
    bound = method.bind(trainable, frozen)
    assert len(distinct(bound)) == len(halves)
    if shares_trainables(bound):
        with pytest.raises(ValueError, match="share what they train"):
            jpeft.labels(bound)
    else:
        mask = jpeft.trainable_mask(bound)
        assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(trainable))
        assert jax.tree.structure(mask) == jax.tree.structure(bound) == jax.tree.structure(jpeft.labels(bound))
    assert jpeft.count(bound).trainable == sum(x.size for x in jax.tree.leaves(trainable))


@law
def test_gradients_are_those_through_the_merged_weights(kind, method):
    _, trainable, _ = start(kind, method)
    found = evidence(kind, method)
    assert jax.tree.structure(found["gradients"]) == jax.tree.structure(trainable)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(found["gradients"]))
    if "through merge" in found:
        close(found["gradients"], found["gradients through merge"])
    else:
        np.testing.assert_allclose(found["slope by gradients"], found["slope"], rtol=2e-2, atol=2e-4)


@on("linen-scanned", "nnx", "plain")
def test_transforms_commute_with_init_and_bind(kind, method):
    model, trainable, frozen = start(kind, method)
    loss = loss_of(model, method)
    given = calibration(kind, method)
    shapes = jax.eval_shape(lambda key, params: method.init(key, params, model.sites, given), KEY, model.params)
    describe = lambda tree: (jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)])
    assert describe(shapes) == describe((trainable, frozen))
    close(method.init(KEY, model.params, model.sites, given), (trainable, frozen), 1e-6)
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), trainable, moved(trainable))

    @functools.partial(jax.jit, donate_argnums=0)
    def transforms(two, frozen):
        each = jnp.stack([loss(jax.tree.map(lambda x, n=n: x[n], two), frozen) for n in range(2)])
        _, scanned = jax.lax.scan(lambda carry, t: (carry, jax.checkpoint(loss)(t, frozen)), None, two)
        step = jax.tree.map(lambda x, g: x - 0.1 * g, two, jax.vmap(jax.grad(loss), (0, None))(two, frozen))
        return each, jax.vmap(loss, in_axes=(0, None))(two, frozen), scanned, step

    each, mapped, scanned, step = transforms(jax.tree.map(jnp.copy, two), frozen)
    close(mapped, each)
    close(scanned, each)
    second = jax.tree.map(lambda x: x[1], step)
    close(second, jax.tree.map(lambda x, g: x - 0.1 * g, moved(trainable), evidence(kind, method)["gradients"]))


@on("linen-scanned", "plain")
def test_the_compiled_step_forms_no_dense_update(kind, method):
    if method.FORMS_DENSE_UPDATE:
        assert method.FORMS_DENSE_UPDATE.strip(), "a method that forms a dense update says why"
        return
    model, trainable, frozen = start(kind, method)
    text = jax.jit(jax.value_and_grad(loss_of(model, method))).lower(trainable, frozen).compile().as_text()
    trained = {x.shape for x in jax.tree.leaves(trainable)}
    bound = method.bind(trainable, frozen)
    for shape in {w.shape for w in weights_of(bound) if len(w.axes) > 1} - trained:
        for variant in {shape, shape[1:]}:
            pattern = rf"= f32\[{','.join(map(str, variant))}\]\S* (dot|add|subtract)\("
            assert math.prod(variant) < 100 or not re.search(pattern, text), re.search(pattern, text)


@on("linen-scanned", "plain")
def test_a_chain_obeys_the_laws(kind, method):
    model, given = make_model(kind), calibration(kind, method)
    for both in (jpeft.chain(method, jpeft.LoRA(rank=2)), jpeft.chain(jpeft.LoRA(rank=2), method)):
        for_each = tuple(given if m == method else None for m in both.methods)
        try:
            trainable, frozen = both.init(KEY, model.params, model.sites, for_each)
        except ValueError as refusal:
            assert "chain" in str(refusal)
            continue
        assert len(trainable) == len(both.methods) == 2
        arrays = jax.tree.leaves(trainable) + jax.tree.leaves(frozen)
        assert len({id(x) for x in arrays}) == len(arrays)
        trainable = moved(trainable)
        bound = both.bind(trainable, frozen)

        @jax.jit
        def run(trainable, frozen, model=model, both=both):
            bound = both.bind(trainable, frozen)
            inputs = inputs_of(model, both)
            lifted = jpeft.lift(model.apply)(bound, *inputs)
            merged = lifted if why_not_merge(bound) else model.apply(jpeft.merge(bound), *inputs)
            return lifted, merged, jax.grad(loss_of(model, both))(trainable, frozen)

        lifted, merged, grads = run(trainable, frozen)
        close(lifted, merged, 5e-5)
        assert jpeft.count(bound).trainable == sum(x.size for x in jax.tree.leaves(trainable))
        assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))


@law
def test_saving_and_loading_is_exact(kind, method, tmp_path):
    model, given = make_model(kind), calibration(kind, method)
    trainable, frozen = method.init(jax.random.key(7), model.params, model.sites, given)
    trainable = moved(trainable)
    mark = adapter.fingerprint(model.params)
    adapter.save_adapter(tmp_path, method, trainable, frozen, base="here", base_fingerprint=mark, seed=7)
    loaded = adapter.load_adapter(tmp_path, model.params, model.sites, jpeft.methods())
    assert loaded[0] == method
    assert jax.tree.structure(loaded[1:]) == jax.tree.structure((trainable, frozen))
    for ours, theirs in zip(jax.tree.leaves(loaded[1:]), jax.tree.leaves((trainable, frozen)), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "method"),
    [case for case in EVERY if case.values[0] in ("linen-scanned", "plain") and _exports_another(case.values[1])],
)
def test_what_is_exported_computes_the_same_on_the_original_params(kind, method):
    model, trainable, frozen = start(kind, method)
    trainable = moved(trainable)
    plain, exported = method.exported(trainable, frozen)
    _, rest = jax.jit(lambda key, params: plain.init(key, params, model.sites))(KEY, model.params)
    inputs = inputs_of(model, method)
    run = jax.jit(lambda method, t, f: jpeft.lift(model.apply)(method.bind(t, f), *inputs), static_argnums=0)
    close(run(plain, exported, rest), run(method, trainable, frozen))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_method_is_a_value(method):
    assert type(method)() == type(method)(), "constructible without arguments, and compares"
    assert hash(method) == hash(dataclasses.replace(method))
    assert type(method).__name__ in repr(method)
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    assert type(method)(**fields) == method


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_adding_a_target_does_not_reshuffle_the_others(method):
    model = make_model("linen-unrolled")
    first, second, *_ = [*method.chosen(model.sites), None]
    if second is None:  # a method of one leaf, which refuses a second
        return
    one, two = (dataclasses.replace(method, targets=[f"^{path}$" for path in t]) for t in ([first], [first, second]))
    chosen = [
        _at(m.init(KEY, model.params, model.sites, calibration("linen-unrolled", m))[0], first) for m in (one, two)
    ]
    assert chosen[0]
    assert all(np.array_equal(a, b) for a, b in zip(*chosen, strict=True))


def _at(trainable, path):
    found = jax.tree_util.tree_leaves_with_path(trainable)
    return [x for p, x in found if f"/{path}/" in f"/{path_string(p)}/"]
