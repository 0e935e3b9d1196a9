"""The decoder of Llama 2 and 3, Mistral, Qwen2 and Qwen3: one Flax NNX model, its layers stacked and scanned.

A parameter's path is its Hugging Face module name: `layers/self_attn/q_proj/kernel` is `(layers, in, out)`. Length
axes are `t` (of the tokens given now) and `s` (of the keys: `t`, or the cache's length).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jpeft.core.attention import attention
from jpeft.interop.huggingface import Tensor
from jpeft.models.causal import Cache, CausalApply, Context
from jpeft.models.config import FAMILIES, DecoderConfig, Rope, parse_config
from jpeft.models.layers import Embedding, Linear, RMSNorm, stack

__all__ = ["Decoder", "DecoderApply"]

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
            self.q_norm, self.k_norm = RMSNorm(d, c.rms_norm_eps, c), RMSNorm(d, c.rms_norm_eps, c)
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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array, positions: Array, mask: Array, store) -> tuple[Array, tuple]:
        out, stored = self.self_attn(self.input_layernorm(x), positions, mask, store)
        h = x + out
        return h + self.mlp(self.post_attention_layernorm(h)), stored


class Decoder(nnx.Module):
    """Tokens to hidden states, and hidden states to logits over the vocabulary."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config, rngs)
        self.layers = stack(lambda rngs: Block(config, rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config, rngs)
        self.config = config

    def hidden(self, tokens: Array, positions=None, segment_ids=None, cache: Cache | None = None):
        """`(h (batch, t, features), cache after these tokens or None)`."""
        context = Context.of(tokens, positions, segment_ids, cache)
        x = self.embed_tokens(tokens)
        x = x.astype(self.config.dtype or x.dtype)
        windows = self.config.windows if any(self.config.windows) else None
        windows = windows and np.array([w or np.iinfo(np.int32).max for w in windows], np.int32)

        def step(layer, x, window, store):
            mask = context.mask if window is None else context.mask & (context.age < window)
            return layer(x, context.positions, mask[:, None], store)

        x, cache = context.scan(self.layers, step, x, windows, remat=self.config.remat)
        return self.norm(x), cache

    def logits(self, hidden: Array) -> Array:
        """`(..., features) -> (..., vocabulary)` in float32."""
        tied = self.config.tie_word_embeddings
        kernel = self.embed_tokens.embedding.get_value().T if tied else self.lm_head.kernel.get_value()
        return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class DecoderApply(CausalApply):
    """The pure function of Llama, Mistral, Qwen2 or Qwen3."""

    config: DecoderConfig

    MODEL_TYPES = tuple(FAMILIES)
    MODULE = Decoder
    TENSORS = HF_TENSORS

    @classmethod
    def parse(cls, given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> DecoderApply:
        """See `config.parse_config`."""
        return cls(parse_config(given, dtype=dtype, param_dtype=param_dtype, remat=remat))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Buffers of older checkpoints; the second name of a tied embedding."""
        return HF_IGNORED + (HF_IGNORED_IF_TIED if self.config.tie_word_embeddings else ())
