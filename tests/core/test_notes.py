"""Weights that act after a product: where a bias is added, and at the attention call that the product reaches."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from small_models import MODELS, make_model

import jpeft
from jpeft.core.tree import map_with_paths
from jpeft.core.weight import Weight, apply, dense, static, weight


@weight
class Doubled(Weight):
    """What a layer puts out, its bias included, twice."""

    base: Any
    axes: str = static()

    def added(self, op, x):
        return op.map_outputs(op.base(x, dense(self.base)), lambda y: 2 * y)

    def apply(self, op, x):
        return op.map_outputs(apply(op, x, self.base), lambda y: 2 * y)


@weight
class Sink(Weight):
    """A key more, (kv_heads, head_dim) of ones, whose value is `level` everywhere."""

    base: Any
    level: Any
    axes: str = static()
    FIELDS = {"level": ""}
    SLICEABLE = "io"

    def apply(self, op, x):
        return apply(op, x, self.base)

    def dense(self):
        return dense(self.base)

    def notes(self, op, reached):
        return (*super().notes(op, reached), self)

    def attend(self, call):
        size = call.query.shape[-1]
        ones = jnp.ones((1, call.kv_heads, size))
        return call.joined(ones, self.level * ones)


@weight
class OnlyLevel(Sink):
    """A sink whose note has not the kernel."""

    def notes(self, op, reached):
        return (*reached, self.replace(base=None))


@weight
class OneHead(Sink):
    """A sink that knows one head alone."""

    def attend(self, call):
        return call.joined(*[jnp.ones((1, 1, 4))] * 2)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- at the sum ----


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["vector", "heads"])
@pytest.mark.parametrize("lead", [(), (4,), (4, 3)])
def test_a_bias_acts_where_it_is_added(shape, lead):
    params = {"kernel": numbers(6, *shape), "bias": numbers(*shape)}
    x = numbers(*lead, 6)

    def fn(params, x):
        y = jnp.tensordot(x, params["kernel"], 1)
        return jnp.sin(y + params["bias"].reshape((1,) * len(lead) + shape))

    bound = params | {"bias": Doubled(params["bias"], axes="o" * len(shape))}
    plain = np.tensordot(x, params["kernel"], 1) + params["bias"]
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), np.sin(2 * plain), atol=1e-5)


@weight
class Turned(Weight):
    """What a layer puts out, its bias included, times a matrix of its own, and its vector."""

    base: Any
    matrix: Any
    vector: Any
    axes: str = static()
    FIELDS = {"matrix": "ok", "vector": "o"}

    def added(self, op, x):
        turn = lambda y: op.mix(y, self.matrix) + op.spread(self.vector)
        return op.map_outputs(op.base(x, dense(self.base)), turn)


@pytest.mark.parametrize("front", [True, False], ids=["experts first", "rows first"])
def test_what_acts_on_experts_at_their_bias_is_each_experts_own(front):
    params = {"kernel": numbers(3, 4, 5), "bias": numbers(3, 5)}
    x, matrix, vector = numbers(3, 2, 4), numbers(3, 5, 5), numbers(3, 5, seed=1)

    def fn(p, x):
        y = jnp.einsum("ebd,edf->ebf" if front else "ebd,edf->bef", x, p["kernel"])
        return jnp.sin(y + (p["bias"][:, None] if front else p["bias"]))

    bound = params | {"bias": Turned(params["bias"], matrix, vector, axes="bo")}
    turned = np.einsum("ebf,efg->ebg", np.asarray(x @ params["kernel"]) + params["bias"][:, None], matrix)
    expected = np.sin(turned + vector[:, None])
    found = jpeft.lift(fn)(bound, x)
    np.testing.assert_allclose(found if front else jnp.swapaxes(found, 0, 1), expected, atol=1e-5)


def changed(params, changes):
    """The tree with `changes[path](leaf)` in place of some leaves."""
    return map_with_paths(lambda path, x: changes[path](x) if path in changes else x, params)


@pytest.mark.parametrize("kind", MODELS)
def test_a_bias_acts_in_every_layer_of_a_model(kind):
    model = make_model(kind)
    before, bias = {
        "linen-unrolled": ("layer_1/down/kernel", "layer_1/down/bias"),
        "plain": ("scale", "bias"),  # what multiplies the product, and what is added to it
    }.get(kind, ("layers/down/kernel", "layers/down/bias"))
    axes = model.sites[bias].axes.lstrip("s")
    acting = changed(model.params, {bias: lambda x: Doubled(x, axes=axes)})
    doubled = changed(model.params, dict.fromkeys((before, bias), lambda x: 2 * x))
    run = jax.jit(lambda params: jpeft.lift(model.apply)(params, *model.inputs))
    np.testing.assert_allclose(run(acting), run(doubled), atol=2e-5)


def test_a_bias_acts_through_an_outer_weight():
    params, x = {"b": jnp.arange(3.0)}, jnp.ones((2, 3))
    fn = lambda p, x: x + p["b"]
    bound = {"b": Sink(Doubled(params["b"], axes="o"), jnp.float32(0), axes="o")}
    assert np.array_equal(jpeft.lift(fn)(bound, x), 2 * fn(params, x))


@weight
class Raised(Weight):
    """One more than the leaf."""

    base: Any
    axes: str = static()

    def dense(self):
        return dense(self.base) + 1


@pytest.mark.parametrize("times", [1, 2])
def test_what_changes_a_bias_does_so_under_what_acts_at_the_sum(times):
    params, x = {"b": jnp.arange(3.0)}, jnp.ones((2, 3))
    fn = lambda p, x: x + p["b"]
    leaf = Doubled(params["b"], axes="o")
    for _ in range(times):
        leaf = Raised(leaf, axes="o")
    assert np.array_equal(jpeft.lift(fn)({"b": leaf}, x), 2 * (fn(params, x) + times))


# ---- at the attention call ----


def with_sink(model, level):
    """The tree with a key and value more in every attention call, and the same by hand where there is one call."""
    sites = {s.path: s for s in model.sites if s.kind == "attention"}
    places = {}
    for path, site in sites.items():
        stack = tuple(n for n, c in zip(site.shape, site.axes, strict=True) if c == "s")
        places[path] = lambda x, stack=stack, site=site: Sink(x, jnp.full(stack, level), axes=site.axes.lstrip("s"))
    return changed(model.params, places)


@pytest.mark.parametrize("kind", MODELS)
def test_a_sink_of_zero_value_shrinks_what_attention_puts_out(kind):
    model = make_model(kind)
    run = jax.jit(lambda params: jpeft.lift(model.apply)(params, *model.inputs))
    plain, low, high = run(model.params), run(with_sink(model, 0.0)), run(with_sink(model, 1.0))
    assert not np.allclose(plain, low, atol=1e-3) and not np.allclose(low, high, atol=1e-3)
    slope = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(jpeft.lift(model.apply)(params, *model.inputs)))))
    levels = [w.level for w in jax.tree.leaves(slope(with_sink(model, 0.5)), is_leaf=is_sink) if is_sink(w)]
    assert levels and all(np.all(np.asarray(g) != 0) for g in levels)


def is_sink(x):
    return isinstance(x, Sink)


# ---- at a later product ----


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heard:
    """What a kernel was multiplied with."""

    value: Any

    beyond_attention = True


@weight
class Telling(Weight):
    """A kernel that tells what it was multiplied with."""

    base: Any
    axes: str = static()

    def apply(self, op, x):
        return apply(op, x, self.base)

    def notes(self, op, reached):
        return (*super().notes(op, reached), Heard(op.inputs(op.operand)))


@weight
class Hearing(Weight):
    """A kernel, or its bias, that adds the sum of what it hears."""

    base: Any
    axes: str = static()

    def apply(self, op, x):
        return self.more(op, apply(op, x, self.base))

    def added(self, op, x):
        return self.more(op, op.base(x, dense(self.base)))

    def more(self, op, y):
        return op.map_outputs(y, lambda y: y + sum(jnp.sum(note.value, -1, keepdims=True) for note in op.reached))

    def notes(self, op, reached):
        return ()


def sublayers(p, x):
    """Attention and feed-forward, and what the latter is applied to; a remat stands between the latter's kernels."""
    query, key, value = ((x @ p[name]).reshape(*x.shape[:-1], 2, 4) for name in ("query", "key", "value"))
    x = x + (jpeft.attention(query, key, value).reshape(x.shape) @ p["out"] + p["out_bias"])
    h = jax.checkpoint(lambda h: jnp.sin(jax.nn.gelu(h)))(x @ p["up"])
    return x + (h @ p["down"] + p["down_bias"]), x


@pytest.mark.parametrize("around", [False, True], ids=["alone", "under LoRA"])
@pytest.mark.parametrize("suffix", ["", "_bias"], ids=["kernel", "bias"])
@pytest.mark.parametrize(("first", "second"), [("query", "out"), ("up", "down")], ids=["attention", "feed-forward"])
def test_what_a_product_was_of_is_known_where_the_sublayer_ends(first, second, suffix, around):
    rng = np.random.default_rng(0)
    shapes = {name: (8, 8) for name in ("query", "key", "value", "out")} | {"up": (8, 9), "down": (9, 8)}
    shapes |= {"out_bias": (8,), "down_bias": (8,)}
    params = {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    ending = lambda w: Hearing(w, axes="o" if suffix else "io")
    bound = changed(params, {first: lambda w: Telling(w, axes="io"), second + suffix: ending})
    if around:
        lora = jpeft.LoRA(rank=2, targets=[f"^{first}$", f"^{second}$"])
        bound = lora.bind(*lora.init(jax.random.key(1), bound, jpeft.find_sites(sublayers, params, x)))
    heard = x if second == "out" else sublayers(params, x)[1]
    shifted = params | {f"{second}_bias": params[f"{second}_bias"] + heard.sum(-1, keepdims=True)}
    np.testing.assert_allclose(jax.jit(jpeft.lift(sublayers))(bound, x)[0], sublayers(shifted, x)[0], atol=2e-5)


class Attending(nn.Module):
    """One attention layer whose parts lie inside and outside of transforms."""

    way: str

    @nn.compact
    def __call__(self, x):
        heads = lambda name: nn.DenseGeneral((2, 6), name=name)
        query = (nn.remat(nn.DenseGeneral)((2, 6), name="query") if self.way == "remat" else heads("query"))(x)
        key, value = heads("key")(x), heads("value")(x)
        if self.way == "jit":
            return jax.jit(lambda q: jpeft.attention(jnp.sin(q), key, value, is_causal=True))(query)
        if self.way == "cond":
            call = lambda q: jpeft.attention(jnp.sin(q), key, value, is_causal=True)
            return jax.lax.cond(x[0, 0, 0] > -100, call, jnp.zeros_like, query)
        return jpeft.attention(jnp.sin(query), key, value, is_causal=True)


@pytest.mark.parametrize("way", ["plain", "remat", "jit", "cond"])
def test_notes_go_where_the_queries_go(way):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    apply, _ = jpeft.from_linen(Attending(way))
    params = Attending("plain").init(jax.random.key(1), x)["params"]
    sites = jpeft.find_sites(apply, params, x)
    (call,) = [s for s in sites if s.kind == "attention"]
    assert (call.path, call.key, call.value) == ("query/kernel", "key/kernel", "value/kernel")
    assert (call.heads, call.kv_heads, call.head_dim, call.value_dim) == (2, 2, 6, 6)

    bound = changed(params, {"query/kernel": lambda w: Sink(w, jnp.float32(0.3), axes="ioo")})
    project = lambda name: jnp.einsum("btd,dhk->bthk", x, params[name]["kernel"]) + params[name]["bias"]
    q, k, v = jnp.sin(project("query")), project("key"), project("value")
    extra = lambda rows, value: jnp.concatenate([jnp.full_like(rows[:, :1], value), rows], 1)
    mask = jnp.tri(5, 6, 1, dtype=bool)
    expected = jpeft.attention(q, extra(k, 1.0), extra(v, 0.3), mask=mask)
    np.testing.assert_allclose(jpeft.lift(apply)(bound, x), expected, atol=2e-6)


def test_a_note_of_an_inner_weight_reaches_the_call_through_an_outer_one():
    model = make_model("nnx")
    bound = with_sink(model, 0.5)
    lora = jpeft.LoRA(rank=2, targets="query")
    halves = lora.init(jax.random.key(0), bound, model.sites)
    run = lambda params: jpeft.lift(model.apply)(params, *model.inputs)
    np.testing.assert_allclose(run(lora.bind(*halves)), run(bound), atol=1e-6)


@pytest.mark.parametrize("way", ["sliced", "remat"])
def test_a_note_that_comes_with_queries_keys_and_values_acts_once(way):
    """Of a fused kernel the pieces, or its rematerialised product's, each bring the note."""

    def fn(p, x):
        heads = lambda y: y.reshape(2, 5, 2, 4)
        if way == "sliced":
            return jpeft.attention(*(heads(x @ w) for w in jnp.split(p["w"], 3, axis=1)))
        return jpeft.attention(*map(heads, jax.checkpoint(lambda w, x: jnp.split(x @ w, 3, axis=-1))(p["w"], x)))

    rng = np.random.default_rng(0)
    params, x = {"w": jnp.asarray(rng.normal(size=(8, 24)) / 3)}, jnp.asarray(rng.normal(size=(2, 5, 8)))
    q, k, v = (y.reshape(2, 5, 2, 4) for y in jnp.split(x @ params["w"], 3, axis=-1))
    extra = lambda rows, value: jnp.concatenate([jnp.full_like(rows[:, :1], value), rows], 1)
    bound = {"w": OnlyLevel(params["w"], jnp.float32(0.3), axes="io")}
    expected = jpeft.attention(q, extra(k, 1.0), extra(v, 0.3))
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), expected, atol=2e-6)


def test_extra_keys_have_the_heads_of_the_call():
    fn = lambda p, x: jpeft.attention(*[(x @ p["w"]).reshape(2, 5, 2, 4)] * 3)
    params, x = {"w": jnp.ones((8, 8))}, jnp.ones((2, 5, 8))
    with pytest.raises(ValueError, match="expected keys and values of the call's 2 heads, got \\(1, 1, 4\\)"):
        jpeft.lift(fn)({"w": OneHead(params["w"], jnp.float32(0.3), axes="io")}, x)


def test_queries_of_no_one_kernel_have_no_place():
    mixed = lambda p, x: jpeft.attention(*[(x @ p["a"] + x @ p["b"]).reshape(2, 5, 2, 4)] * 3)
    params, x = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}, jnp.ones((2, 5, 8))
    assert {s.kind for s in jpeft.find_sites(mixed, params, x)} == {"dense"}
