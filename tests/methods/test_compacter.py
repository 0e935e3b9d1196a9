"""Compacter against the `adapters` package, the Kronecker products themselves, the published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters_golden import assert_same_as_adapters
from peft_cases import numbers
from small_models import make_model
from test_houlsby import BERT_BASE, KEY, count

import jpeft

T5_BASE = dict(model_type="t5", d_model=768, d_kv=64, num_heads=12, num_layers=12, d_ff=3072, vocab_size=32128)
SELF_ATTENTION = r"SelfAttention/o/"


def fields(get):
    """Our fields from the package's tensors."""
    layer = lambda name, to: {
        f"{to}_s": get(f"adapters.a.adapter_{name}.W_left"),
        f"{to}_t": get(f"adapters.a.adapter_{name}.W_right"),
        f"{to}_bias": get(f"adapters.a.adapter_{name}.b"),
    }
    return layer("down.0", "down") | layer("up", "up")


def test_the_same_numbers_give_what_the_adapters_package_gives():
    shared = lambda get: {"slow": get("shared_parameters.a.phm_rule")}
    assert_same_as_adapters("compacter", jpeft.Compacter(reduction=2), fields, shared)


@pytest.mark.parametrize("rank", [1, 2])
def test_its_layers_are_sums_of_kronecker_products(rank):
    layer = lambda p, x: x + (x @ p["down"]["kernel"] + p["down"]["bias"])
    params, x = {"down": {"kernel": numbers(12, 12), "bias": numbers(12)}}, numbers(3, 12)
    method = jpeft.Compacter(targets="down", bottleneck=6, phm_dim=3, phm_rank=rank, activation="tanh")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(layer, params, x))
    trainable = jax.tree.map(lambda t: numbers(*t.shape, seed=t.size) * 0.5, trainable)
    slow, w = trainable.arrays["slow"], trainable.tree["down"]["bias"]
    kernel = lambda s, t: sum(np.kron(a, b) for a, b in zip(slow, s @ t, strict=True))
    y = x @ params["down"]["kernel"] + params["down"]["bias"]
    update = np.tanh(y @ kernel(w.down_s, w.down_t) + w.down_bias) @ kernel(w.up_s, w.up_t) + w.up_bias
    out = jpeft.lift(layer)(method.bind(trainable, frozen), x)
    np.testing.assert_allclose(out, x + y + update, atol=1e-4)


def test_no_kernel_is_formed_and_no_layer_has_slow_weights_of_its_own():
    model = make_model("linen-scanned")
    method = jpeft.Compacter(targets="down", bottleneck=8)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    w = trainable.tree["layers"]["down"]["bias"]
    assert trainable.arrays["slow"].shape == (4, 4, 4) and w.slow is None
    assert w.down_s.shape == (3, 4, 6, 1) and w.down_t.shape == (3, 4, 1, 2)
    assert not np.allclose(w.down_s[0], w.down_s[1])
    loss = lambda t: jnp.sum(jnp.sin(jpeft.lift(model.apply)(method.bind(t, frozen), *model.inputs)))
    text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert "f32[24,40]" in text and "f32[24,8]" not in text and "f32[8,24]" not in text


def test_it_starts_at_the_pretrained_function_to_rounding():
    model = make_model("nnx")
    method = jpeft.Compacter(reduction=6)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    assert 0.5e-4 < np.std(trainable.arrays["slow"]) < 2e-4
    bound = (6 / (6 + 1)) ** 0.5
    assert 0.8 * bound < np.abs(trainable.tree["layers"]["down"]["bias"].down_s).max() <= bound
    out = jpeft.lift(model.apply)(method.bind(trainable, frozen), *model.inputs)
    np.testing.assert_allclose(out, model.apply(model.params, *model.inputs), atol=1e-5)
    assert method.NO_OP_AT_START and not jpeft.Compacter(phm_init_range=0.1).NO_OP_AT_START


def test_training_moves_the_slow_weights_once_for_all():
    model, method = make_model("linen-unrolled"), jpeft.Compacter(reduction=6, phm_init_range=0.1)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    loss = lambda t: jnp.mean(jpeft.lift(model.apply)(method.bind(t, frozen), *model.inputs) ** 2)
    grads = jax.jit(jax.grad(loss))(trainable)
    moved = optax.apply_updates(trainable, jax.tree.map(lambda g: -0.1 * g, grads))
    bound = method.bind(moved, frozen)
    slow = [bound[f"layer_{n}"]["down"]["bias"].slow for n in range(3)]
    assert slow[0] is slow[1] is slow[2] and not np.allclose(slow[0], trainable.arrays["slow"], atol=1e-6)


# ---- published counts ----


@pytest.mark.parametrize(
    ("targets", "expected"),
    [((SELF_ATTENTION, "down"), 161_728), ("down", 104_704)],
    ids=["Compacter", "Compacter++"],
)
def test_with_the_norms_the_counts_are_the_papers(targets, expected):
    both = jpeft.chain(jpeft.NormTuning(), jpeft.Compacter(targets=targets))
    assert count(both, T5_BASE, streams=2) == expected


def test_counts_on_bert():
    assert count(jpeft.Compacter(), BERT_BASE) == 24 * (2 * (768 + 24) + 24 + 768) + 4**3


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phm_dim": 0}, "expected a whole phm_dim >= 1, got phm_dim=0"),
        ({"phm_rank": 1.5}, "expected a whole phm_rank >= 1, got phm_rank=1.5"),
        ({"phm_init_range": 0}, "expected phm_init_range > 0"),
        ({"reduction": 0}, "expected a whole reduction >= 1"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.Compacter(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "its 24 outputs are not divisible by reduction=32"),
        ({"bottleneck": 6}, "phm_dim=4 does not divide both its 24 outputs and the bottleneck of 6"),
        ({"bottleneck": 10, "phm_dim": 5}, "phm_dim=5 does not divide both its 24 outputs and the bottleneck of 10"),
        ({"bottleneck": 8, "phm_rank": 3}, "phm_rank=3 is above 2, the least of 24/n and 8/n"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    model = make_model("linen-scanned")
    with pytest.raises(ValueError, match=message):
        jpeft.Compacter(**options).init(KEY, model.params, model.sites)
