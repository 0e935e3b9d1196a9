"""BOFT against HF PEFT, the butterfly of its paper and the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, linear, make_case, numbers
from small_models import make_model
from test_oft import LLAMA3_8B, LLAMA32_3B

import jpeft
import jpeft.models

KEY = jax.random.key(0)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "convolution", "strided convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft = pytest.importorskip("peft")
    row = (lambda v: v[:, None]) if name == "linear" else (lambda v: v[None])
    assert_same_as_peft(
        make_case(name),
        jpeft.BOFT(boft_block_size=3, scaled=True, targets="kernel"),
        peft.BOFTConfig(boft_block_size=3, target_modules=["0"]),
        lambda layer: (layer.boft_R["default"], layer.boft_s["default"]),
        lambda w: (w.whole, row(w.s)),
    )


def start(params, x, **options):
    method = jpeft.BOFT(**{"boft_block_size": 4, "targets": "kernel", **options})
    return method, *method.init(KEY, params, jpeft.find_sites(linear, params, x))


def test_the_factors_are_the_butterfly_of_hf_peft_in_float64():
    peft = pytest.importorskip("peft")
    permutation = functools.partial(peft.tuners.boft.layer.BOFTLayer.block_butterfly_perm, None)
    params, x = {"kernel": jnp.asarray(numbers(5, 16)), "bias": jnp.asarray(numbers(5))}, numbers(3, 16)
    method, trainable, frozen = start(params, x, boft_n_butterfly_factor=3)
    q = numbers(3, 4, 6) / 2
    bound = method.bind({**trainable, "kernel": trainable["kernel"].replace(q=jnp.asarray(q))}, frozen)
    rotation = np.eye(16)
    for n in range(3):
        upper = np.zeros((4, 4, 4))
        upper[:, *np.triu_indices(4, 1)] = q[n]
        skew = upper - upper.swapaxes(1, 2)
        blocks = np.zeros((16, 16))
        for k, s in enumerate(skew):
            blocks[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = (np.eye(4) - s) @ np.linalg.inv(np.eye(4) + s)
        p = np.eye(16)[permutation(16, 4 // 2**n, 2, 2).numpy()]
        rotation = p @ blocks @ p.T @ rotation
    merged = np.float64(params["kernel"]) @ rotation.T
    np.testing.assert_allclose(jpeft.merge(bound)["kernel"], merged, atol=1e-5)
    np.testing.assert_allclose(jpeft.lift(linear)(bound, x), x @ merged.T + np.float64(params["bias"]), atol=1e-4)
    assert (np.abs(rotation) > 1e-9).mean() > np.abs(np.kron(np.eye(4), np.ones((4, 4)))).mean(), "factors mix blocks"


def test_factors_of_stacked_layers_and_of_a_tied_head():
    model = make_model("linen-scanned")
    method = jpeft.BOFT(boft_block_size=2, boft_n_butterfly_factor=2, targets=".")
    trainable, frozen = jax.jit(lambda k, p: method.init(k, p, model.sites))(KEY, model.params)
    trainable = jax.tree.map(lambda t: t + jnp.asarray(numbers(*t.shape)) / 5, trainable)
    bound = method.bind(trainable, frozen)
    lifted = jax.jit(jpeft.lift(model.apply))(bound, *model.inputs)
    np.testing.assert_allclose(lifted, model.apply(jpeft.merge(bound), *model.inputs), atol=5e-5)


def test_one_factor_is_oft():
    params, x = {"kernel": jnp.asarray(numbers(5, 8)), "bias": jnp.asarray(numbers(5))}, numbers(3, 8)
    method, trainable, frozen = start(params, x)
    q = jnp.asarray(numbers(1, 2, 6))
    ours = method.bind({**trainable, "kernel": trainable["kernel"].replace(q=q)}, frozen)
    oft = jpeft.OFT(block_size=4, targets="kernel")
    trainable, frozen = oft.init(KEY, params, jpeft.find_sites(linear, params, x))
    theirs = oft.bind({**trainable, "kernel": trainable["kernel"].replace(q=q[0])}, frozen)
    np.testing.assert_allclose(jpeft.lift(linear)(ours, x), jpeft.lift(linear)(theirs, x), atol=1e-6)


def test_it_is_exported_as_whole_blocks_that_give_the_same_function():
    params, x = {"kernel": jnp.asarray(numbers(5, 8)), "bias": jnp.asarray(numbers(5))}, numbers(3, 8)
    method, trainable, frozen = start(params, x, boft_n_butterfly_factor=2)
    trainable = jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)
    plain, whole = method.exported(trainable, frozen)
    assert plain.scaled and whole["kernel"].whole.shape == (2, 2, 4, 4) and whole["kernel"].s.shape == (5,)
    run = lambda m, t: jpeft.lift(linear)(m.bind(t, frozen), x)
    np.testing.assert_allclose(run(plain, whole), run(method, trainable), atol=1e-6)
    assert plain.exported(whole, frozen) == (plain, whole)


def test_a_scaled_tied_head_scales_its_inputs():
    fn = lambda p, tokens: p["embed"][tokens] @ p["embed"].T
    params, tokens = {"embed": jnp.asarray(numbers(7, 8))}, jnp.array([1, 3])
    method = jpeft.BOFT(scaled=True, targets="embed")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, tokens))
    trainable = jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)
    bound = method.bind(trainable, frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, tokens), fn(jpeft.merge(bound), tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "method", "expected"),
    [
        (LLAMA32_3B, jpeft.BOFT(scaled=True, targets=["q_proj", "v_proj"]), 802_816),
        (LLAMA3_8B, jpeft.BOFT(boft_block_size=8, boft_n_butterfly_factor=2), 8_716_288),
    ],
    ids=["as HF PEFT", "paper"],
)
def test_counts_on_public_models_equal_the_published_integers(config, method, expected):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_num": 2}, "got boft_block_size=4, boft_block_num=2"),
        ({"boft_block_size": 0}, "got boft_block_size=0, boft_block_num=0"),
        ({"boft_block_size": 1}, "got boft_block_size=1"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor >= 1, got boft_n_butterfly_factor=0"),
        ({"dropout": -0.1}, "0 <= dropout < 1, got dropout=-0.1"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.BOFT(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 5}, "kernel: boft_block_size=5 does not divide its 12 inputs"),
        ({"boft_block_size": 0, "boft_block_num": 12}, "boft_block_num=12 .* into blocks of 2 or more"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "4 blocks of 3 cannot be paired"),
        ({"boft_n_butterfly_factor": 2}, "3 blocks of 4 .* expected an even block size, and blocks in a multiple of 2"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_and_never_adjusted(options, message):
    with pytest.raises(ValueError, match=message):
        start({"kernel": jnp.ones((5, 12)), "bias": jnp.ones(5)}, jnp.ones((2, 12)), **options)
