"""Attention against its definition, as a named call, and in the place of Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jpeft.core.attention import MARKER, attention, attention_with_lse


def inputs(q_len=5, kv_len=7, heads=4, kv_heads=2, batch=(2,)):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (*batch, q_len, heads, 8)),
        jax.random.normal(keys[1], (*batch, kv_len, kv_heads, 8)),
        jax.random.normal(keys[2], (*batch, kv_len, kv_heads, 8)),
    )


@jax.jit
def definition(q, k, v, mask=True, bias=0.0, scale=8**-0.5):
    group = q.shape[-2] // k.shape[-2]
    k, v = jnp.repeat(k, group, -2), jnp.repeat(v, group, -2)
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) * scale + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


@pytest.mark.parametrize("kv_heads, batch", [(1, (2,)), (2, ()), (2, (2, 3)), (4, (2,))])
def test_it_is_softmax_attention_over_grouped_heads(kv_heads, batch):
    q, k, v = inputs(kv_heads=kv_heads, batch=batch)
    bias = jax.random.normal(jax.random.key(1), (4, 5, 7))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (*batch, 1, 5, 7)).at[..., 0].set(True)
    np.testing.assert_allclose(attention(q, k, v), definition(q, k, v), atol=1e-6)
    np.testing.assert_allclose(attention(q, k, v, bias, mask), definition(q, k, v, mask, bias), atol=1e-6)
    np.testing.assert_allclose(attention(q, k, v, scale=0.1), definition(q, k, v, scale=0.1), atol=1e-6)


def test_causal_and_segments():
    q, k, v = inputs(kv_len=5)
    segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
    mask = jnp.tri(5, dtype=bool) & (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] != 0)
    got = attention(q, k, v, is_causal=True, segment_ids=segments)
    np.testing.assert_allclose(got[0], definition(q, k, v, mask[:, None])[0], atol=1e-6)
    np.testing.assert_allclose(got[1, :4], definition(q, k, v, mask[:, None])[1, :4], atol=1e-6)
    assert np.isfinite(got).all()
    q, k, v = inputs(q_len=2, kv_len=5)  # the last query sees the last key
    np.testing.assert_allclose(
        attention(q, k, v, is_causal=True), definition(q, k, v, jnp.tri(2, 5, 3, dtype=bool)), atol=1e-6
    )


def test_partial_attentions_merge_by_their_log_sum_exp():
    q, k, v = inputs()
    everything = jnp.ones((1, 1), bool)
    scale = jnp.float32(8**-0.5)
    parts = [attention_with_lse(q, k[:, s], v[:, s], everything, scale) for s in (slice(0, 3), slice(3, 7))]
    weights = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), axis=0)[..., None]
    merged = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
    np.testing.assert_allclose(merged, attention(q, k, v), atol=1e-6)


def test_low_precision_inputs_are_softmaxed_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    exact = definition(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2e-2)  # 2^-8 of values of a few units


def test_it_is_one_named_equation():
    jaxpr = jax.make_jaxpr(lambda *x: attention(*x, is_causal=True))(*inputs())
    (eqn,) = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == MARKER]
    assert [var.aval.shape for var in eqn.invars] == [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8), (5, 7), ()]


def test_it_stands_in_for_flax_attention():
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    linen = lambda **options: nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=True, **options)
    params = linen().init(jax.random.key(1), x)
    expected = linen().apply(params, x, mask=mask)
    np.testing.assert_allclose(linen(attention_fn=attention).apply(params, x, mask=mask), expected, atol=1e-6)

    build = lambda **options: nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0), **options)
    got = build(attention_fn=attention)(x, mask=mask)
    np.testing.assert_allclose(got, build()(x, mask=mask), atol=1e-6)


def test_what_it_does_not_do_is_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="expected attention without dropout, got dropout_rate=0.1"):
        attention(q, k, v, dropout_rate=0.1, deterministic=False)
    attention(q, k, v, dropout_rate=0.1, deterministic=True)
    with pytest.raises(ValueError, match="sow_weights"):
        attention(q, k, v, module=object())
    with pytest.raises(ValueError, match="einsum_dot_general"):
        attention(q, k, v, einsum_dot_general=jax.lax.dot_general)
    with pytest.raises(ValueError, match="expected query"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match="kv_heads that divide heads"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="build mask="):
        attention(q, k, v, segment_ids=jnp.ones((2, 5), int))
