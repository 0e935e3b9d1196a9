"""PiSSA against HF PEFT and the decomposition in float64; what all starts that change the base have in common."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, assert_starts_as_peft, low_rank_tensors, make_case, numbers

import jpeft
import jpeft.models
from jpeft.core.method import Method, Saved
from jpeft.core.weight import apply, dense, static, weight
from jpeft.methods.pissa import _NonzeroStart, randomized_svd

KEY = jax.random.key(0)


def product(p, x):
    return x @ p["w"]


def start(method, w, x=None):
    """`(trainable, frozen)` of `w`'s own leaf alone."""
    sites = jpeft.find_sites(product, {"w": w}, jnp.ones((2, w.shape[0])) if x is None else x)
    trainable, frozen = method.init(KEY, {"w": w}, sites)
    return trainable["w"], frozen["w"]


@pytest.mark.parity
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.filterwarnings("ignore")
def test_it_starts_and_trains_as_peft_s(scaling):
    peft = pytest.importorskip("peft")
    ours = jpeft.PiSSA(rank=3, alpha=5, scaling=scaling, targets="kernel")
    options = dict(r=3, lora_alpha=5, target_modules=["0"], use_rslora=scaling == "rslora", init_lora_weights="pissa")
    assert_starts_as_peft(make_case("linear"), ours, peft.LoraConfig(**options))
    case = make_case("linear")
    factors = lambda w: case.factors(w.a, w.b)
    assert_same_as_peft(case, ours, peft.LoraConfig(**options), low_rank_tensors, factors)


def test_the_base_keeps_the_singular_values_that_do_not_train():
    w = numbers(8, 6)
    trainable, frozen = start(jpeft.PiSSA(rank=2, alpha=6), jnp.asarray(w))
    sigma = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    values = lambda m: np.linalg.svd(np.asarray(m, np.float64), compute_uv=False)
    np.testing.assert_allclose(values(frozen.base), [*sigma[2:], 0, 0], atol=1e-5)
    np.testing.assert_allclose(values(3 * np.asarray(trainable.a) @ np.asarray(trainable.b))[:2], sigma[:2], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(trainable.a, axis=0), np.linalg.norm(trainable.b, axis=1), atol=1e-5)
    np.testing.assert_array_equal(trainable.a, frozen.start_a)


@pytest.mark.parametrize("shape", [(40, 30), (2, 30, 40)])
def test_the_fast_decomposition_finds_the_leading_part(shape):
    rng = np.random.default_rng(0)
    rotation = lambda n: np.linalg.qr(rng.normal(size=(*shape[:-2], n, n)))[0][..., :30]
    sigma = 0.8 ** np.arange(30)
    left, right = rotation(shape[-2]), rotation(shape[-1])
    u, s, vt = randomized_svd(KEY, jnp.asarray(left * sigma @ right.swapaxes(-1, -2), jnp.float32), 5, 4)
    np.testing.assert_allclose(s, np.broadcast_to(sigma[:5], s.shape), atol=1e-4)
    best = left[..., :5] * sigma[:5] @ right[..., :5].swapaxes(-1, -2)
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, best, atol=1e-3)


def test_fast_and_exact_start_alike_where_the_values_fall_fast():
    w = numbers(20, 3) @ numbers(3, 16) + 1e-3 * numbers(20, 16)
    exact, fast = (start(jpeft.PiSSA(rank=3, iterations=n), jnp.asarray(w))[1].base for n in (None, 4))
    np.testing.assert_allclose(exact, fast, atol=1e-4)


def test_a_base_of_16_bits_keeps_its_dtype_and_its_adapter_is_wider():
    w = jnp.asarray(numbers(8, 6), jnp.bfloat16)
    trainable, frozen = start(jpeft.PiSSA(rank=2), w)
    assert frozen.base.dtype == jnp.bfloat16 and trainable.a.dtype == frozen.start_b.dtype == jnp.float32
    whole = jpeft.merge(jpeft.PiSSA().bind({"w": trainable}, {"w": frozen}))["w"]
    np.testing.assert_allclose(whole.astype("f4"), w.astype("f4"), atol=0.02)


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA"])
def test_counts_are_lora_s(name):
    llama2_7b = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    apply_fn, shapes = jpeft.models.abstract(llama2_7b | dict(intermediate_size=11008, vocab_size=32000))
    sites = jpeft.find_sites(apply_fn, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.methods()[name](rank=8, targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == 4_194_304


# ---- a base that is compressed, one that is adapted ----


@weight
class Eighths(jpeft.Weight):
    """The leaf rounded to eighths."""

    base: Any
    axes: str = static()

    def apply(self, op, x):
        return apply(op, x, self.base)

    def dense(self):
        return dense(self.base)

    def standing_for(self, array):
        return self.replace(base=jnp.round(array * 8) / 8)


@dataclass(frozen=True)
class Rounding(Method):
    """A compressing method."""

    def wrap(self, key, leaf, site):
        return Eighths(leaf, axes=site.axes).standing_for(leaf)


def test_what_is_left_of_the_weights_is_compressed_in_their_place():
    w = jnp.asarray(numbers(8, 6))
    sites = jpeft.find_sites(product, {"w": w}, jnp.ones((2, 8)))
    method = jpeft.chain(Rounding(), jpeft.PiSSA(rank=2))
    bound = method.bind(*method.init(KEY, {"w": w}, sites))["w"]
    assert isinstance(bound.base, Eighths)
    np.testing.assert_array_equal(bound.base.base, np.round(bound.base.base * 8) / 8)
    left = w - np.asarray(bound.start_a) @ np.asarray(bound.start_b) * bound.scale
    np.testing.assert_allclose(bound.base.base, left, atol=1 / 16 + 1e-5)


def test_an_adapted_base_is_refused():
    w = jnp.ones((8, 6))
    sites = jpeft.find_sites(product, {"w": w}, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="a LowRank stands there already; put the method first in the chain"):
        jpeft.chain(jpeft.LoRA(rank=2), jpeft.PiSSA(rank=2)).init(KEY, {"w": w}, sites)


# ---- the way back to a plain LoRA ----


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_it_is_exported_as_a_lora_of_twice_the_rank(scaling):
    params = {"up": jnp.asarray(numbers(8, 10)), "down": jnp.asarray(numbers(10, 8)), "norm": jnp.ones(8)}
    fn = lambda p, x: (x * p["norm"]) @ p["up"] @ p["down"]
    x = jnp.asarray(numbers(3, 8))
    sites = jpeft.find_sites(fn, params, x)
    method = jpeft.PiSSA(
        rank=3,
        alpha=5.0,
        scaling=scaling,
        rank_pattern={"down": 2},
        alpha_pattern={"up": 7.0},
        targets=["up", "down"],
        modules_to_save=("norm",),
    )
    trainable, frozen = method.init(KEY, params, sites)
    trainable = jax.tree.map(lambda t: t + 0.1 * numbers(*t.shape), trainable)
    plain, exported = method.exported(trainable, frozen)
    assert isinstance(plain, jpeft.LoRA) and (plain.rank, plain.rank_of("down")) == (6, 4)
    assert plain.scale_of("up") == pytest.approx(method.scale_of("up"))
    assert plain.scale_of("down") == pytest.approx(method.scale_of("down"))
    _, rest = plain.init(KEY, params, sites)
    expected = jpeft.lift(fn)(method.bind(trainable, frozen), x)
    np.testing.assert_allclose(jpeft.lift(fn)(plain.bind(exported, rest), x), expected, rtol=1e-4, atol=1e-3)
    assert np.array_equal(rest["up"].base, params["up"])


def test_a_saved_adapter_without_its_start_is_refused():
    params = {"w": jnp.ones((8, 6))}
    sites = jpeft.find_sites(product, params, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="w: the saved adapter lacks start_a and start_b"):
        jpeft.PiSSA(rank=2).init(KEY, params, sites, {"w": Saved(a=jnp.ones((8, 2)), b=jnp.ones((2, 6)))})


def test_options_are_checked_where_they_are_written():
    for iterations in (-1, 2.5):
        with pytest.raises(ValueError, match=f"iterations as None or a whole number >= 0, got {iterations}"):
            jpeft.PiSSA(iterations=iterations)
    with pytest.raises(ValueError, match="whole rank >= 1"):
        jpeft.PiSSA(rank=0)
    with pytest.raises(TypeError, match="_NonzeroStart defines no factors"):
        _NonzeroStart().factors(KEY, jnp.ones((2, 2)), None, None)


def test_on_compressed_weights_the_residual_of_the_pretrained_ones_is_compressed():
    """QPiSSA: nearer to the pretrained weights than compressing them, most where few directions carry much of them."""
    w = jnp.asarray(numbers(128, 4) @ numbers(4, 64) + numbers(128, 64) / 8)
    distance = lambda leaf: float(jnp.linalg.norm(leaf.dense() - w))
    sites = jpeft.find_sites(product, {"w": w}, jnp.ones((2, 128)))
    bound = lambda method, params: method.bind(*method.init(KEY, params, sites))
    alone = bound(jpeft.NF4(), {"w": w})
    both = jpeft.chain(jpeft.NF4(), jpeft.PiSSA(rank=4, alpha=4))
    ours = bound(both, {"w": w})["w"]
    plain = bound(jpeft.PiSSA(rank=4, alpha=4), {"w": w})["w"]
    np.testing.assert_array_equal(ours.a, plain.a)
    expected = jpeft.NF4().WEIGHT.encode(plain.base, axes="io", leaf_dtype=w.dtype, block_size=64, double_quant=True)
    np.testing.assert_array_equal(ours.base.dense(), expected.dense())
    assert distance(ours) < 0.5 * distance(alone["w"])
    again = bound(jpeft.PiSSA(rank=4, alpha=4), alone)["w"]  # of a model that came compressed: what it decodes to
    np.testing.assert_allclose(again.a, bound(jpeft.PiSSA(rank=4, alpha=4), jpeft.merge(alone))["w"].a, rtol=1e-5)
