"""Scaled dot-product attention as a named call, so that a transform of a model can find it in the model's jaxpr.

A model calls `attention`, or passes it as `attention_fn=` to Linen's or NNX's `MultiHeadDotProductAttention`. In the
jaxpr it is one `jit` equation named `MARKER`: from `query, key, value, mask, scale[, bias]`, in that order, to the
result in float32 and the log-sum-exp of its scores, with which another partial attention merges exactly (`Call`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["MARKER", "Call", "attention", "attention_with_lse"]

MARKER = "jpeft_attention"


def attention_with_lse(
    query: Array, key: Array, value: Array, mask: Array, scale: Array, bias: Array | None = None, precision=None
) -> tuple[Array, Array]:
    """Attention and the log-sum-exp of its scores, both in float32.

        s = scale q k^T + bias,  lse = log sum_mask exp(s),  out = sum_mask exp(s - lse) v

    Two results over disjoint keys merge with weights `softmax([lse_1, lse_2])`. Query heads share key heads in
    consecutive groups; the shared heads are never repeated in memory.

    Shapes: query `(*batch, q, heads, head_dim)`, key and value `(*batch, kv, kv_heads, head_dim)`, mask (true: attend)
    and bias broadcast to `(*batch, heads, q, kv)`; returns `(*batch, q, heads, head_dim)` and `(*batch, q, heads)`.
    A query whose keys are all masked gives the mean of the values, never NaN.
    """
    heads, kv_heads = query.shape[-2], key.shape[-2]
    grouped = lambda x: _group_heads(x, heads, kv_heads)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)

    split = query.reshape(*query.shape[:-2], kv_heads, heads // kv_heads, query.shape[-1])
    scores = einsum("...qkgh,...skh->...kgqs", split, key) * scale
    if bias is not None:
        scores = scores + grouped(bias).astype(jnp.float32)
    scores = jnp.where(grouped(mask), scores, jnp.finfo(jnp.float32).min)

    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = einsum("...kgqs,...skh->...qkgh", (weights / total).astype(value.dtype), value)
    lse = (largest + jnp.log(total))[..., 0]
    return out.reshape(*query.shape[:-1], value.shape[-1]), jnp.moveaxis(
        lse.reshape(*lse.shape[:-3], heads, -1), -1, -2
    )


def _group_heads(x: Array, heads: int, kv_heads: int) -> Array:
    """`(*batch, heads or 1, q, kv)` seen as `(*batch, kv_heads or 1, group or 1, q, kv)`; `(q, kv)` as it is."""
    if x.ndim < 3:
        return x
    groups = (1, 1) if x.shape[-3] == 1 else (kv_heads, heads // kv_heads)
    return x.reshape(*x.shape[:-3], *groups, *x.shape[-2:])


@dataclass(frozen=True)
class Call:
    """One attention call of a lifted model, as a Weight sees it that acts there (`Weight.notes`).

    Attributes:
        query: `(*batch, q, heads, head_dim)`, in the model's dtype.
        kv_heads: of the call's own keys; extra keys have as many.
        scale: of the scores.
        out, lse: the result `(*batch, q, heads, value_dim)` and its scores' log-sum-exp `(*batch, q, heads)`, float32.
        notes: everything that the products before the call left for it.
    """

    query: Array
    kv_heads: int
    scale: Array
    out: Array
    lse: Array
    notes: tuple[Any, ...] = ()

    def apart(self, key: Array, value: Array) -> tuple[Array, Array]:
        """`(out, lse)` of the queries over these keys alone, all visible.

        Shapes: key, value `(*batch, extra, kv_heads, head_dim)`, or without the batch axes.

        Raises:
            ValueError: other heads than the call's keys have.
        """
        if key.shape[-2] != self.kv_heads or value.shape[-2] != self.kv_heads:
            raise ValueError(
                f"expected keys and values of the call's {self.kv_heads} heads, got {key.shape}, {value.shape}; "
                "was the adapter made for another model, or are the heads split over devices inside a shard_map?"
            )
        key, value = (x.astype(self.query.dtype) for x in (key, value))
        return attention_with_lse(self.query, key, value, jnp.ones((1, 1), bool), self.scale)

    def joined(self, key: Array, value: Array) -> Call:
        """The call as if these keys had been among its own: merged by log-sum-exp."""
        out, lse = self.apart(key, value)
        both = jnp.logaddexp(self.lse, lse)
        weigh = lambda part: jnp.exp(part - both)[..., None]
        return replace(self, out=weigh(self.lse) * self.out + weigh(lse) * out, lse=both)


def _marked(query, key, value, mask, scale, bias=None, *, precision):
    return attention_with_lse(query, key, value, mask, scale, bias, precision)


_marked.__name__ = MARKER
_marked = jax.jit(_marked, static_argnames="precision")


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    is_causal: bool = False,
    segment_ids: Array | None = None,
    scale: float | None = None,
    dtype=None,
    precision=None,
    dropout_rate: float = 0.0,
    deterministic: bool | None = None,
    dropout_rng: Array | None = None,
    broadcast_dropout: bool = True,
    module=None,
    **unsupported,
) -> Array:
    """Scaled dot-product attention with grouped key heads, softmax in float32, output in the query's dtype.

    Shapes: query `(*batch, q, heads, head_dim)`, key and value `(*batch, kv, kv_heads, head_dim)`, output as the query.

    Args:
        bias: added to the scores; broadcasts to `(*batch, heads, q, kv)`.
        mask: true where a query may attend; broadcasts to `(*batch, heads, q, kv)`.
        is_causal: a query sees the keys up to its own place, the last query the last key.
        segment_ids: `(*batch, length)` of a self-attention; a query sees the keys of its segment, and nothing sees 0.
        scale: of the scores; `head_dim ** -0.5` where None.
        dtype: to compute in, as Flax passes it; that of the inputs where None.

    The remaining arguments are those that Flax's attention layers pass to an `attention_fn`.

    Raises:
        ValueError: on shapes that do not fit, on active dropout, or on an option that this function does not honour.

    >>> import jax.numpy as jnp
    >>> q, kv = jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 2, 8))
    >>> attention(q, kv, kv, is_causal=True).shape
    (1, 5, 4, 8)
    """
    del dropout_rng, broadcast_dropout  # without dropout they say nothing
    _check(query, key, value, segment_ids)
    if dropout_rate and not deterministic:
        raise ValueError(
            f"expected attention without dropout, got {dropout_rate=} with {deterministic=}; "
            "build the layer with dropout_rate=0.0 or call it with deterministic=True"
        )
    ignored = sorted(name for name, option in unsupported.items() if name == "return_weights" or option)
    if module is not None or set(ignored) - {"force_fp32_for_softmax", "promote_dtype"}:
        raise ValueError(
            f"expected none of Flax's sow_weights, einsum or weight options, got {module=}, {ignored}; "
            "jpeft's attention never hands out its weights: leave these options at their defaults"
        )
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    q_len, kv_len = query.shape[-3], key.shape[-3]
    allowed = jnp.ones((1, 1), bool) if mask is None else mask.astype(bool)
    if is_causal:
        allowed = allowed & jnp.tri(q_len, kv_len, kv_len - q_len, dtype=bool)
    if segment_ids is not None:
        ids = segment_ids[..., None, :, None], segment_ids[..., None, None, :]
        allowed = allowed & (ids[0] == ids[1]) & (ids[1] != 0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _marked(query, key, value, allowed, jnp.float32(scale), bias, precision=precision)
    return out.astype(query.dtype)


def _check(query, key, value, segment_ids):
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim >= 3 or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"expected query (*batch, q, heads, head_dim) and key, value (*batch, kv, kv_heads, head_dim), got {shapes}"
        )
    if query.shape[-1] != key.shape[-1] or query.shape[-2] % key.shape[-2]:
        raise ValueError(f"expected one head_dim and kv_heads that divide heads, got {shapes}")
    lengths = query.shape[-3], key.shape[-3]
    if segment_ids is not None and lengths != (segment_ids.shape[-1],) * 2:
        raise ValueError(
            f"expected segment_ids of a self-attention's length, got {segment_ids.shape} with {shapes}; "
            "build mask= from the two sides' segments instead"
        )
