"""The decoder of Llama 2 and 3, Mistral, Qwen2 and Qwen3: one Flax NNX model, its layers stacked and scanned.

A parameter's path is its Hugging Face module name: `layers/self_attn/q_proj/kernel` is `(layers, in, out)`. Length
axes are `t` (of the tokens given now) and `s` (of the keys: `t`, or the cache's length).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array

from jpeft.core.attention import attention
from jpeft.interop.huggingface import Tensor
from jpeft.models.config import DecoderConfig, Rope

__all__ = ["HF_IGNORED", "HF_TENSORS", "Cache", "Decoder"]

HF_TENSORS = (
    Tensor("embed_tokens/embedding", "model.embed_tokens.weight"),
    Tensor("layers/input_layernorm/scale", "model.layers.{}.input_layernorm.weight"),
    Tensor("layers/self_attn/q_proj/kernel", "model.layers.{}.self_attn.q_proj.weight", transpose=True),
    Tensor("layers/self_attn/k_proj/kernel", "model.layers.{}.self_attn.k_proj.weight", transpose=True),
    Tensor("layers/self_attn/v_proj/kernel", "model.layers.{}.self_attn.v_proj.weight", transpose=True),
    Tensor("layers/self_attn/o_proj/kernel", "model.layers.{}.self_attn.o_proj.weight", transpose=True),
    Tensor("layers/self_attn/q_proj/bias", "model.layers.{}.self_attn.q_proj.bias"),
    Tensor("layers/self_attn/k_proj/bias", "model.layers.{}.self_attn.k_proj.bias"),
    Tensor("layers/self_attn/v_proj/bias", "model.layers.{}.self_attn.v_proj.bias"),
    Tensor("layers/self_attn/o_proj/bias", "model.layers.{}.self_attn.o_proj.bias"),
    Tensor("layers/self_attn/q_norm/scale", "model.layers.{}.self_attn.q_norm.weight"),
    Tensor("layers/self_attn/k_norm/scale", "model.layers.{}.self_attn.k_norm.weight"),
    Tensor("layers/post_attention_layernorm/scale", "model.layers.{}.post_attention_layernorm.weight"),
    Tensor("layers/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight", transpose=True),
    Tensor("layers/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight", transpose=True),
    Tensor("layers/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight", transpose=True),
    Tensor("layers/mlp/gate_proj/bias", "model.layers.{}.mlp.gate_proj.bias"),
    Tensor("layers/mlp/up_proj/bias", "model.layers.{}.mlp.up_proj.bias"),
    Tensor("layers/mlp/down_proj/bias", "model.layers.{}.mlp.down_proj.bias"),
    Tensor("norm/scale", "model.norm.weight"),
    Tensor("lm_head/kernel", "lm_head.weight", transpose=True),
)
# Buffers that older checkpoints carry, and the second name of a tied embedding: read by nothing, missed by nobody.
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)
HF_IGNORED_IF_TIED = (r"^lm_head\.weight$",)

# A layer's results that the backward pass finds stored; the rest is computed again.
REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in slots `[0, index)`.

    `keys`, `values` `(layers, batch, slots, kv_heads, head_dim)`; `segment_ids (batch, slots)`, 0 where a slot is
    empty or holds padding; `index ()` the next free slot. Writing past the last slot makes the hidden states NaN:
    silence would be a wrong text.
    """

    keys: Array
    values: Array
    segment_ids: Array
    index: Array

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype=None) -> Cache:
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        dtype = dtype or config.dtype or config.param_dtype
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros(batch, slots), zeros())


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, features: int, config: DecoderConfig):
        self.scale = nnx.Param(jnp.ones(features, config.param_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` in the dtype of `x`; kernel `(in, out)`."""

    def __init__(self, features_in: int, features_out: int, config: DecoderConfig, rngs: nnx.Rngs, *, bias=False):
        shape = (features_in, features_out)
        self.kernel = nnx.Param(_normal(rngs, shape, config))
        if bias:
            self.bias = nnx.Param(jnp.zeros(features_out, config.param_dtype))
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel.get_value().astype(x.dtype)
        return y + self.bias.get_value().astype(x.dtype) if self.has_bias else y


class Embedding(nnx.Module):
    """Rows of a `(vocabulary, features)` table. A token outside the vocabulary gives NaN, not a neighbour's row."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs, (config.vocab_size, config.hidden_size), config))

    def __call__(self, tokens: Array) -> Array:
        return jnp.take(self.embedding.get_value(), tokens, axis=0)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: DecoderConfig) -> Array:
    return config.initializer_range * jax.random.normal(rngs.params(), shape, config.param_dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each of the `head_dim / 2` pairs, in float32 as the models were trained.

    "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). "llama3" divides those whose
    wavelength exceeds the original context over `low_freq_factor`, keeps those below it over `high_freq_factor`, and
    mixes in between (Llama 3 herd of models 2024, arXiv:2407.21783).
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.kind == "default":
        kept = 1.0
    elif rope.kind == "linear":
        kept = 0.0
    else:
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return np.asarray(frequencies * (kept + (1 - kept) / rope.factor), np.float32)


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """`(a, b) -> (a cos - b sin, b cos + a sin)` on the halves of each head; x `(batch, t, heads, head_dim)`."""
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped key heads, rotary positions and, in Qwen3, normalised queries and keys."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c, d = config, config.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * d, c, rngs, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * d, c, rngs, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * d, c, rngs, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * d, c.hidden_size, c, rngs, bias=c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, c), RMSNorm(d, c)
        self.config = config

    def __call__(self, x: Array, positions: Array, mask: Array, store) -> tuple[Array, tuple]:
        """x `(batch, t, features)`, mask `(batch, 1, t, s)`; `store(k, v)` gives keys and values of all `s` slots."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        keys, values = store(k, v)
        out = attention(q, keys, values, mask=mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), (keys, values)


@jax.checkpoint
def gated(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`; the backward pass computes it again, so that only the two inputs are kept for it."""
    return jax.nn.silu(gate) * up


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, ff, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, ff, config, rngs, bias=bias)
        self.up_proj = Linear(d, ff, config, rngs, bias=bias)
        self.down_proj = Linear(ff, d, config, rngs, bias=bias)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Block(nnx.Module):
    """`h = x + attention(norm(x)); h + mlp(norm(h))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array, positions: Array, mask: Array, store) -> tuple[Array, tuple]:
        out, stored = self.self_attn(self.input_layernorm(x), positions, mask, store)
        h = x + out
        return h + self.mlp(self.post_attention_layernorm(h)), stored


class Decoder(nnx.Module):
    """Tokens to hidden states, and hidden states to logits over the vocabulary."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        stacked = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
        self.embed_tokens = Embedding(config, rngs)
        self.layers = nnx.split_rngs(splits=config.num_hidden_layers)(stacked)(rngs)
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config, rngs)
        self.config = config

    def hidden(self, tokens: Array, positions=None, segment_ids=None, cache: Cache | None = None):
        """`(h (batch, t, features), cache after these tokens or None)`."""
        segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        start = 0 if cache is None else cache.index
        seen = segments if cache is None else _write(cache.segment_ids, segments, start)

        # A key's age is counted in tokens, so that padding neither fills a window nor moves a position.
        count = jnp.cumsum(seen != 0, axis=1)
        count_here = jax.lax.dynamic_slice_in_dim(count, start, tokens.shape[1], axis=1)
        age = count_here[:, :, None] - count[:, None, :]  # (batch, t, s)
        mask = (age >= 0) & (segments[:, :, None] == seen[:, None, :]) & (seen[:, None, :] != 0)
        if positions is None:
            positions = positions_in_segments(segments) if cache is None else jnp.maximum(count_here - 1, 0)

        x = self.embed_tokens(tokens)
        x = x.astype(self.config.dtype or x.dtype)
        graph, weights = nnx.split(self.layers)
        windows = self.config.windows if any(self.config.windows) else None
        windows = windows and np.array([w or np.iinfo(np.int32).max for w in windows], np.int32)

        def layer(x, scanned):
            weights, window, slots = scanned
            seen_here = mask if window is None else mask & (age < window)
            store = lambda k, v: (k, v) if slots is None else (_write(slots[0], k, start), _write(slots[1], v, start))
            x, stored = nnx.merge(graph, weights)(x, positions, seen_here[:, None], store)
            return x, None if slots is None else stored

        if self.config.remat is not None:
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat], prevent_cse=False)
        slots = None if cache is None else (cache.keys, cache.values)
        x, slots = jax.lax.scan(layer, x, (weights, windows, slots))
        x = self.norm(x)
        if cache is None or slots is None:
            return x, None
        end = cache.index + tokens.shape[1]
        return jnp.where(end <= seen.shape[1], x, jnp.nan), Cache(slots[0], slots[1], seen, end)

    def logits(self, hidden: Array) -> Array:
        """`(..., features) -> (..., vocabulary)` in float32."""
        tied = self.config.tie_word_embeddings
        kernel = self.embed_tokens.embedding.get_value().T if tied else self.lm_head.kernel.get_value()
        return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _write(slots: Array, new: Array, start: Array | int) -> Array:
    """`slots (batch, s, ...)` with `new (batch, t, ...)` in the slots from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)


def positions_in_segments(segment_ids: Array) -> Array:
    """Each token's place in its segment, segments being runs of one id: `[1, 1, 2, 2, 2] -> [0, 1, 0, 1, 2]`."""
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
