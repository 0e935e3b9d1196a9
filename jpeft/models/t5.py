"""T5 v1.0 and v1.1 (Raffel et al. 2020, arXiv:1910.10683): an encoder-decoder in Flax NNX, layers stacked and scanned.

Both halves are pre-norm RMS transformers without biases. Their attention has no scale; in self-attention it adds a
learned number per head for the bucket of the distance between two tokens, from one table per half that all of its
blocks share.

A parameter's path is its Hugging Face module name: `decoder/block/layer/1/EncDecAttention/q/kernel` is
`(layers, in, out)`. Only those tables are not in the first block but beside the stack. Length axes are `s` (of the
source, which the encoder reads), `t` (of the decoder's tokens given now) and `k` (of the keys).

Dropout regularises training and is no part of the function: the rate in a config (0.1 in all the public ones) is
neither honoured nor refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jpeft.core.attention import attention
from jpeft.interop.huggingface import Tensor
from jpeft.models.causal import Context
from jpeft.models.family import Config, absent, common_fields, common_problems, refuse
from jpeft.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, normal, scan_layers, stack
from jpeft.models.seq2seq import Seq2SeqApply, SourceCache, segments_of

__all__ = ["T5", "T5Apply", "T5Config"]

SELF, CROSS, FEED_FORWARD = "SelfAttention", "EncDecAttention", "DenseReluDense"  # a block's parts in Hugging Face
KERNELS = {SELF: "qkvo", CROSS: "qkvo", FEED_FORWARD: ("wi", "wi_0", "wi_1", "wo")}


def _tensors(half: str, parts: tuple[str, ...]) -> Iterator[Tensor]:
    """Rows of the encoder or of the decoder. Hugging Face has the table that all blocks share in the first of them."""
    table = f"{half}.block.0.layer.0.{SELF}.relative_attention_bias.weight"
    yield Tensor(f"{half}/relative_attention_bias/table", table)
    for k, part in enumerate(parts):
        ours, theirs = f"{half}/block/layer/{k}", f"{half}.block.{{}}.layer.{k}"
        yield Tensor(f"{ours}/layer_norm/scale", f"{theirs}.layer_norm.weight")
        for name in KERNELS[part]:
            yield Tensor(f"{ours}/{part}/{name}/kernel", f"{theirs}.{part}.{name}.weight", transpose=True)
    yield Tensor(f"{half}/final_layer_norm/scale", f"{half}.final_layer_norm.weight")


HF_TENSORS = (
    Tensor("shared/embedding", "shared.weight"),
    *_tensors("encoder", (SELF, FEED_FORWARD)),
    *_tensors("decoder", (SELF, CROSS, FEED_FORWARD)),
    Tensor("lm_head/kernel", "lm_head.weight", transpose=True),
)
# Second names of the embedding, and a table that older checkpoints carry and no model reads.
HF_IGNORED = (
    r"^(encoder|decoder)\.embed_tokens\.weight$",
    r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
)
HF_IGNORED_IF_TIED = (r"^lm_head\.weight$",)


@dataclass(frozen=True)
class T5Config(Config):
    """What a T5 is made of; field names are Hugging Face's where it has the field.

    `gated`: the feed-forward is v1.1's. `tie_word_embeddings`: the head is the embedding. `scale_outputs`: the head
    reads the hidden states times `d_model ** -0.5`, as v1.0's does. `rms_norm_eps` is Hugging Face's
    `layer_norm_epsilon`, `initializer_range` its `initializer_factor`.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    rms_norm_eps: float = 1e-6
    gated: bool = False
    tie_word_embeddings: bool = True
    scale_outputs: bool = True


REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
ARCHITECTURES = ("T5ForConditionalGeneration", "T5WithLMHeadModel")  # the second is the older name
PROJECTIONS = {"relu": (False, "relu"), "gated-gelu": (True, "gelu_new")}  # and what transformers derives from each


def parse_config(given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> T5Config:
    """A `T5Config` from what Hugging Face writes for T5.

    The head is the embedding, and reads scaled hidden states, unless the config says `tie_word_embeddings: false`.
    From version 5 on `transformers` writes `scale_decoder_outputs: false` in its place, tied or not; that is read as a
    head of its own, which all published models of this kind have.

    Raises:
        ValueError: everything about the config that the model would not honour, all together.
    """
    given = {key: value for key, value in given.items() if value is not None}
    common = common_fields(given, dtype, param_dtype, remat)
    common["initializer_range"] = float(given.get("initializer_factor", 1.0))
    problems = absent(given, REQUIRED) or _problems(given, common["dtype"] or common["param_dtype"])
    refuse("the T5 model", problems + common_problems(given, remat))
    tied = bool(given.get("tie_word_embeddings", True))
    scaled = bool(given.get("scale_decoder_outputs", tied))
    buckets, distance = _buckets(given)
    return T5Config(
        **{key: int(given[key]) for key in REQUIRED},
        num_decoder_layers=int(given.get("num_decoder_layers", given["num_layers"])),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        rms_norm_eps=float(given.get("layer_norm_epsilon", 1e-6)),
        gated=given.get("feed_forward_proj", "relu") == "gated-gelu",
        tie_word_embeddings=tied and scaled,
        scale_outputs=scaled,
        **common,
    )


def _buckets(given: dict) -> tuple[int, int]:
    return int(given.get("relative_attention_num_buckets", 32)), int(given.get("relative_attention_max_distance", 128))


def _problems(given: dict, dtype: str) -> list[str]:
    """One line for everything that the model would have to ignore or guess."""
    found: list[str] = []
    say = lambda what, came: found.append(f"expected {what}, got {came}")
    projection = given.get("feed_forward_proj", "relu")
    if projection not in PROJECTIONS:
        say(f"feed_forward_proj {' or '.join(map(repr, PROJECTIONS))}", repr(projection))
    else:
        for key, value in zip(("is_gated_act", "dense_act_fn"), PROJECTIONS[projection], strict=True):
            if given.get(key, value) != value:
                say(f"{key} {value!r} with feed_forward_proj {projection!r}", repr(given[key]))
    for key, value in (("is_encoder_decoder", True), ("is_decoder", False)):
        if given.get(key, value) != value:
            say(f"{key} {value}", given[key])
    if others := [name for name in given.get("architectures", ()) if name not in ARCHITECTURES]:
        say(f"an architecture of {list(ARCHITECTURES)}", others)
    buckets, distance = _buckets(given)
    if buckets < 4:
        say("relative_attention_num_buckets of 4 or more", buckets)
    if distance <= buckets // 2:
        say(f"relative_attention_max_distance above the half of {buckets} buckets", distance)
    if dtype == "float16":
        say("to compute in float32 or bfloat16 (dtype=), as T5's activations exceed float16", dtype)
    return found


def _ranged(config: T5Config, std: float) -> T5Config:
    """The config for a parameter that starts with this standard deviation, times the config's own factor."""
    return replace(config, initializer_range=config.initializer_range * std)


def buckets_of_distances(num_buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each `key position - query position` from `-max_distance` to `max_distance`, in this order.

    Looking both ways, each direction has one half of the buckets; looking back, later keys fall in bucket 0 with the
    query's own place. Half of a direction's buckets hold one distance each, the others widen geometrically up to
    `max_distance`; the last one has all that lies beyond. In float32, as the models were trained.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    buckets = num_buckets // 2 if bidirectional else num_buckets
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact = buckets // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    wide = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    bucket = np.where(distance < exact, distance, np.minimum(exact + wide.astype(int), buckets - 1))
    return bucket + buckets * (relative > 0) if bidirectional else bucket


class RelativeBias(nnx.Module):
    """A number per head for how far a key is from a query, from a table `(buckets, heads)`."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, *, bidirectional: bool):
        shape = (config.relative_attention_num_buckets, config.num_heads)
        self.table = nnx.Param(normal(rngs, shape, _ranged(config, config.d_model**-0.5)))
        self.furthest, self.bidirectional = config.relative_attention_max_distance, bidirectional

    def __call__(self, queries: Array, keys: Array) -> Array:
        """Positions `(rows, t)` and `(rows, k)` to a bias `(rows, heads, t, k)` in float32."""
        table = self.table.get_value()
        buckets = buckets_of_distances(table.shape[0], self.furthest, bidirectional=self.bidirectional)
        # Both axes are indexed: these are no rows of tokens, and no method for embeddings should take them for such.
        of_distance = table[buckets[:, None], np.arange(table.shape[1])].astype(jnp.float32)
        distance = jnp.clip(keys[:, None, :] - queries[:, :, None], -self.furthest, self.furthest)
        return jnp.moveaxis(of_distance[distance + self.furthest], -1, 1)


class Attention(nnx.Module):
    """`softmax(q k^T + bias) v`; the scale that is missing is in the start of `q`."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        d, inner = config.d_model, config.num_heads * config.d_kv
        self.q = Linear(d, inner, _ranged(config, (d * config.d_kv) ** -0.5), rngs)
        self.k = Linear(d, inner, _ranged(config, d**-0.5), rngs)
        self.v = Linear(d, inner, _ranged(config, d**-0.5), rngs)
        self.o = Linear(inner, d, _ranged(config, inner**-0.5), rngs)
        self.head_dim = config.d_kv

    def heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def keys_and_values(self, x: Array) -> tuple[Array, Array]:
        """`(batch, k, features)` to twice `(batch, k, heads, d_kv)`."""
        return self.heads(self.k(x)), self.heads(self.v(x))

    def __call__(self, x: Array, keys: Array, values: Array, mask: Array, bias: Array | None = None) -> Array:
        """x `(batch, t, features)`, mask `(batch, t, k)`, bias `(batch or 1, heads, t, k)`."""
        out = attention(self.heads(self.q(x)), keys, values, bias=bias, mask=mask[:, None], scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1))


@jax.checkpoint
def gated(gate: Array, up: Array) -> Array:
    """`gelu(gate) * up`; the backward pass computes it again, so that only the two inputs are kept for it."""
    return ACTIVATIONS["gelu_new"](gate) * up


class FeedForward(nnx.Module):
    """`wo(relu(wi(x)))`, in v1.1 `wo(gelu(wi_0(x)) * wi_1(x))` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        d, ff = config.d_model, config.d_ff
        wide = lambda: Linear(d, ff, _ranged(config, d**-0.5), rngs)
        if config.gated:
            self.wi_0, self.wi_1 = wide(), wide()
        else:
            self.wi = wide()
        self.wo = Linear(ff, d, _ranged(config, ff**-0.5), rngs)
        self.is_gated = config.gated

    def __call__(self, x: Array) -> Array:
        return self.wo(gated(self.wi_0(x), self.wi_1(x)) if self.is_gated else ACTIVATIONS["relu"](self.wi(x)))


class Part(nnx.Module):
    """A part of a block, under its Hugging Face name, and the norm before it: `x + part(norm(x))`."""

    def __init__(self, name: str, config: T5Config, rngs: nnx.Rngs):
        self.layer_norm = RMSNorm(config.d_model, config.rms_norm_eps, config)
        setattr(self, name, FeedForward(config, rngs) if name == FEED_FORWARD else Attention(config, rngs))
        self.name = name

    @property
    def inner(self) -> Any:
        return getattr(self, self.name)


class Block(nnx.Module):
    """Self-attention, in the decoder attention to the source, and the feed-forward, each added to what it reads."""

    def __init__(self, parts: tuple[str, ...], config: T5Config, rngs: nnx.Rngs):
        self.layer = nnx.Dict({str(k): Part(name, config, rngs) for k, name in enumerate(parts)})

    def source(self, encoded: Array) -> tuple[Array, Array]:
        """The keys and values of an encoded source, `(batch, s, heads, d_kv)`."""
        return self.layer["1"].inner.keys_and_values(encoded)

    def __call__(self, x: Array, mask: Array, bias: Array, store, source: tuple = ()) -> tuple[Array, tuple]:
        """`store(k, v)` gives keys and values of all slots; `source` is those of the source, and their mask."""
        own, *cross, last = self.layer.values()
        y = own.layer_norm(x)
        keys, values = store(*own.inner.keys_and_values(y))
        x = x + own.inner(y, keys, values, mask, bias)
        for part in cross:
            x = x + part.inner(part.layer_norm(x), *source)
        return x + last.inner(last.layer_norm(x)), (keys, values)


class Half(nnx.Module):
    """The encoder or the decoder: its blocks, the table of distances that they share, and the norm after them."""

    def __init__(self, parts: tuple[str, ...], blocks: int, config: T5Config, rngs: nnx.Rngs):
        self.relative_attention_bias = RelativeBias(config, rngs, bidirectional=CROSS not in parts)
        self.block = stack(lambda rngs: Block(parts, config, rngs), blocks, rngs)
        self.final_layer_norm = RMSNorm(config.d_model, config.rms_norm_eps, config)


class T5(nnx.Module):
    """Source and decoder tokens to the decoder's hidden states, and those to logits over the vocabulary."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.shared = Embedding(config.vocab_size, config.d_model, _ranged(config, 1.0), rngs)
        self.encoder = Half((SELF, FEED_FORWARD), config.num_layers, config, rngs)
        self.decoder = Half((SELF, CROSS, FEED_FORWARD), config.num_decoder_layers, config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, _ranged(config, 1.0), rngs)
        self.config = config

    def embed(self, tokens: Array) -> Array:
        x = self.shared(tokens)
        return x.astype(self.config.dtype or x.dtype)

    def encode(self, tokens: Array, positions=None, segment_ids=None) -> Array:
        """Tokens `(batch, s)` to `(batch, s, features)`, normalised."""
        segments = segments_of(tokens, segment_ids)
        mask = _same_segment(segments, segments)
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        bias = self.encoder.relative_attention_bias(positions, positions)
        step = lambda block, x, _: (block(x, mask, bias, lambda k, v: (k, v))[0], None)
        x, _ = scan_layers(self.encoder.block, step, self.embed(tokens), remat=self.config.remat)
        return self.encoder.final_layer_norm(x)

    def source(self, tokens: Array, positions=None, segment_ids=None) -> tuple[Array, Array]:
        """What the decoder's blocks read of the source: keys and values, each `(layers, batch, s, heads, d_kv)`."""
        encoded = self.encode(tokens, positions, segment_ids)
        return scan_layers(self.decoder.block, lambda block, _, __: (None, block.source(encoded)), None)[1]

    def hidden(self, source: tuple, tokens: Array, positions=None, segment_ids=None) -> Array:
        """`h (batch, t, features)` of the decoder's tokens, which read `source`: tokens, positions, segments."""
        encoded = self.encode(*source)
        context = Context.of(tokens, positions, segment_ids)
        # Tokens of one segment are as far apart in the row as they are in the segment.
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        bias = self.decoder.relative_attention_bias(positions, positions)
        mask = _same_segment(segments_of(tokens, segment_ids), segments_of(source[0], source[2]))
        return self._decode(tokens, context, bias, lambda block, _: (*block.source(encoded), mask))[0]

    def hidden_cached(self, cache: SourceCache, tokens: Array, positions=None, segment_ids=None):
        """As `hidden`, of tokens that follow those in the cache: `(h, cache)`."""
        context = Context.of(tokens, positions, segment_ids, cache.own)
        places = context.positions.astype(cache.positions.dtype)
        places = jax.lax.dynamic_update_slice_in_dim(cache.positions, places, cache.own.index, axis=1)
        bias = self.decoder.relative_attention_bias(context.positions, places)
        mask = _same_segment(segments_of(tokens, segment_ids), cache.source_segment_ids)
        kept = (cache.source_keys, cache.source_values)
        x, own = self._decode(tokens, context, bias, lambda _, kept: (*kept, mask), kept)
        return x, cache.replace(own=own, positions=places)

    def _decode(self, tokens: Array, context: Context, bias: Array, source, kept=None):
        """`source(block, kept)` gives keys, values and mask of the source; `kept` has an axis of blocks in front."""
        step = lambda block, x, kept, store: block(x, context.mask, bias, store, source(block, kept))
        x, own = context.scan(self.decoder.block, step, self.embed(tokens), kept, remat=self.config.remat)
        return self.decoder.final_layer_norm(x), own

    def logits(self, hidden: Array) -> Array:
        """`(..., features) -> (..., vocabulary)` in float32."""
        tied = self.config.tie_word_embeddings
        kernel = self.shared.embedding.get_value().T if tied else self.lm_head.kernel.get_value()
        hidden = hidden * self.config.d_model**-0.5 if self.config.scale_outputs else hidden
        return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _same_segment(queries: Array, keys: Array) -> Array:
    """Segments `(batch, t)` and `(batch, k)` to where a query may attend, `(batch, t, k)`; nothing sees 0."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)


@dataclass(frozen=True)
class T5Apply(Seq2SeqApply):
    """The pure function of a T5."""

    config: T5Config

    MODEL_TYPES = ("t5",)
    MODULE = T5
    TENSORS = HF_TENSORS

    @classmethod
    def parse(cls, given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> T5Apply:
        """See `parse_config`."""
        return cls(parse_config(given, dtype=dtype, param_dtype=param_dtype, remat=remat))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Other names of the embedding, and a table that no model reads."""
        return HF_IGNORED + (HF_IGNORED_IF_TIED if self.config.tie_word_embeddings else ())
