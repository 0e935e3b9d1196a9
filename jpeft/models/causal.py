"""What decoder-only language models share: where tokens stand, what they see, the cache, and the apply function.

Length axes are `t` (of the tokens given now) and `s` (of the keys: `t`, or the cache's length).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from jpeft.models.family import Apply, check_tokens
from jpeft.models.layers import scan_layers

__all__ = ["Cache", "CausalApply", "Context", "positions_in_segments", "write"]


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
    def empty(cls, config, batch: int, slots: int, dtype=None) -> Cache:
        """For a config that has `num_hidden_layers`, `num_key_value_heads` and `head_dim`."""
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        dtype = dtype or config.dtype or config.param_dtype
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros(batch, slots), zeros())


@dataclass(frozen=True)
class Context:
    """Where the given tokens stand, and what they see.

    `positions (batch, t)`; `mask (batch, t, s)`, true where a token sees a key; `age (batch, t, s)`, how many tokens
    earlier than the token the key is; `seen (batch, s)` the keys' segments; `cache` that before these tokens, or None.
    """

    positions: Array
    mask: Array
    age: Array
    seen: Array
    cache: Cache | None

    @classmethod
    def of(cls, tokens: Array, positions=None, segment_ids=None, cache: Cache | None = None) -> Context:
        """A token sees itself and the earlier ones of its segment; positions default to places in segments."""
        segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        start = 0 if cache is None else cache.index
        seen = segments if cache is None else write(cache.segment_ids, segments, start)

        # A key's age is counted in tokens, so that padding neither fills a window nor moves a position.
        count = jnp.cumsum(seen != 0, axis=1)
        count_here = jax.lax.dynamic_slice_in_dim(count, start, tokens.shape[1], axis=1)
        age = count_here[:, :, None] - count[:, None, :]
        mask = (age >= 0) & (segments[:, :, None] == seen[:, None, :]) & (seen[:, None, :] != 0)
        if positions is None:
            positions = positions_in_segments(segments) if cache is None else jnp.maximum(count_here - 1, 0)
        return cls(positions, mask, age, seen, cache)

    def scan(self, layers: nnx.Module, step: Callable, x: Array, per_layer=None, *, remat: str | None = None):
        """`(x, cache after these tokens or None)` of `x, (keys, values) = step(layer, x, given, store)` on a stack.

        `store(k, v)` takes a layer's keys and values of the given tokens and returns those of all `s` slots;
        `per_layer` and `remat` as in `layers.scan_layers`.
        """
        cache = self.cache
        start = 0 if cache is None else cache.index

        def with_slots(layer, x, given):
            own, slots = given
            store = lambda k, v: (k, v) if slots is None else (write(slots[0], k, start), write(slots[1], v, start))
            x, stored = step(layer, x, own, store)
            return x, None if slots is None else stored

        slots = None if cache is None else (cache.keys, cache.values)
        x, slots = scan_layers(layers, with_slots, x, (per_layer, slots), remat=remat)
        if cache is None or slots is None:
            return x, None
        end = cache.index + x.shape[1]
        return jnp.where(end <= self.seen.shape[1], x, jnp.nan), Cache(slots[0], slots[1], self.seen, end)


def write(slots: Array, new: Array, start: Array | int) -> Array:
    """`slots (batch, s, ...)` with `new (batch, t, ...)` in the slots from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)


def positions_in_segments(segment_ids: Array) -> Array:
    """Each token's place in its segment, segments being runs of one id: `[1, 1, 2, 2, 2] -> [0, 1, 0, 1, 2]`."""
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


@dataclass(frozen=True)
class CausalApply(Apply):
    """The pure function of a decoder: `apply(params, tokens) -> logits`. It compares and hashes by its config.

    Tokens are `(batch, length)` integers and logits `(batch, length, vocabulary)` in float32. Packed batches give
    `segment_ids (batch, length)`: a token sees the earlier ones of its own segment, 0 is padding. `positions` default
    to the places within segments. With a `cache` (see `init_cache`) a call appends its tokens and returns `(logits,
    cache)`; each row is then one sequence and `segment_ids` only marks padding, on either side.

    The family's module has the methods `hidden(tokens, positions, segment_ids, cache) -> (hidden, cache)`, cache None
    where none is given, and `logits(hidden)`.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24,
    ...               num_hidden_layers=2, num_attention_heads=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config)
    >>> apply(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 32)
    """

    @property
    def task(self) -> str:
        """HF PEFT's word for a language model."""
        return "CAUSAL_LM"

    def __call__(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        """Logits, or `(logits, cache)` where a cache is given.

        Raises:
            ValueError: where tokens, segment_ids, positions and cache do not fit together.
        """
        result = self.hidden(params, tokens, positions=positions, segment_ids=segment_ids, cache=cache)
        if cache is None:
            return self.logits_from_hidden(params, result)
        return self.logits_from_hidden(params, result[0]), result[1]

    def hidden(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        """The final hidden states `(batch, length, features)`, normalised; `(hidden, cache)` where a cache is given."""
        check_tokens(tokens, positions=positions, segment_ids=segment_ids)
        _check_cache(tokens, cache)
        hidden, cache_after = self.run("hidden", params, tokens, positions, segment_ids, cache)
        return hidden if cache is None else (hidden, cache_after)

    def logits_from_hidden(self, params, hidden) -> Array:
        """The vocabulary head on hidden states `(..., features)`, so that a loss can go through them in chunks."""
        return self.run("logits", params, hidden)

    def init_cache(self, batch: int, max_length: int, dtype=None) -> Cache:
        """An empty cache."""
        return Cache.empty(self.config, batch, max_length, dtype)


def _check_cache(tokens, cache):
    if cache is not None and (
        cache.segment_ids.shape[0] != len(tokens) or cache.segment_ids.shape[1] < tokens.shape[1]
    ):
        rows, slots = cache.segment_ids.shape
        raise ValueError(
            f"expected a cache for {tokens.shape[0]} rows of {tokens.shape[1]} tokens or more, got one for {rows} rows "
            f"of {slots}; make it with init_cache(apply, batch, max_length)"
        )
