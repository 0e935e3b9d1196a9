import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_llama import CONFIG

import jpeft
from jpeft import models
from jpeft.train import step as step_module
from jpeft.train.optimizer import adamw, schedule
from jpeft.train.step import init_state, loss_sum, make_evaluation, make_step

METHOD = jpeft.LoRA(rank=2, targets=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def model():
    apply, params = models.init(jax.random.key(0), CONFIG)
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    return apply, params, METHOD.init(jax.random.key(1), params, sites)


def batch_of(rows=4, length=8, seed=0):
    random = np.random.default_rng(seed)
    segment_ids = np.repeat([[1, 1, 1, 2, 2, 2, 2, 0]], rows, 0)
    return {
        "tokens": random.integers(0, 250, (rows, length)).astype(np.int32),
        "targets": random.integers(0, 250, (rows, length)).astype(np.int32),
        "weights": (random.random((rows, length)) < 0.5).astype(np.float32) * (segment_ids > 0),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": np.repeat([[0, 1, 2, 0, 1, 2, 3, 0]], rows, 0).astype(np.int32),
    }


def test_loss_is_the_weighted_sum_of_the_packed_examples_apart(model):
    apply, params, _ = model
    batch = batch_of(rows=1)
    total = 0.0
    for part in (slice(0, 3), slice(3, 7)):
        log_p = jax.nn.log_softmax(apply(params, jnp.asarray(batch["tokens"][:, part])))
        picked = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"][:, part, None]), -1)[..., 0]
        total -= float((picked * batch["weights"][:, part]).sum())
    np.testing.assert_allclose(loss_sum(apply, params, batch), total, rtol=1e-5)


def test_chunks_change_neither_loss_nor_gradient(model, monkeypatch):
    apply, _, (trainable, frozen) = model
    batch = batch_of()
    loss = lambda t: loss_sum(apply, METHOD.bind(t, frozen), batch)
    whole = jax.value_and_grad(loss)(trainable)
    monkeypatch.setattr(step_module, "CHUNK", 4 * 2 * CONFIG["vocab_size"])
    cut = jax.value_and_grad(loss)(trainable)
    assert "scan" in str(jax.make_jaxpr(loss)(trainable)) and f"4,2,{CONFIG['vocab_size']}" in str(
        jax.make_jaxpr(loss)(trainable)
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_microbatches_give_the_update_of_the_whole_batch(model):
    apply, _, (trainable, frozen) = model
    batch = batch_of()
    assert len(set(batch["weights"].sum(1).tolist())) > 1  # rows of unlike numbers of learned tokens
    results = []
    for accumulation in (1, 4):
        tx = optax.sgd(1.0)
        step = make_step(apply, METHOD, tx, accumulation)
        results.append(step(init_state(trainable, tx), frozen, batch, jax.random.key(0)))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_step_that_is_not_finite_leaves_the_state(model, offloaded):
    apply, _, (trainable, frozen) = model
    tx = adamw(1e-2, 10, in_host=offloaded)
    step = make_step(apply, METHOD, tx)
    good, metrics = step(init_state(trainable, tx), frozen, batch_of(), jax.random.key(0))
    assert metrics["finite"] and int(good.step) == 1
    before = jax.tree.map(np.asarray, good)
    bad = batch_of() | {"weights": np.full((4, 8), np.nan, np.float32)}
    after, metrics = step(good, frozen, bad, jax.random.key(0))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(after.optimizer_state) if x.ndim} == {
        "pinned_host" if offloaded else "device"
    }


def test_the_penalty_and_the_optimizer_of_the_method_are_used(model):
    apply, _, (trainable, frozen) = model

    class Pulled(jpeft.LoRA):
        def penalty(self, trainable):
            return 0.5 * sum((x**2).sum() for x in jax.tree.leaves(trainable))

    batch = batch_of() | {"weights": np.zeros((4, 8), np.float32)}
    tx = optax.sgd(1.0)
    state, _ = make_step(apply, Pulled(), tx)(init_state(trainable, tx), frozen, batch, jax.random.key(0))
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.trainable))


def test_evaluation_is_the_mean_over_learned_tokens_of_all_batches(model):
    apply, params, _ = model
    some = [batch_of(seed=0), batch_of(seed=1)]
    wanted = sum(float(loss_sum(apply, params, b)) for b in some) / sum(b["weights"].sum() for b in some)
    np.testing.assert_allclose(make_evaluation(apply)(params, some), wanted, rtol=1e-5)


def test_the_rate_rises_falls_and_never_is_zero():
    rates = [float(schedule(1.0, 20, 0.2)(i)) for i in range(20)]
    assert 0 < rates[0] < rates[1] < rates[4] == max(rates) == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] >= 0.1
    assert float(schedule(1.0, 1, 0.0)(0)) == 1.0 and float(schedule(1.0, 1, 0.9)(0)) == 1.0
