"""OFT against HF PEFT, its formula and the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import Case, assert_same_as_peft, convolution, linear, make_case, numbers

import jpeft
import jpeft.models
from jpeft.methods.oft import neumann

KEY = jax.random.key(0)


def start(fn, params, *inputs, **options):
    method = jpeft.OFT(**{"block_size": 3, "targets": lambda site: site.kind in jpeft.OFT.KINDS, **options})
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, *inputs))


def pointwise(torch):
    """A convolution without a window: of others HF PEFT's forward is not what it merges to."""
    torch.manual_seed(0)
    fn = functools.partial(convolution, window_strides=(1, 1))
    return Case(torch.nn.Conv2d(6, 5, 1, padding=1), fn, numbers(2, 6, 3, 3), None)


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [{}, {"neumann": True}, {"neumann": True, "terms": 3}, {"block_share": True}, {"block_size": 0, "r": 3}],
    ids=["cayley", "neumann", "three terms", "shared", "three blocks"],
)
@pytest.mark.parametrize("name", ["linear", "embedding", "pointwise convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name, options):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    if name == "embedding":
        case, options = make_case(name), {**options, "block_size": 5 if options.get("block_size", 5) else 0}
        options |= {"r": 1} if options.get("r") else {}
    else:
        case = make_case(name) if name == "linear" else pointwise(torch)
        options = {"block_size": 3, **options}
    method = jpeft.OFT(**options, targets="kernel")
    config = peft.OFTConfig(
        r=method.r,
        oft_block_size=method.block_size,
        block_share=method.block_share,
        use_cayley_neumann=method.neumann,
        num_cayley_neumann_terms=method.terms,
        target_modules=["0"],
    )
    modules = lambda layer: layer.oft_embedding_R if name == "embedding" else layer.oft_R
    assert_same_as_peft(case, method, config, lambda layer: (modules(layer)["default"].weight,), lambda w: (w.q,))


def test_a_convolution_s_kernel_is_turned_over_window_and_channels_in_float64():
    params = {"kernel": jnp.asarray(numbers(6, 4, 3, 3)), "bias": jnp.asarray(numbers(6))}
    fn = functools.partial(convolution, window_strides=(1, 1))
    x = numbers(2, 4, 5, 5)
    method, trainable, frozen = start(fn, params, x, targets="kernel", block_size=4)
    q = numbers(9, 6) / 2
    bound = method.bind({**trainable, "kernel": trainable["kernel"].replace(q=jnp.asarray(q))}, frozen)
    upper = np.zeros((9, 4, 4))
    upper[:, *np.triu_indices(4, 1)] = q
    skew = upper - upper.swapaxes(1, 2)
    r = (np.eye(4) - skew) @ np.linalg.inv(np.eye(4) + skew)
    kernel = np.einsum("nij,onj->oni", r, np.float64(params["kernel"]).reshape(6, 9, 4)).reshape(6, 4, 3, 3)
    np.testing.assert_allclose(jpeft.merge(bound)["kernel"], kernel, atol=1e-5)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), fn({**params, "kernel": jnp.asarray(kernel)}, x), atol=1e-4)


def test_grouped_rows_of_experts_are_turned_by_their_own_blocks():
    sizes = jnp.array([2, 1, 3])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)
    params, x = {"w": jnp.asarray(numbers(3, 6, 5))}, numbers(6, 6)
    method, trainable, frozen = start(fn, params, x)
    trainable = jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)
    bound = method.bind(trainable, frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), fn(jpeft.merge(bound), x), atol=1e-5)


def test_the_series_comes_to_the_solve():
    q = jnp.asarray(np.triu(numbers(4, 4), 1) / 8)
    q = q - q.T
    exact = jnp.linalg.solve(jnp.eye(4) - q, jnp.eye(4) + q)  # the two commute
    errors = [float(np.abs(neumann(q, n) + np.eye(4) - exact).max()) for n in (2, 3, 5, 7, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    np.testing.assert_array_equal(neumann(q, 3), neumann(q, 4))


def test_the_constrained_blocks_stay_within_their_norm():
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.asarray(numbers(6, 5))}, numbers(3, 6)
    method, trainable, frozen = start(fn, params, x, coft=True, eps=0.2)
    small = jnp.asarray([[0.01, 0.02, 0.03], [1.0, 2.0, 3.0]])
    bound = method.bind({"w": trainable["w"].replace(q=small)}, frozen)
    limit = 0.2 / np.sqrt(2)
    big = np.float64(small[1]) * limit / np.linalg.norm(np.float64(small[1])) / np.sqrt(2)
    free, own, base = start(fn, params, x)
    expected = free.bind({"w": own["w"].replace(q=jnp.stack([small[0], jnp.asarray(big, jnp.float32)]))}, base)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), jpeft.lift(fn)(expected, x), atol=1e-5)
    at_start = jax.grad(lambda t: jnp.sum(jpeft.lift(fn)(method.bind(t, frozen), x) ** 2))(trainable)
    assert np.isfinite(at_start["w"].q).all() and np.any(at_start["w"].q)


def test_dropout_leaves_whole_blocks_out_with_a_key_alone():
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.eye(60)}, jnp.ones((1, 60))
    method, trainable, frozen = start(fn, params, x, dropout=0.5)
    trainable = jax.tree.map(lambda q: q + 1, trainable)
    run = lambda key: np.asarray(jpeft.lift(fn)(method.bind(trainable, frozen, key), x)).reshape(20, 3)
    kept = ~np.isclose(run(KEY), 1).all(1)
    assert 0 < kept.sum() < 20
    np.testing.assert_allclose(run(KEY)[kept], run(None)[kept], atol=1e-6)
    np.testing.assert_array_equal(run(KEY), run(KEY))


def test_the_start_is_exact_in_any_precision_and_dtypes_are_kept():
    fn = lambda p, x: x @ p["w"]
    params = {"w": jnp.asarray(numbers(6, 5), jnp.bfloat16)}
    x = jnp.asarray(numbers(3, 6), jnp.bfloat16)
    method, trainable, frozen = start(fn, params, x)
    assert trainable["w"].q.dtype == jnp.float32
    bound = method.bind(trainable, frozen)
    assert jpeft.lift(fn)(bound, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jpeft.lift(fn)(bound, x), fn(params, x))


LLAMA3_8B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=128256)
LLAMA3_8B |= dict(num_key_value_heads=8, intermediate_size=14336, head_dim=128)
LLAMA32_3B = LLAMA3_8B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192)


@pytest.mark.parametrize(
    ("config", "method", "expected"),
    [
        (LLAMA32_3B, jpeft.OFT(block_size=0, r=32, targets=["q_proj", "v_proj"]), 8_171_520),
        (LLAMA3_8B, jpeft.OFT(), 19_300_352),
        (LLAMA3_8B, jpeft.OFT(block_size=16), 9_338_880),
    ],
    ids=["32 blocks", "blocks of 32", "blocks of 16"],
)
def test_counts_on_public_models_equal_the_published_integers(config, method, expected):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 8, "r": 2}, "expected block_size >= 2 with r=0, .* got block_size=8, r=2"),
        ({"block_size": 0}, "got block_size=0, r=0"),
        ({"block_size": 1}, "got block_size=1, r=0"),
        ({"terms": 1}, "expected terms >= 2, got terms=1"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
        ({"eps": 0.0}, "expected eps > 0, got eps=0.0"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.OFT(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 4}, "kernel: block_size=4 does not divide its 6 inputs"),
        ({"block_size": 0, "r": 4}, "kernel: r=4 does not divide its 6 inputs"),
        ({"block_size": 0, "r": 6}, "into blocks of 2 or more"),
    ],
)
def test_blocks_that_do_not_divide_are_refused_and_never_adjusted(options, message):
    params = {"kernel": jnp.ones((5, 6)), "bias": jnp.ones(5)}
    with pytest.raises(ValueError, match=message):
        start(linear, params, jnp.ones((2, 6)), **options)
