"""Houlsby adapters against the `adapters` package, the closed form, the published counts, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters_golden import assert_same_as_adapters, bottleneck
from peft_cases import numbers
from small_models import make_model

import jpeft
import jpeft.models
from jpeft.methods._bottleneck import ACTIVATIONS, activation_of

KEY = jax.random.key(0)
BERT_BASE = dict(model_type="bert", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
BERT_BASE |= dict(intermediate_size=3072, vocab_size=30522)
BERT_LARGE = BERT_BASE | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def test_the_same_numbers_give_what_the_adapters_package_gives():
    assert_same_as_adapters("houlsby", jpeft.Houlsby(reduction=4, activation="swish"), bottleneck)


def test_the_norms_of_an_adapter_are_those_of_the_adapters_package():
    def fields(get):
        norm = lambda name: np.stack([get(f"adapters.a.{name}.{x}") for x in ("weight", "bias")], -2)
        norms = {"before": norm("adapter_norm_before"), "after": norm("adapter_norm_after")}
        return bottleneck(get, down=1) | norms  # its first module is the norm

    method = jpeft.Houlsby(reduction=4, ln_before=True, ln_after=True)
    assert_same_as_adapters("houlsby_norms", method, fields)


# ---- where it acts ----


def layer(params, x):
    """A layer in front of its residual sum, and the sum."""
    h = x @ params["down"]["kernel"]
    return x + (h + params["down"]["bias"] if "bias" in params["down"] else h)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_adapter_reads_the_outputs_with_their_bias_before_the_residual_sum(bias):
    params, x = {"down": {"kernel": numbers(6, 6)} | ({"bias": numbers(6)} if bias else {})}, numbers(3, 6)
    sites = jpeft.find_sites(layer, params, x)
    method = jpeft.Houlsby(targets="down/kernel", bottleneck=2, activation="relu", init_std=1.0)
    assert list(method.chosen(sites)) == ["down/bias" if bias else "down/kernel"]
    trainable, frozen = method.init(KEY, params, sites)
    trainable = jax.tree.map(lambda t: t + 0.3, trainable)
    w = trainable["down"]["bias" if bias else "kernel"]
    down, down_bias, up, up_bias = (np.asarray(t, np.float64) for t in (w.down, w.down_bias, w.up, w.up_bias))
    y = x @ params["down"]["kernel"] + params["down"].get("bias", 0)
    expected = x + y + np.maximum(y @ down + down_bias, 0) @ up + up_bias
    np.testing.assert_allclose(jpeft.lift(layer)(method.bind(trainable, frozen), x), expected, atol=1e-5)


def test_a_method_on_the_kernel_acts_under_the_adapter_in_either_order():
    model = make_model("nnx")
    lora, houlsby = jpeft.LoRA(rank=2, targets="down"), jpeft.Houlsby(targets="down", bottleneck=3, init_std=0.5)

    def run(first, second, swap):
        both = jpeft.chain(first, second)
        trainable, frozen = both.init(KEY, model.params, model.sites)
        kernel = lambda tree: tree["layers"]["down"]["kernel"]
        numbers = [kernel(trainable[swap]).a, trainable[1 - swap]["layers"]["down"]["bias"].down]
        scaled = jax.tree.map(lambda t: 0 * t + 0.1, trainable)
        return numbers, jpeft.lift(model.apply)(both.bind(scaled, frozen), *model.inputs)

    (_, one), (_, other) = run(lora, houlsby, 0), run(houlsby, lora, 1)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_scale_of_the_bias_acts_under_the_adapter_in_either_order():
    model = make_model("nnx")
    scales = jpeft.IA3(targets="down", feedforward=())
    houlsby = jpeft.Houlsby(targets="down", bottleneck=3)
    found = []
    for methods in ((scales, houlsby), (houlsby, scales)):
        both = jpeft.chain(*methods)
        trainable, frozen = both.init(KEY, model.params, model.sites)
        trainable = jax.tree.map(lambda t: 0 * t + 0.1, trainable)
        found.append(jpeft.lift(model.apply)(both.bind(trainable, frozen), *model.inputs))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_every_layer_starts_with_numbers_of_its_own_near_the_pretrained_function():
    model = make_model("linen-scanned")
    method = jpeft.Houlsby(bottleneck=8)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    w = trainable["layers"]["down"]["bias"]
    assert w.down.shape == (3, 24, 8) and w.up.shape == (3, 8, 24)
    assert np.abs(w.down).max() <= 2e-3 and 6e-4 < np.std(w.down) < 1.2e-3 and not np.any(w.up_bias)
    assert not np.allclose(w.down[0], w.down[1]) and not np.allclose(w.down[0], w.up[0].T)
    out = jpeft.lift(model.apply)(method.bind(trainable, frozen), *model.inputs)
    np.testing.assert_allclose(out, model.apply(model.params, *model.inputs), atol=1e-3)
    assert not method.NO_OP_AT_START


def test_a_zero_up_starts_at_the_pretrained_function():
    model = make_model("linen-unrolled")
    method = jpeft.Houlsby(bottleneck=8, init_weights="mam_adapter")
    trainable, frozen = method.init(KEY, model.params, model.sites)
    assert np.abs(trainable["layer_0"]["down"]["bias"].down).max() <= 24**-0.5
    out = jpeft.lift(model.apply)(method.bind(trainable, frozen), *model.inputs)
    assert np.array_equal(out, jpeft.lift(model.apply)(model.params, *model.inputs))
    assert method.NO_OP_AT_START and jpeft.chain(method).NO_OP_AT_START


def test_compute_follows_the_activation():
    params = {"down": {"kernel": jnp.ones((6, 6), jnp.bfloat16), "bias": jnp.ones(6, jnp.bfloat16)}}
    x = jnp.ones((3, 6), jnp.bfloat16)
    method = jpeft.Houlsby(targets="down/kernel", bottleneck=2, ln_before=True)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(layer, params, x))
    assert {t.dtype for t in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}
    assert jpeft.lift(layer)(method.bind(trainable, frozen), x).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", [*ACTIVATIONS, "relu", "silu", "tanh", "mish"])
def test_activations_are_elementwise_functions(name):
    x = jnp.linspace(-2.0, 2.0, 5)
    assert activation_of(name)(x).shape == x.shape and float(activation_of(name)(x)[4]) > 0.9


# ---- published counts ----


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        (BERT_BASE, {}, 1_789_056),
        (BERT_LARGE, {"bottleneck": 8}, 835_968),
        (BERT_LARGE, {"bottleneck": 64}, 6_343_680),
        (BERT_LARGE, {}, 6_343_680),
        (BERT_LARGE, {"bottleneck": 256}, 25_227_264),
    ],
)
def test_counts_on_public_models_equal_the_published_integers(config, fields, expected):
    assert count(jpeft.Houlsby(**fields), config) == expected


def test_with_the_norms_the_count_is_the_papers():
    both = jpeft.chain(jpeft.NormTuning(targets="encoder/layer/.*LayerNorm/scale"), jpeft.Houlsby())
    assert count(both, BERT_BASE) == 1_789_056 + 2 * 12 * 2 * 768


def count(method, config, streams=1):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, *[jax.ShapeDtypeStruct((1, 8), jnp.int32)] * streams)
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    return jpeft.count(bound).trainable


# ---- what is refused ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck": 0}, "expected a whole bottleneck >= 1, got bottleneck=0"),
        ({"reduction": 2.5}, "expected a whole reduction >= 1, got reduction=2.5"),
        ({"init_weights": "xavier"}, "expected init_weights 'houlsby', 'bert' or 'mam_adapter', got 'xavier'"),
        ({"init_std": 0.0}, "expected init_std > 0"),
        ({"activation": "glu"}, "expected activation as a name of jax.nn, or one of gelu, .*, got 'glu'"),
        ({"activation": "one_hot"}, "got 'one_hot'"),
        ({"activation": "rleu"}, "got 'rleu'"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.Houlsby(**fields)


def test_a_reduction_that_does_not_divide_is_refused():
    model = make_model("linen-scanned")
    with pytest.raises(
        ValueError, match="down/bias: its 24 outputs are not divisible by reduction=16; write bottleneck"
    ):
        jpeft.Houlsby().init(KEY, model.params, model.sites)


def test_it_has_no_dense_form_and_no_part():
    model = make_model("linen-unrolled")
    method = jpeft.Houlsby(targets="layer_0/down", bottleneck=4)
    bound = method.bind(*method.init(KEY, model.params, model.sites))
    with pytest.raises(ValueError, match="layer_0/down/bias: an adapter with a nonlinearity acts on what the layer"):
        jpeft.merge(bound)
    half = lambda p, x: x + p["layer_0"]["down"]["bias"][:12]
    with pytest.raises(ValueError, match="a Bottleneck has no dense form"):
        jpeft.lift(half)(bound, jnp.ones((2, 12)))


def test_a_product_with_the_kernel_turned_around_is_refused():
    fn = lambda p, x: (x @ p["down"]["kernel"]) @ p["down"]["kernel"].T
    params, x = {"down": {"kernel": jnp.ones((6, 6))}}, jnp.ones((3, 6))
    sites = jpeft.find_sites(lambda p, x: x @ p["down"]["kernel"], params, x)
    method = jpeft.Houlsby(targets="down/kernel", bottleneck=2)
    with pytest.raises(jpeft.DensifyError, match="the product has its inputs in their place"):
        jpeft.lift(fn)(method.bind(*method.init(KEY, params, sites)), x)
