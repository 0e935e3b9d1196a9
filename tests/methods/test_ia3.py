"""(IA)³ against HF PEFT, its formula and the published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft_cases import assert_same_as_peft, make_case, numbers
from small_models import make_model

import jpeft
import jpeft.models

KEY = jax.random.key(0)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "linear inputs", "convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft = pytest.importorskip("peft")
    case = make_case(name.split()[0])
    inputs = name.endswith("inputs")
    row, column, channels = (lambda v: v[None]), (lambda v: v[:, None]), (lambda v: v[None, :, None, None])
    shaped = row if inputs else channels if name == "convolution" else column
    assert_same_as_peft(
        case,
        jpeft.IA3(targets="kernel", feedforward="kernel" if inputs else None),
        peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if inputs else []),
        lambda layer: (layer.ia3_l["default"],),
        lambda w: (shaped(w.scale),),
    )


def start(method, model):
    return jax.jit(lambda key, params: method.init(key, params, model.sites))(KEY, model.params)


def test_a_kernel_and_its_bias_have_one_scale_and_the_down_projection_none_for_its_bias():
    model = make_model("linen-scanned")
    method = jpeft.IA3()
    trainable, frozen = start(method, model)
    names = [f"layers/attention/{n}/kernel" for n in ("key", "value")]
    assert sorted(trainable.arrays) == names
    assert all(x.shape == (3, 24) and np.all(x == 1) for x in trainable.arrays.values())
    assert trainable.tree["layers"]["down"]["kernel"].scale.shape == (3, 40)
    bound = method.bind(jax.tree.map(lambda x: 2 * x, trainable), frozen)
    merged, layers = jpeft.merge(bound)["layers"], model.params["layers"]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(merged["attention"]["key"][name], 2 * layers["attention"]["key"][name])
        np.testing.assert_array_equal(merged["attention"]["query"][name], layers["attention"]["query"][name])
    np.testing.assert_array_equal(merged["down"]["kernel"], 2 * layers["down"]["kernel"])
    np.testing.assert_array_equal(merged["down"]["bias"], layers["down"]["bias"])
    assert jpeft.count(bound).trainable == 3 * (24 + 24 + 40)


def test_training_by_the_halves_moves_the_shared_scale_once():
    model, method = make_model("linen-unrolled"), jpeft.IA3(targets="layer_0/attention/value")
    trainable, frozen = start(method, model)

    @jax.jit
    def step(trainable):
        loss = lambda t: jnp.sum(jpeft.lift(model.apply)(method.bind(t, frozen), *model.inputs) ** 2)
        grads = jax.grad(loss)(trainable)
        return optax.apply_updates(trainable, optax.sgd(1e-4).update(grads, optax.sgd(1e-4).init(trainable))[0])

    layer = method.bind(step(trainable), frozen)["layer_0"]["attention"]["value"]
    assert layer["kernel"].scale is layer["bias"].scale and not np.allclose(layer["kernel"].scale, 1, atol=1e-6)


def test_a_model_without_biases_has_a_mask():
    sites = jpeft.find_sites(lambda p, x: x @ p["v"]["kernel"], {"v": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 4)))
    method = jpeft.IA3(targets="key-value")
    bound = method.bind(*method.init(KEY, {"v": {"kernel": jnp.ones((4, 3))}}, sites))
    assert sum(jax.tree.leaves(jpeft.trainable_mask(bound))) == 1


def test_parameters_keep_their_dtype_and_compute_follows_the_activation():
    fn = lambda p, x: x @ p["v"]["kernel"] + p["v"]["bias"]
    params = {"v": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}}
    x, method = jnp.ones((2, 4), jnp.bfloat16), jpeft.IA3(targets="key-value")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    assert trainable.arrays["v/kernel"].dtype == jnp.float32
    bound = method.bind(trainable, frozen)
    assert jpeft.lift(fn)(bound, x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(jpeft.merge(bound))} == {jnp.dtype(jnp.bfloat16)}


def test_experts_have_scales_of_their_own_and_so_have_their_biases():
    fn = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["kernel"]) + p["bias"][:, None]
    params, x = {"kernel": numbers(3, 4, 5), "bias": numbers(3, 5)}, numbers(3, 2, 4)
    method = jpeft.IA3(targets="kernel")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    scale = numbers(3, 5, seed=1)
    trainable = jax.tree.map(lambda _: jnp.asarray(scale), trainable)
    expected = np.asarray(fn(params, x)) * scale[:, None]
    bound = method.bind(trainable, frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), expected, atol=1e-5)
    np.testing.assert_allclose(fn(jpeft.merge(bound), x), expected, atol=1e-5)


# ---- published counts: key and value widths, and the feed-forward width, of every layer ----

LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)
LLAMA3_8B = LLAMA2_7B | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
LLAMA32_3B = LLAMA3_8B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192)


@pytest.mark.parametrize(
    ("config", "expected"), [(LLAMA2_7B, 614_400), (LLAMA3_8B, 524_288), (LLAMA32_3B, 286_720)], ids=str
)
def test_counts_on_public_models_equal_the_published_integers(config, expected):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.IA3()
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == expected


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("plain", {}, "'down' matches no site"),
        ("linen-unrolled", {"feedforward": "dwon"}, "'dwon' matches no site"),
        (
            "plain",
            {"targets": "conv", "feedforward": "conv"},
            r"feedforward='conv' matches conv \(conv\); expected dense",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused(kind, options, message):
    model = make_model(kind)
    with pytest.raises(ValueError, match=message):
        jpeft.IA3(**options).init(KEY, model.params, model.sites)
