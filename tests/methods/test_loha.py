"""LoHa against HF PEFT, its starts, count and refusals."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import assert_same_as_peft, convolution, embedding, make_case, numbers

import jpeft
import jpeft.models
from jpeft.methods.loha import HadamardProduct, WindowedProduct

KEY = jax.random.key(0)


def tensors(*names):
    return lambda layer: tuple(getattr(layer, f"hada_{name}")["default"] for name in names)


def start(fn, params, x, **options):
    method = jpeft.LoHa(**{"rank": 2, "targets": "kernel", **options})
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, x))


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "convolution", "strided convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft = pytest.importorskip("peft")
    assert_same_as_peft(
        make_case(name),
        jpeft.LoHa(rank=3, alpha=5.0, targets="kernel"),
        peft.LoHaConfig(r=3, alpha=5, target_modules=["0"]),
        tensors("w1_a", "w1_b", "w2_a", "w2_b"),
        lambda w: (w.b1.T, w.a1.T, w.b2.T, w.a2.T),
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_effective_decomposition_of_a_convolution_is_peft_s(monkeypatch):
    """With PEFT's forward differentiated by torch: in its own backward w1_a has the gradient of w2_a's neighbours."""
    peft, layer = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.loha.layer")
    forward = layer.HadaWeightCP.forward
    context = types.SimpleNamespace(save_for_backward=lambda *tensors: None)
    monkeypatch.setattr(layer, "make_weight_cp", lambda *tensors, scale: forward(context, *tensors, scale))
    assert_same_as_peft(
        make_case("convolution"),
        jpeft.LoHa(rank=3, alpha=5.0, effective_conv=True, targets="kernel"),
        peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=["0"]),
        tensors("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2"),
        lambda w: (w.b1, w.a1.T, w.t1.reshape(3, 3, 3, 3), w.b2, w.a2.T, w.t2.reshape(3, 3, 3, 3)),
    )


# ---- what it computes ----


def test_the_update_is_the_elementwise_product_in_float64():
    fields = numbers(6, 3), numbers(3, 8), numbers(6, 3, seed=1), numbers(3, 8, seed=1)
    w = numbers(6, 2, 4)
    merged = jpeft.merge({"w": HadamardProduct(*map(jnp.asarray, (w, *fields)), axes="ioo", scale=0.5)})["w"]
    a1, b1, a2, b2 = (x.astype(np.float64) for x in fields)
    np.testing.assert_allclose(merged, w + 0.5 * ((a1 @ b1) * (a2 @ b2)).reshape(w.shape), atol=1e-5)


@pytest.mark.parametrize("order", ["HWIO", "OHWI"])
def test_the_effective_decomposition_knows_channels_in_any_order(order):
    """The same factors give the same kernel, whatever the order of its axes."""
    shapes = {"a1": (4, 2), "b1": (2, 6), "a2": (4, 2), "b2": (2, 6), "t1": (2, 2, 15), "t2": (2, 2, 15)}
    factors = {name: jnp.asarray(numbers(*shape, seed=n)) for n, (name, shape) in enumerate(shapes.items())}

    def kernel(order):
        w = jnp.zeros([{"H": 3, "W": 5, "I": 4, "O": 6}[letter] for letter in order])
        dims = ("NHWC", order, "NHWC")
        fn = lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        method, trainable, frozen = start(fn, {"kernel": w}, jnp.ones((1, 5, 5, 4)), effective_conv=True)
        assert isinstance(trainable["kernel"], WindowedProduct)
        bound = method.bind({"kernel": trainable["kernel"].replace(**factors)}, frozen)
        merged = jpeft.merge(bound)
        x = jnp.asarray(numbers(1, 5, 5, 4))
        np.testing.assert_allclose(jpeft.lift(fn)(bound, x), fn(merged, x), atol=1e-4, rtol=1e-5)
        return jnp.transpose(merged["kernel"], [order.index(letter) for letter in "OIHW"])

    np.testing.assert_allclose(kernel(order), kernel("OIHW"), atol=1e-5)


def test_a_lookup_forms_the_rows_that_it_finds_and_no_others():
    method, trainable, frozen = start(embedding, {"kernel": jnp.asarray(numbers(40, 30))}, jnp.array([3, 7]))
    bound = method.bind(jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable), frozen)
    rows = jnp.array([3, 7])
    assert "f32[40,30]{1,0} dot(" not in jax.jit(jpeft.lift(embedding)).lower(bound, rows).compile().as_text()
    np.testing.assert_allclose(jpeft.lift(embedding)(bound, rows), jpeft.merge(bound)["kernel"][rows], atol=1e-5)


# ---- starts and counts ----


def test_starts_are_fedpara_s_or_lycoris_s():
    fn, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.zeros((400, 300))}, jnp.ones((1, 400))
    w = start(fn, params, x, rank=100)[1]["kernel"]
    assert 0.049 < np.abs(w.a1).max() <= 0.05 and not w.a2.any()
    assert all(0.099 < np.abs(b).max() <= 0.1 for b in (w.b1, w.b2)) and not np.allclose(w.b1, w.b2)
    w = start(fn, params, x, rank=100, init_weights="normal")[1]["kernel"]
    assert [float(f.std()) for f in (w.a1, w.a2, w.b1)] == pytest.approx([1, 1, 0.1], rel=0.05) and not w.b2.any()


def test_a_windowed_start_changes_nothing():
    params = {"kernel": jnp.asarray(numbers(6, 4, 3, 3)), "bias": jnp.zeros(6)}
    fn = lambda p, x: convolution(p, x, window_strides=(1, 1))
    method, trainable, frozen = start(fn, params, jnp.ones((1, 4, 5, 5)), effective_conv=True)
    np.testing.assert_array_equal(jpeft.merge(method.bind(trainable, frozen))["kernel"], params["kernel"])


LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)
LLAMA3_8B = LLAMA2_7B | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)


@pytest.mark.parametrize(("config", "published"), [(LLAMA2_7B, 8_388_608), (LLAMA3_8B, 6_815_744)])
def test_counts_on_public_models_are_twice_lora_s(config, published):
    apply, shapes = jpeft.models.abstract(config)
    method = jpeft.LoHa(rank=8, targets=["q_proj", "v_proj"])
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    trainable, _ = jax.eval_shape(lambda key, p: method.init(key, p, sites), KEY, shapes)
    assert jpeft.count(trainable).trainable == published


# ---- refusals ----


def test_refusals():
    with pytest.raises(ValueError, match="expected rank >= 1, got rank=0"):
        jpeft.LoHa(rank=0)
    with pytest.raises(ValueError, match="expected init_weights in .*'normal'.*, got 'zeros'"):
        jpeft.LoHa(init_weights="zeros")
    fn, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((6, 4))}, jnp.ones((1, 6))
    with pytest.raises(ValueError, match=r"kernel: rank 5 is above min\(in, out\) = min\(6, 4\)"):
        start(fn, params, x, rank=5)
    with pytest.raises(ValueError, match="effective_conv=True has no effect: no convolution"):
        start(fn, params, x, effective_conv=True)
    params = {"kernel": jnp.ones((6, 4, 3, 3)), "bias": jnp.zeros(6)}
    fn = lambda p, x: convolution(p, x, window_strides=(1, 1))
    with pytest.raises(ValueError, match=r"kernel: rank 5 is above min\(channels, out\) = min\(4, 6\)"):
        start(fn, params, jnp.ones((1, 4, 5, 5)), rank=5, effective_conv=True)
