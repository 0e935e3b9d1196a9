"""VB-LoRA against HF PEFT, its formula in float64 and the published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import numbers
from peft_folders import assert_same_from_folder

import jpeft
import jpeft.models

KEY = jax.random.key(0)
SMALL = {"rank": 2, "num_vectors": 5, "vector_length": 4, "topk": 3}


def two_layers(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS, X = {"up": numbers(8, 12), "down": numbers(12, 4)}, numbers(3, 8)


def start(**options):
    method = jpeft.VBLoRA(**{**SMALL, **options})
    sites = jpeft.find_sites(two_layers, PARAMS, X)
    return method, *jax.jit(lambda k, p: method.init(k, p, sites))(KEY, PARAMS)


def filled(trainable):
    return jax.tree.map(lambda x: jnp.asarray(numbers(*x.shape)), trainable)


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_computes_the_same(topk, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"num_vectors": 5, "vector_length": 4, "topk": topk, "target_modules": ["first", "second", "third"]}
    assert_same_from_folder(peft.VBLoRAConfig(r=2, **options), tmp_path)


# ---- closed form ----


def test_sub_vectors_are_softmax_mixtures_of_the_largest_logits_in_float64():
    method, trainable, frozen = start()
    trainable = filled(trainable)
    bank = np.float64(trainable.arrays["bank"])

    def mixed(sigma):
        keep = np.argsort(sigma)[-3:]
        share = np.exp(sigma[keep]) / np.exp(sigma[keep]).sum()
        return share @ bank[keep]

    for name, w in PARAMS.items():
        logits = trainable.tree[name]
        a = np.stack([np.concatenate([mixed(s) for s in row]) for row in np.float64(logits.logits_a)], axis=1)
        b = np.concatenate([np.stack([mixed(s) for s in part]) for part in np.float64(logits.logits_b)], axis=1)
        assert a.shape == (w.shape[0], 2) and b.shape == (2, w.shape[1])
        merged = jpeft.merge(method.bind(trainable, frozen))[name]
        np.testing.assert_allclose(merged, w + a @ b, atol=1e-5)


def test_vectors_and_logits_that_are_not_chosen_have_no_gradient():
    method, trainable, frozen = start(num_vectors=40, topk=1, targets="up")
    grads = jax.grad(lambda t: jnp.sum(jpeft.lift(two_layers)(method.bind(t, frozen), X) ** 2))(trainable)
    chosen = {int(k) for logits in jax.tree.leaves(trainable.tree["up"]) for k in logits.argmax(-1).ravel()}
    moved = {k for k in range(40) if np.any(grads.arrays["bank"][k] != 0)}
    assert moved == chosen != set(range(40))
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads.tree)), "one choice alone has nothing to weigh"


# ---- the start ----


def test_it_starts_near_the_pretrained_function():
    method, trainable, frozen = start(num_vectors=200, targets="up", bank_bound=0.02, logits_std=0.1)
    bank, logits = trainable.arrays["bank"], jax.tree.leaves(trainable.tree["up"])
    assert 0.019 < np.abs(bank).max() <= 0.02
    assert abs(np.concatenate([x.ravel() for x in logits]).std() - 0.1) < 0.01
    update = jpeft.merge(method.bind(trainable, frozen))["up"] - PARAMS["up"]
    assert 1e-6 < np.abs(update).max() < 2 * 0.02**2


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
    method = jpeft.VBLoRA(targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == 1_212_416


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "whole rank >= 1, got rank=0"),
        ({"num_vectors": 0}, "whole num_vectors >= 1, got num_vectors=0"),
        ({"vector_length": 2.5}, "whole vector_length >= 1, got vector_length=2.5"),
        ({"topk": 0}, "whole topk >= 1, got topk=0"),
        ({"topk": 6, "num_vectors": 5}, "topk <= num_vectors, got topk=6, num_vectors=5"),
        ({"bank_bound": 0.0}, "expected bank_bound > 0, got bank_bound=0.0"),
        ({"logits_std": -1.0}, "expected logits_std > 0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.VBLoRA(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, r"down: rank 5 is above min\(in, out\) = min\(12, 4\)"),
        ({"vector_length": 12}, "up: vector_length 12 does not divide its 8 inputs"),
        ({"vector_length": 8}, "up: vector_length 8 does not divide its 12 outputs"),
    ],
)
def test_sites_are_checked_before_anything_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)
