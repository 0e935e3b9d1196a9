"""What encoder-decoder language models share: the cache, and the apply function.

Length axes are `s` (of the source, which the encoder reads) and `t` (of the decoder's tokens given now).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jax import Array

from jpeft.models.causal import Cache
from jpeft.models.family import Apply, check_tokens

__all__ = ["Seq2SeqApply", "SourceCache", "segments_of"]


@struct.dataclass
class SourceCache:
    """What a decoder keeps between steps; made by `Seq2SeqApply.start`.

    `own`: keys, values and segments of its tokens so far; `positions (batch, slots)` where they stand; `source_keys`,
    `source_values` `(layers, batch, s, heads, head_dim)` and `source_segment_ids (batch, s)` of what the encoder read.
    """

    own: Cache
    positions: Array
    source_keys: Array
    source_values: Array
    source_segment_ids: Array


def segments_of(tokens: Array, segment_ids: Array | None) -> Array:
    """The segments given, or segment 1 for all tokens."""
    return jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids


@dataclass(frozen=True)
class Seq2SeqApply(Apply):
    """The pure function `apply(params, tokens, decoder_tokens) -> logits`. It compares and hashes by its config.

    Tokens of the source are `(batch, s)` integers, those of the decoder `(batch, t)`, and logits `(batch, t,
    vocabulary)` in float32. A T5's decoder starts with the padding token, 0; teacher forcing gives it the targets moved
    right by one. Padded and packed batches give `segment_ids` and `decoder_segment_ids`, of the shapes of the tokens: a
    token sees its own segment, in the decoder the earlier tokens of its own and the source's segment of the same
    number; 0 is padding. Without them all is segment 1, so that a padded source alone needs ones and zeros. `positions`
    and `decoder_positions` default to the places in the row, where there is a cache to those among its tokens; in a T5
    only their differences matter, and only between tokens of one segment.

    With a `cache` (see `start`) the source has been read: `tokens` is None, a call appends the decoder's tokens and
    returns `(logits, cache)`; each row is then one sequence and `decoder_segment_ids` only marks padding, on either
    side.

    The family's module has the methods `encode(tokens, positions, segment_ids)`; `hidden(source, tokens, positions,
    segment_ids)`, source being what `encode` takes; `source(tokens, positions, segment_ids) -> (keys, values)`;
    `hidden_cached(cache, tokens, positions, segment_ids) -> (hidden, cache)`; and `logits(hidden)`.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="t5", vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config)
    >>> apply(params, jnp.array([[7, 8, 9, 1]]), jnp.array([[0, 5]])).shape
    (1, 2, 32)
    """

    def inputs(self, length: int = 8):
        """Shapes of a source and of a decoder's tokens, one row each."""
        return super().inputs(length) * 2

    @property
    def task(self) -> str:
        """HF PEFT's word for such a model."""
        return "SEQ_2_SEQ_LM"

    def __call__(self, params, tokens, decoder_tokens, *, cache=None, **inputs):
        """Logits, or `(logits, cache)` where a cache is given; takes what `hidden` takes.

        Raises:
            ValueError: where the two halves' tokens, segments and positions and the cache do not fit together.
        """
        result = self.hidden(params, tokens, decoder_tokens, cache=cache, **inputs)
        if cache is None:
            return self.logits_from_hidden(params, result)
        return self.logits_from_hidden(params, result[0]), result[1]

    def hidden(
        self,
        params,
        tokens,
        decoder_tokens,
        *,
        positions=None,
        segment_ids=None,
        decoder_positions=None,
        decoder_segment_ids=None,
        cache=None,
    ):
        """The decoder's last hidden states `(batch, t, features)`, normalised; `(hidden, cache)` where one is given."""
        source = (tokens, positions, segment_ids)
        own = (decoder_tokens, decoder_positions, decoder_segment_ids)
        check_tokens(decoder_tokens, decoder_positions=decoder_positions, decoder_segment_ids=decoder_segment_ids)
        if cache is not None:
            _check_cache(source, decoder_tokens, cache)
            return self.run("hidden_cached", params, cache, *own)
        _check_source(*source)
        if len(tokens) != len(decoder_tokens):
            rows = f"{len(tokens)} and {len(decoder_tokens)}"
            raise ValueError(f"expected as many rows of tokens as of decoder_tokens, got {rows}")
        return self.run("hidden", params, source, *own)

    def logits_from_hidden(self, params, hidden) -> Array:
        """The vocabulary head on hidden states `(..., features)`, so that a loss can go through them in chunks."""
        return self.run("logits", params, hidden)

    def encode(self, params, tokens, *, positions=None, segment_ids=None) -> Array:
        """The encoder's final hidden states `(batch, s, features)`, normalised."""
        _check_source(tokens, positions, segment_ids)
        return self.run("encode", params, tokens, positions, segment_ids)

    def start(self, params, tokens, max_length: int, *, positions=None, segment_ids=None) -> SourceCache:
        """A cache of the source for at most `max_length` tokens of the decoder.

        Greedy generation, token by token:

        >>> import jax, jax.numpy as jnp, jpeft.models
        >>> config = dict(model_type="t5", vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
        >>> apply, params = jpeft.models.init(jax.random.key(0), config)
        >>> cache, token = apply.start(params, jnp.array([[7, 8, 9, 1]]), max_length=8), jnp.zeros((1, 1), int)
        >>> logits, cache = apply(params, None, token, cache=cache)
        >>> logits, cache = apply(params, None, logits.argmax(-1), cache=cache)
        >>> logits.shape, int(cache.own.index)
        ((1, 1, 32), 2)
        """
        _check_source(tokens, positions, segment_ids)
        keys, values = self.run("source", params, tokens, positions, segment_ids)
        layers, batch, _, *heads = keys.shape
        slots = jnp.zeros((layers, batch, max_length, *heads), keys.dtype)
        places = jnp.zeros((batch, max_length), jnp.int32)
        own = Cache(slots, slots, places, jnp.zeros((), jnp.int32))
        return SourceCache(own, places, keys, values, segments_of(tokens, segment_ids))

    def decode(self, params, decoder_tokens, *, positions=None, segment_ids=None, cache):
        """`(logits, cache)` of the decoder alone, in the words of a decoder-only model, so that its generation serves.

        >>> import jax, jax.numpy as jnp, jpeft, jpeft.models
        >>> from jpeft.train.generation import generate
        >>> config = dict(model_type="t5", vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
        >>> apply, params = jpeft.models.init(jax.random.key(0), config)
        >>> source = jnp.array([[7, 8, 9, 1], [6, 1, 0, 0]])
        >>> start = jpeft.lift(apply.start)
        >>> new_cache = lambda rows, length: start(params, source, length, segment_ids=jnp.int32(source > 0))
        >>> found = generate(apply.decode, params, [[0], [0]], new_cache, new_tokens=4, stops=[1], context=64)
        >>> [len(ids) <= 4 for ids in found]
        [True, True]
        """
        inputs = dict(decoder_positions=positions, decoder_segment_ids=segment_ids)
        return self(params, None, decoder_tokens, cache=cache, **inputs)

    def init_cache(self, batch: int, max_length: int, dtype=None) -> SourceCache:
        """None that is empty: the cache holds the source, see `start`.

        Raises:
            ValueError: always.
        """
        raise ValueError("the cache of an encoder-decoder holds its source: apply.start(params, tokens, max_length)")


def _check_source(tokens, positions, segment_ids) -> None:
    if tokens is None:
        raise ValueError("expected tokens of the source, got None; they have been read only where there is a cache")
    check_tokens(tokens, positions=positions, segment_ids=segment_ids)


def _check_cache(source, decoder_tokens, cache) -> None:
    if given := [n for n, x in zip(("tokens", "positions", "segment_ids"), source, strict=True) if x is not None]:
        raise ValueError(f"expected None for {' and '.join(given)} beside a cache, which holds the source already")
    rows, slots = cache.positions.shape
    if rows != len(decoder_tokens) or slots < decoder_tokens.shape[1]:
        raise ValueError(
            f"expected a cache for {decoder_tokens.shape[0]} rows of {decoder_tokens.shape[1]} tokens or more, got one "
            f"for {rows} rows of {slots}; make it with apply.start(params, tokens, max_length)"
        )
