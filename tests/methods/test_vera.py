"""VeRA against HF PEFT, its formula in float64 and the published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import numbers
from peft_folders import assert_same_from_folder

import jpeft
import jpeft.models

KEY = jax.random.key(0)


def two_layers(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS, X = {"up": numbers(6, 10), "down": numbers(10, 4)}, numbers(3, 6)


def start(fn=two_layers, params=PARAMS, x=X, **options):
    method = jpeft.VeRA(**{"rank": 3, **options})
    sites = jpeft.find_sites(fn, params, x)
    return method, *jax.jit(lambda k, p: method.init(k, p, sites))(KEY, params)


def filled(trainable):
    return jax.tree.map(lambda x: jnp.asarray(numbers(*x.shape)), trainable)


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_computes_the_same(rank, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(r=rank, target_modules=["first", "second", "third"], d_initial=0.2)
    assert_same_from_folder(config, tmp_path)


# ---- closed form ----


def test_every_site_uses_its_part_of_one_pair_in_float64():
    method, trainable, frozen = start()
    trainable = filled(trainable)
    a, b = (np.float64(frozen.arrays[name]) for name in "ab")
    assert a.shape == (10, 3) and b.shape == (3, 10)
    merged = {}
    for name, w in PARAMS.items():
        d, out = (np.float64(v) for v in (trainable.tree[name].lambda_d, trainable.tree[name].lambda_b))
        merged[name] = w + a[: w.shape[0]] @ np.diag(d) @ b[:, : w.shape[1]] @ np.diag(out)
    bound = method.bind(trainable, frozen)
    for name, w in jpeft.merge(bound).items():
        np.testing.assert_allclose(w, merged[name], atol=1e-5)
    expected = np.tanh(np.float64(X) @ merged["up"]) @ merged["down"]
    np.testing.assert_allclose(jpeft.lift(two_layers)(bound, X), expected, atol=2e-5)


def test_experts_have_vectors_of_their_own_on_the_same_pair():
    sizes = jnp.array([2, 1, 3])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)
    w, x = numbers(3, 4, 5), numbers(6, 4)
    method, trainable, frozen = start(fn, {"w": w}, x, targets="experts")
    assert trainable.tree["w"].lambda_d.shape == (3, 3) and frozen.arrays["a"].shape == (4, 3)
    bound = method.bind(filled(trainable), frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), fn(jpeft.merge(bound), x), atol=1e-5)


def test_a_fused_kernel_is_cut_with_its_part_of_the_pair():
    def fn(p, x):
        q, k = jnp.split(p["qk"], 2, axis=1)
        return (x @ q) * (x @ k) @ p["down"]

    params = {"qk": numbers(6, 8), "down": numbers(4, 12)}
    method, trainable, frozen = start(fn, params)
    bound = method.bind(filled(trainable), frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, X), fn(jpeft.merge(bound), X), rtol=1e-4, atol=1e-5)


def test_the_backward_pass_keeps_no_activation_as_wide_as_the_outputs():
    """Both vectors scale B: what is kept of a token is A's output, `rank` numbers."""
    fn = lambda p, x: x @ p["w"]
    x = jnp.asarray(numbers(7, 6))
    method, trainable, frozen = start(fn, {"w": numbers(6, 50)}, x)
    _, pull = jax.vjp(lambda t, x: jpeft.lift(fn)(method.bind(t, frozen), x), filled(trainable), x)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull)}
    assert (7, 3) in kept and (7, 50) not in kept


# ---- the start ----


def test_the_projections_are_kaiming_uniform_and_follow_from_the_key():
    params = {"w": np.zeros((200, 300), np.float32)}
    fn, x = lambda p, x: x @ p["w"], np.ones((1, 200), np.float32)
    _, trainable, frozen = start(fn, params, x, rank=50, d_initial=0.25)
    for array, fan_in in ((frozen.arrays["a"], 200), (frozen.arrays["b"], 50)):
        bound = np.sqrt(6 / fan_in)
        assert 0.99 * bound < np.abs(array).max() <= bound and abs(array.std() / bound - 3**-0.5) < 0.01
    assert not np.allclose(frozen.arrays["a"][:50, :50], frozen.arrays["b"][:50, :50])
    assert np.all(trainable.tree["w"].lambda_d == 0.25) and np.all(trainable.tree["w"].lambda_b == 0)
    for a, b in zip(jax.tree.leaves(start(fn, params, x, rank=50)[2]), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_lambda_b_has_a_gradient_at_first():
    method, trainable, frozen = start()
    grads = jax.grad(lambda t: jnp.sum(jpeft.lift(two_layers)(method.bind(t, frozen), X) ** 2))(trainable)
    assert all(np.all(w.lambda_d == 0) and np.any(w.lambda_b != 0) for w in grads.tree.values())


def test_dropout_is_on_while_there_is_a_key():
    method, trainable, frozen = start(dropout=0.5)
    trainable = filled(trainable)
    run = lambda key: jpeft.lift(two_layers)(method.bind(trainable, frozen, key), X)
    assert not np.allclose(run(KEY), run(None)) and np.allclose(run(None), run(None))


def test_sixteen_bit_bases_get_float32_vectors_and_projections():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    method, trainable, frozen = start(params=params, x=jnp.asarray(X, jnp.bfloat16))
    assert {x.dtype.name for x in jax.tree.leaves(trainable)} == {"float32"}
    assert {frozen.arrays[name].dtype.name for name in "ab"} == {"float32"}
    assert jpeft.lift(two_layers)(method.bind(trainable, frozen), jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


# ---- published counts ----

LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)
LLAMA3_8B = LLAMA2_7B | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
LLAMA3_70B = LLAMA3_8B | dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)
LLAMA32_3B = LLAMA3_8B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192)
QWEN3_8B = LLAMA3_8B | dict(
    model_type="qwen3", num_hidden_layers=36, intermediate_size=12288, vocab_size=151936, head_dim=128
)
QUERY_VALUE = {"rank": 256, "targets": ["q_proj", "v_proj"]}
PUBLISHED = {
    "Llama-2-7B": (LLAMA2_7B, QUERY_VALUE, 278_528),
    "Llama-2-7B, all": (LLAMA2_7B, {"rank": 1024}, 1_589_248),
    "Llama-3.1-8B": (LLAMA3_8B, QUERY_VALUE, 180_224),
    "Llama-3.1-70B": (LLAMA3_70B, QUERY_VALUE, 778_240),
    "Llama-3.2-3B": (LLAMA32_3B, QUERY_VALUE, 129_024),
    "Qwen3-8B": (QWEN3_8B, QUERY_VALUE, 202_752),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_on_public_models_equal_the_published_integers(name):
    config, options, published = PUBLISHED[name]
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.VeRA(**options)
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == published


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "whole rank >= 1, got rank=0"),
        ({"rank": 2.0}, "whole rank >= 1, got rank=2.0"),
        ({"d_initial": 0.0}, "expected d_initial != 0"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.VeRA(**options)
