"""RandLoRA against HF PEFT, the paper's sum in float64 and the published count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import numbers
from peft_folders import assert_same_from_folder

import jpeft
import jpeft.models

KEY = jax.random.key(0)


def two_layers(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS, X = {"up": numbers(6, 10), "down": numbers(10, 4)}, numbers(3, 6)


def start(**options):
    method = jpeft.RandLoRA(**{"rank": 2, "alpha": 3.0, **options})
    sites = jpeft.find_sites(two_layers, PARAMS, X)
    return method, *jax.jit(lambda k, p: method.init(k, p, sites))(KEY, PARAMS)


def filled(trainable):
    return jax.tree.map(lambda x: jnp.asarray(numbers(*x.shape)), trainable)


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_computes_the_same(options, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=3, randlora_alpha=2, target_modules=["first", "second", "third"], **options)
    assert_same_from_folder(config, tmp_path)


# ---- closed form ----


def test_the_update_is_the_papers_sum_in_float64():
    method, trainable, frozen = start()
    trainable = filled(trainable)
    a, b = (np.float64(frozen.arrays[name]) for name in "ab")
    assert a.shape == (2, 10) and b.shape == (10, 5, 2)
    merged = jpeft.merge(method.bind(trainable, frozen))
    for name, w in PARAMS.items():
        small, large = min(w.shape), max(w.shape)
        n = small // 2
        diagonals = trainable.tree[name]
        columns = b[:large, :n].reshape(large, 2 * n)
        update = sum(
            columns[:, [j, n + j]]
            @ np.diag(np.float64(diagonals.lambda_[j]))
            @ a[:, :small]
            @ np.diag(np.float64(diagonals.gamma[j]))
            for j in range(n)
        )
        assert np.linalg.matrix_rank(update) == small, "full rank"
        np.testing.assert_allclose(merged[name], w + 1.5 * (update.T if name == "up" else update), atol=1e-4)
    lifted = jpeft.lift(two_layers)(method.bind(trainable, frozen), X)
    np.testing.assert_allclose(lifted, two_layers(merged, X), rtol=1e-4, atol=1e-4)


def test_a_rank_that_does_not_divide_has_one_more_basis():
    _, trainable, _ = start(rank=4, targets="up")
    assert trainable.tree["up"].lambda_.shape == (2, 4) and trainable.tree["up"].gamma.shape == (2, 6)


# ---- the start ----


@pytest.mark.parametrize("bases", ["uniform", "sparse", "very_sparse"])
def test_the_bases_have_unit_variance_and_their_share_of_zeros(bases):
    params = {"w": np.zeros((400, 500), np.float32)}
    fn, x = lambda p, x: x @ p["w"], np.ones((1, 400), np.float32)
    method = jpeft.RandLoRA(rank=100, bases=bases)
    _, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    filled_share = {"uniform": 1.0, "sparse": 1 / 3, "very_sparse": 1 / 20}[bases]
    for array in frozen.arrays.values():
        assert abs(array.mean()) < 0.03 and abs(array.std() - 1) < 0.03
        assert abs((array != 0).mean() - filled_share) < 0.01
        assert len(np.unique(array)) == 3 or bases == "uniform"
    assert np.abs(frozen.arrays["b"]).max() <= max(3**0.5, 20**0.5 * (bases == "very_sparse")) + 1e-6


def test_lambda_starts_at_zero_and_gamma_at_one_over_its_longer_side():
    method, trainable, frozen = start(rank=1, targets="up")
    assert np.all(trainable.tree["up"].lambda_ == 0) and np.all(trainable.tree["up"].gamma == np.float32(1 / 6))
    grads = jax.grad(lambda t: jnp.sum(jpeft.lift(two_layers)(method.bind(t, frozen), X) ** 2))(trainable)
    assert np.any(grads.tree["up"].lambda_ != 0) and np.all(grads.tree["up"].gamma == 0)


def test_dropout_is_on_while_there_is_a_key():
    method, trainable, frozen = start(dropout=0.5)
    trainable = filled(trainable)
    run = lambda key: jpeft.lift(two_layers)(method.bind(trainable, frozen, key), X)
    assert not np.allclose(run(KEY), run(None))


# ---- published counts ----


def test_the_count_on_a_public_model_equals_the_published_integer():
    config = dict(model_type="llama", hidden_size=3072, num_hidden_layers=28, num_attention_heads=24)
    config |= dict(num_key_value_heads=8, intermediate_size=8192, vocab_size=128256)
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.RandLoRA(targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == 9_289_728


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "whole rank >= 1, got rank=0"),
        ({"bases": "normal"}, "expected bases in .*'very_sparse'.*, got 'normal'"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.RandLoRA(**options)


def test_sites_are_checked_before_anything_is_made():
    with pytest.raises(ValueError, match=r"down: rank 5 is above min\(in, out\) = min\(10, 4\)"):
        start(rank=5)
