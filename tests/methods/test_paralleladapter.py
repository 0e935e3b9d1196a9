"""Parallel adapters against the `adapters` package and the closed form: what they read, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters_golden import assert_same_as_adapters, bottleneck
from peft_cases import numbers
from small_models import make_model
from test_houlsby import BERT_BASE, KEY, count

import jpeft


def test_the_same_numbers_give_what_the_adapters_package_gives():
    assert_same_as_adapters("parallel", jpeft.ParallelAdapter(), bottleneck)


# ---- what it reads ----


def gated(p, x):
    """A pre-norm gated layer in a remat, without biases."""

    def inside(x):
        h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
        return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    return x + jax.checkpoint(inside)(x)


def experts(p, x):
    """Two experts with biases, each for its own rows."""
    h = jnp.tanh(jnp.einsum("ebd,edf->ebf", x, p["gate"]))
    return x + (jnp.einsum("ebf,efd->ebd", h, p["down"]) + p["bias"][:, None])


def attending(p, x):
    """Attention over the tokens in plain steps, with one head."""
    query, key, value = (x @ p[name] for name in ("query", "key", "value"))
    weights = jax.nn.softmax(query @ key.mT, -1)
    return x + (weights @ value @ p["o"]["kernel"] + p["o"]["bias"])


def called(p, x):
    """The same by `jpeft.attention`."""
    query, key, value = ((x @ p[name])[..., None, :] for name in ("query", "key", "value"))
    return x + (jpeft.attention(query, key, value, scale=1.0)[..., 0, :] @ p["o"]["kernel"] + p["o"]["bias"])


ATTENTION = {name: numbers(6, 6, seed=n) for n, name in enumerate(("query", "key", "value"))}
ATTENTION |= {"o": {"kernel": numbers(6, 6, seed=3), "bias": numbers(6)}}


@pytest.mark.parametrize(
    ("fn", "params", "targets"),
    [
        (gated, {"gate": numbers(6, 9), "up": numbers(6, 9, seed=1), "down": numbers(9, 6)}, "down"),
        (experts, {"gate": numbers(2, 6, 9), "down": numbers(2, 9, 6), "bias": numbers(2, 6)}, "^down"),
        (attending, ATTENTION, "attention-output"),
        (called, ATTENTION, "attention-output"),
    ],
    ids=["gated", "experts", "attention", "attention call"],
)
def test_it_adds_to_the_sublayers_output_what_it_makes_of_the_sublayers_input(fn, params, targets):
    x = numbers(2, 4, 6)
    method = jpeft.ParallelAdapter(targets=targets, bottleneck=3)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    trainable = jax.tree.map(lambda t: t + 0.2, trainable)
    (w,) = [w for w in jax.tree.leaves(trainable, is_leaf=lambda w: hasattr(w, "down")) if hasattr(w, "down")]
    h = x / np.sqrt(np.mean(x * x, -1, keepdims=True)) if fn is gated else x
    down, up = (np.asarray(t, np.float64) for t in (w.down, w.up))
    down_bias, up_bias = (b[:, None] if fn is experts else b for b in (w.down_bias, w.up_bias))
    added = np.maximum(h @ down + down_bias, 0) @ up + up_bias
    expected = fn(params, x) + 4 * np.asarray(added)
    np.testing.assert_allclose(jpeft.lift(fn)(method.bind(trainable, frozen), x), expected, atol=2e-4)


def test_two_in_a_chain_read_the_same_input():
    fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
    params, x = {"up": numbers(6, 9), "down": numbers(9, 6)}, numbers(2, 4, 6)
    one = jpeft.ParallelAdapter(bottleneck=3, init_weights="bert", init_std=0.5)
    both = jpeft.chain(one, one)
    trainable, frozen = both.init(KEY, params, jpeft.find_sites(fn, params, x))
    added = sum(np.maximum(x @ np.asarray(t["down"].down), 0) @ np.asarray(t["down"].up) for t in trainable)
    np.testing.assert_allclose(jpeft.lift(fn)(both.bind(trainable, frozen), x), fn(params, x) + 4 * added, atol=1e-4)


def test_it_starts_at_the_pretrained_function_with_numbers_of_every_layers_own():
    model = make_model("linen-scanned")
    method = jpeft.ParallelAdapter()
    assert list(method.chosen(model.sites)) == ["layers/down/bias", "layers/up/kernel"]
    trainable, frozen = method.init(KEY, model.params, model.sites)
    w = trainable["layers"]["down"]["bias"]
    assert w.down.shape == (3, 24, 12) and w.up.shape == (3, 12, 24) and not np.any(w.up)
    assert not np.allclose(w.down[0], w.down[1]) and np.abs(w.down).max() <= 24**-0.5
    assert method.NO_OP_AT_START and not jpeft.ParallelAdapter(init_weights="bert").NO_OP_AT_START
    assert jpeft.count(method.bind(trainable, frozen)).trainable == 3 * (2 * 24 * 12 + 12 + 24)


def test_counts_on_public_models():
    assert count(jpeft.ParallelAdapter(), BERT_BASE) == 12 * (2 * 768 * 384 + 384 + 768)
    assert count(jpeft.ParallelAdapter(targets="attention-output"), BERT_BASE) == 12 * (2 * 768 * 384 + 384 + 768)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "linen-scanned",
            {"reduction": 16},
            "the 24 inputs of layers/up/kernel are not divisible by reduction=16; write",
        ),
        (
            "nnx",
            {"targets": "layers/attention/query"},
            "query/bias: no kernel of as many layers is known that makes its",
        ),
        ("plain", {"targets": ["gate", "expert"]}, "gate: another target's sublayer begins here; leave it out"),
    ],
)
def test_what_cannot_be_adapted_is_refused(kind, fields, message):
    model = make_model(kind)
    with pytest.raises(ValueError, match=message):
        jpeft.ParallelAdapter(**fields).init(KEY, model.params, model.sites)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda p, x: (x @ p["up"] @ jnp.eye(9)).reshape(8, 9) @ p["down"],
            r"comes as \(2, 4, 6\) for outputs of \(8, 6\)",
        ),
        (lambda p, x: x[..., :1] * jnp.ones(9) @ p["down"], "it does not get there"),
    ],
    ids=["reshaped", "absent"],
)
def test_a_function_in_which_the_input_does_not_arrive_is_refused(other, message):
    params, x = {"up": numbers(6, 9), "down": numbers(9, 6)}, numbers(2, 4, 6)
    sites = jpeft.find_sites(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, x)
    method = jpeft.ParallelAdapter(bottleneck=3)
    with pytest.raises(ValueError, match=message):
        jpeft.lift(other)(method.bind(*method.init(KEY, params, sites)), x)
