"""LoKr against HF PEFT, its structure, starts, counts and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import assert_same_as_peft, convolution, make_case, numbers

import jpeft
import jpeft.models

KEY = jax.random.key(0)
LINEAR = {
    "W1 full, W2 of rank 1": {"rank": 1},
    "both of rank 1": {"rank": 1, "decompose_both": True},
    "both full": {"rank": 4},
    "a given factor": {"rank": 1, "decompose_factor": 2},
}


def start(fn, params, x, **options):
    method = jpeft.LoKr(**{"rank": 1, "targets": "kernel", **options})
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, x))


def filled(trainable):
    return jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)


def fields(w):
    return [name for name in w.FIELDS if getattr(w, name) is not None]


def config_of(peft, options, **more):
    renamed = {{"rank": "r", "effective_conv": "use_effective_conv2d"}.get(k, k): v for k, v in options.items()}
    return peft.LoKrConfig(alpha=3, target_modules=["0"], **renamed, **more)


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft, options = pytest.importorskip("peft"), LINEAR[name]
    method = jpeft.LoKr(alpha=3.0, targets="kernel", **options)
    case = make_case("wide linear")
    names = fields(method.init(KEY, case.params, jpeft.find_sites(case.fn, case.params, case.x))[0]["kernel"])
    assert_same_as_peft(
        case,
        method,
        config_of(peft, options),
        lambda layer: tuple(getattr(layer, f"lokr_{name}")["default"] for name in names),
        lambda w: tuple(getattr(w, name).T for name in names),
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", ["W2 of rank 1", "W2 full", "W2 that knows the window"])
@pytest.mark.filterwarnings("ignore")
def test_convolutions_are_peft_s(name):
    peft = pytest.importorskip("peft")
    options = {"rank": 4 if name == "W2 full" else 1, "effective_conv": name == "W2 that knows the window"}
    names, ours = {
        "W2 of rank 1": (("w1", "w2_a", "w2_b"), lambda w: (w.w1.T, w.w2_a.T, w.w2_b.T)),
        "W2 full": (("w1", "w2"), lambda w: (w.w1.T, w.w2.T.reshape(3, 2, 3, 3))),
        "W2 that knows the window": (
            ("w1", "w2_a", "w2_b", "t2"),
            lambda w: (w.w1.T, w.w2_a, w.w2_b.T, w.t2.reshape(1, 1, 3, 3)),
        ),
    }[name]
    assert_same_as_peft(
        make_case("convolution"),
        jpeft.LoKr(alpha=3.0, targets="kernel", **options),
        config_of(peft, options),
        lambda layer: tuple(getattr(layer, f"lokr_{name}")["default"] for name in names),
        ours,
    )


# ---- what it computes ----

WAYS = {
    "product": (lambda p, x: x @ p["kernel"], numbers(12, 8), numbers(2, 12)),
    "transposed": (lambda p, x: x @ p["kernel"].T, numbers(12, 8), numbers(2, 8)),
    "several axes": (
        lambda p, x: jnp.einsum("bihd,ihdo->bo", x, p["kernel"]),
        numbers(2, 2, 3, 8),
        numbers(2, 2, 2, 3),
    ),
    "rows": (lambda p, x: p["kernel"][x], numbers(12, 8), jnp.array([[0, 11], [5, 6]])),
    "columns": (lambda p, x: p["kernel"].T[x], numbers(12, 8), jnp.array([7, 2])),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["kernel"]), numbers(2, 12, 8), numbers(2, 3, 12)),
    "ragged": (lambda p, x: lax.ragged_dot(x, p["kernel"], jnp.array([2, 1])), numbers(2, 12, 8), numbers(3, 12)),
    "grouped convolution": (
        lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", feature_group_count=2),
        numbers(8, 6, 3),
        numbers(1, 12, 5),
    ),
}


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"rank": 8}], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_every_operation_is_that_of_the_merged_weight(name, options):
    fn, w, x = WAYS[name]
    method, trainable, frozen = start(fn, {"kernel": jnp.asarray(w)}, x, **options)
    bound = method.bind(filled(trainable), frozen)
    merged = jpeft.merge(bound)
    assert not np.allclose(merged["kernel"], w)
    np.testing.assert_allclose(jax.jit(jpeft.lift(fn))(bound, x), fn(merged, x), atol=1e-4, rtol=1e-5)


def test_the_update_is_numpy_s_kronecker_product():
    method, trainable, frozen = start(lambda p, x: x @ p["kernel"], {"kernel": jnp.zeros((12, 8))}, jnp.ones((1, 12)))
    trainable = filled(trainable)
    w = trainable["kernel"]
    assert (w.w1.shape, w.w2_b.shape, w.w2_a.shape) == ((3, 2), (4, 1), (1, 4))
    merged = jpeft.merge(method.bind(trainable, frozen))["kernel"]
    np.testing.assert_allclose(merged, 8 * np.kron(w.w1, np.asarray(w.w2_b) @ np.asarray(w.w2_a)), rtol=1e-5)


def test_a_product_multiplies_by_the_small_factors_alone():
    fn, x = lambda p, x: x @ p["kernel"], jnp.ones((2, 1024))
    method, trainable, frozen = start(fn, {"kernel": jnp.zeros((1024, 1024))}, x, rank=4)
    flops = lambda tree: jax.jit(jpeft.lift(fn)).lower(tree, x).compile().cost_analysis()["flops"]
    assert flops(method.bind(trainable, frozen)) < 1.1 * flops({"kernel": jnp.zeros((1024, 1024))})


# ---- starts and counts ----


@pytest.mark.parametrize("both", [False, True])
def test_one_factor_starts_at_zero(both):
    fn, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.zeros((1024, 1024))}, jnp.ones((1, 1024))
    options = {"rank": 4, "decompose_both": both}
    lycoris = start(fn, params, x, **options)[1]["kernel"]
    peft = start(fn, params, x, zero="w1", **options)[1]["kernel"]
    at_zero = lambda w: [name for name in fields(w) if not getattr(w, name).any()]
    assert at_zero(lycoris) == ["w2_b"] and at_zero(peft) == ["w1_a" if both else "w1"]
    bound = lambda f, fan_in: 0.9 / np.sqrt(fan_in) < np.abs(f).max() <= 1 / np.sqrt(fan_in)
    assert bound(peft.w2_b, 32) and bound(peft.w2_a, 4)
    assert bound(lycoris.w1_b, 32) if both else bound(lycoris.w1, 32)


LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)
LLAMA3_8B = LLAMA2_7B | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
LLAMA32_3B = LLAMA3_8B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
LLAMA32_3B |= dict(intermediate_size=8192, tie_word_embeddings=True)
PUBLISHED = {
    "Llama-2-7B": (LLAMA2_7B, {"rank": 8}, 327_680),
    "Llama-3.1-8B": (LLAMA3_8B, {"rank": 8}, 253_952),
    "Llama-3.2-3B": (LLAMA32_3B, {"rank": 32, "decompose_factor": 4}, 2_294_656),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_on_public_models_equal_the_published_integers(name):
    config, options, published = PUBLISHED[name]
    apply, shapes = jpeft.models.abstract(config)
    method = jpeft.LoKr(targets=["q_proj", "v_proj"], **options)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    trainable, _ = jax.eval_shape(lambda key, p: method.init(key, p, sites), KEY, shapes)
    assert jpeft.count(trainable).trainable == published


@pytest.mark.parametrize(("size", "sides"), [(4096, (64, 64)), (768, (24, 32)), (11008, (86, 128)), (127, (1, 127))])
def test_sides_are_as_square_as_they_can_be(size, sides):
    assert jpeft.LoKr().sides(size) == sides
    assert jpeft.LoKr(decompose_factor=4).sides(4096) == (4, 1024)


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "expected rank >= 1, got rank=0"),
        ({"decompose_factor": 0}, "decompose_factor >= 1, or -1, got decompose_factor=0"),
        ({"zero": "w3"}, "expected zero in .*'w1'.*, got 'w3'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoKr(**options)


def test_sites_are_checked_before_anything_is_made():
    fn, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((12, 10))}, jnp.ones((1, 12))
    with pytest.raises(ValueError, match="kernel: decompose_factor 4 does not divide its 12 inputs and 10 outputs"):
        start(fn, params, x, decompose_factor=4)
    with pytest.raises(ValueError, match="effective_conv=True has no effect: no convolution"):
        start(fn, params, x, effective_conv=True)
    params = {"kernel": jnp.ones((6, 4, 3, 3)), "bias": jnp.zeros(6)}
    fn = lambda p, x: convolution(p, x, window_strides=(1, 1))
    with pytest.raises(ValueError, match="kernel: decompose_factor 3 does not divide its 4 input channels"):
        start(fn, params, jnp.ones((1, 4, 5, 5)), decompose_factor=3)
