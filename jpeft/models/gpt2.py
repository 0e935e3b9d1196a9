"""GPT-2 (Radford et al. 2019): one Flax NNX model, its layers stacked and scanned.

A parameter's path is its Hugging Face module name without `transformer`: `h/attn/c_attn/kernel` is `(layers, in, out)`,
the queries', keys' and values' in one. Kernels lie in the files as they do here. Length axes are `t` (of the tokens
given now) and `s` (of the keys: `t`, or the cache's length).

Dropout regularises training and is no part of the function: the rates in a config (0.1 in all the public ones) are
neither honoured nor refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jpeft.core.attention import attention
from jpeft.interop.huggingface import Tensor
from jpeft.models.causal import Cache, CausalApply, Context
from jpeft.models.family import Config, absent, common_fields, common_problems, refuse
from jpeft.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, stack

__all__ = ["GPT2", "GPT2Apply", "GPT2Config"]

HF_TENSORS = (
    Tensor("wte/embedding", "transformer.wte.weight"),
    Tensor("wpe/embedding", "transformer.wpe.weight"),
    Tensor("h/ln_1/scale", "transformer.h.{}.ln_1.weight"),
    Tensor("h/ln_1/bias", "transformer.h.{}.ln_1.bias"),
    Tensor("h/attn/c_attn/kernel", "transformer.h.{}.attn.c_attn.weight"),
    Tensor("h/attn/c_attn/bias", "transformer.h.{}.attn.c_attn.bias"),
    Tensor("h/attn/c_proj/kernel", "transformer.h.{}.attn.c_proj.weight"),
    Tensor("h/attn/c_proj/bias", "transformer.h.{}.attn.c_proj.bias"),
    Tensor("h/ln_2/scale", "transformer.h.{}.ln_2.weight"),
    Tensor("h/ln_2/bias", "transformer.h.{}.ln_2.bias"),
    Tensor("h/mlp/c_fc/kernel", "transformer.h.{}.mlp.c_fc.weight"),
    Tensor("h/mlp/c_fc/bias", "transformer.h.{}.mlp.c_fc.bias"),
    Tensor("h/mlp/c_proj/kernel", "transformer.h.{}.mlp.c_proj.weight"),
    Tensor("h/mlp/c_proj/bias", "transformer.h.{}.mlp.c_proj.bias"),
    Tensor("ln_f/scale", "transformer.ln_f.weight"),
    Tensor("ln_f/bias", "transformer.ln_f.bias"),
    Tensor("lm_head/kernel", "lm_head.weight", transpose=True),
)
HF_RENAMED = ((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),)  # folders of the model without its head, as OpenAI's are
# Causal masks that older checkpoints carry, and the second name of a tied embedding.
HF_IGNORED = (r"\.attn\.(masked_)?bias$",)
HF_IGNORED_IF_TIED = (r"^lm_head\.weight$",)

REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")


@dataclass(frozen=True)
class GPT2Config(Config):
    """What GPT-2 is made of; the names are those of other families, which Hugging Face's config knows too.

    `attention_scales` are those of each layer's scores.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    attention_scales: tuple[float, ...]
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads


def parse_config(given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> GPT2Config:
    """A `GPT2Config` from what Hugging Face writes.

    Raises:
        ValueError: everything about the config that the model would have to ignore (but dropout), all together.
    """
    get = lambda key, default: default if given.get(key) is None else given[key]
    refuse("GPT-2", absent(given, REQUIRED) or _problems(given) + common_problems(given, remat))
    width, layers = given["n_embd"], given["n_layer"]
    scale = (width // given["n_head"]) ** -0.5 if get("scale_attn_weights", True) else 1.0
    by_layer = bool(get("scale_attn_by_inverse_layer_idx", False))
    return GPT2Config(
        vocab_size=given["vocab_size"],
        hidden_size=width,
        intermediate_size=get("n_inner", 4 * width),
        num_hidden_layers=layers,
        num_attention_heads=given["n_head"],
        max_position_embeddings=given["n_positions"],
        attention_scales=tuple(scale / (k + 1 if by_layer else 1) for k in range(layers)),
        hidden_act=get("activation_function", "gelu_new"),
        layer_norm_eps=float(get("layer_norm_epsilon", 1e-5)),
        tie_word_embeddings=bool(get("tie_word_embeddings", True)),
        **common_fields(given, dtype, param_dtype, remat),
    )


def _problems(given: dict) -> list[str]:
    """One line for everything that the model would have to ignore or guess.

    `reorder_and_upcast_attn` is honoured: scores and their softmax are in float32 always.
    """
    found: list[str] = []
    say = lambda what, came: found.append(f"expected {what}, got {came}")
    if given["n_embd"] % given["n_head"]:
        say(f"n_head that divides n_embd={given['n_embd']}", given["n_head"])
    if (act := given.get("activation_function") or "gelu_new") not in ACTIVATIONS:
        say(f"activation_function to be one of {list(ACTIVATIONS)}", repr(act))
    if given.get("add_cross_attention"):
        say("add_cross_attention False", given["add_cross_attention"])
    if given.get("pruned_heads"):
        say("no pruned_heads", given["pruned_heads"])
    if other := [name for name in given.get("architectures") or () if name not in ARCHITECTURES]:
        say(f"a language model (architectures of {' or '.join(ARCHITECTURES)})", other)
    return found


class Attention(nnx.Module):
    """Causal self-attention; queries, keys and values are one product."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        d = config.hidden_size
        self.c_attn = Linear(d, 3 * d, config, rngs, bias=True)
        self.c_proj = Linear(d, d, config, rngs, bias=True)
        self.head_dim = config.head_dim

    def __call__(self, x: Array, mask: Array, scale: Any, store) -> tuple[Array, tuple]:
        """x `(batch, t, features)`, mask `(batch, 1, t, s)`, scale `()`; `store(k, v)` gives those of all `s` slots."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q, k, v = map(heads, jnp.split(self.c_attn(x), 3, axis=-1))
        keys, values = store(k, v)
        out = attention(q, keys, values, mask=mask, scale=scale)
        return self.c_proj(out.reshape(x.shape)), (keys, values)


class MLP(nnx.Module):
    """`c_proj(act(c_fc(x)))`."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        self.c_fc = Linear(config.hidden_size, config.intermediate_size, config, rngs, bias=True)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, config, rngs, bias=True)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(x)))


class Block(nnx.Module):
    """`h = x + attn(ln_1(x)); h + mlp(ln_2(h))`."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_eps, config)
        self.attn = Attention(config, rngs)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_eps, config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array, mask: Array, scale: Any, store) -> tuple[Array, tuple]:
        out, stored = self.attn(self.ln_1(x), mask, scale, store)
        h = x + out
        return h + self.mlp(self.ln_2(h)), stored


class GPT2(nnx.Module):
    """Tokens to hidden states, and hidden states to logits over the vocabulary."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        self.wte = Embedding(config.vocab_size, config.hidden_size, config, rngs)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size, config, rngs)
        self.h = stack(lambda rngs: Block(config, rngs), config.num_hidden_layers, rngs)
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_eps, config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config, rngs)
        self.config = config

    def hidden(self, tokens: Array, positions=None, segment_ids=None, cache: Cache | None = None):
        """`(h (batch, t, features), cache after these tokens or None)`."""
        context = Context.of(tokens, positions, segment_ids, cache)
        x = self.wte(tokens) + self.wpe(context.positions)
        x = x.astype(self.config.dtype or x.dtype)
        mask = context.mask[:, None]
        step = lambda layer, x, scale, store: layer(x, mask, scale, store)
        scales = np.array(self.config.attention_scales, np.float32)
        x, cache = context.scan(self.h, step, x, scales, remat=self.config.remat)
        return self.ln_f(x), cache

    def logits(self, hidden: Array) -> Array:
        """`(..., features) -> (..., vocabulary)` in float32."""
        kernel = (
            self.wte.embedding.get_value().T if self.config.tie_word_embeddings else self.lm_head.kernel.get_value()
        )
        return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class GPT2Apply(CausalApply):
    """The pure function of GPT-2. A position past the last learned one makes the hidden states NaN.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="gpt2", vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config)
    >>> apply(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 32)
    """

    config: GPT2Config

    MODEL_TYPES = ("gpt2",)
    MODULE = GPT2
    TENSORS = HF_TENSORS
    RENAMED = HF_RENAMED

    @classmethod
    def parse(cls, given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> GPT2Apply:
        """See `parse_config`."""
        return cls(parse_config(given, dtype=dtype, param_dtype=param_dtype, remat=remat))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Causal masks; the second name of a tied embedding."""
        return HF_IGNORED + (HF_IGNORED_IF_TIED if self.config.tie_word_embeddings else ())
