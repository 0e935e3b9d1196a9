"""Generation with a key-value cache: one compiled loop for prompts of any lengths, in one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.lift import lift
from jpeft.parallel.hosts import whole

__all__ = ["generate", "sample_token"]

_BUCKET = 32  # lengths are rounded to multiples, so that few shapes are compiled


def generate(
    apply: Callable,
    bound,
    prompts: Sequence[Sequence[int]],
    new_cache: Callable,
    *,
    new_tokens: int,
    stops: Sequence[int],
    context: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    first_position: int = 0,
) -> list[list[int]]:
    """The new ids after each prompt, up to and without the first stop id.

    Args:
        apply: `apply(bound, tokens, positions=, cache=) -> (logits, cache)`, lifted here.
        new_cache: `new_cache(rows, length)`, an empty cache.
        context: the most ids, old and new, that the model can hold.
        temperature: 0 takes the likeliest id, and `top_p` and `seed` then say nothing.
        top_p: draw from the fewest likeliest ids whose probabilities reach this sum.
        first_position: of the first id: a prefix in the attention takes the positions before (`position_shift`).

    Raises:
        ValueError: a prompt that leaves no room for `new_tokens` in the context, an empty prompt, or a temperature or
            top_p out of range.
    """
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature=} and {top_p=}")
    if new_tokens < 1:
        raise ValueError(f"expected at least one new token, got {new_tokens=}")
    for i, prompt in enumerate(prompts):
        room = context - first_position - new_tokens
        if not 1 <= len(prompt) <= room:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; expected 1 to {room}, which the model's context of {context} "
                f"leaves beside {new_tokens} new tokens{f' and {first_position} of a prefix' if first_position else ''}"
                "; shorten it or ask for fewer"
            )
    lengths = np.array([len(p) for p in prompts])
    total = min(context - first_position, -(-(int(lengths.max()) + new_tokens) // _BUCKET) * _BUCKET)
    ids = np.zeros((len(prompts), total), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    prefill = int(lengths.min())
    prefill = prefill if prefill < _BUCKET else prefill // _BUCKET * _BUCKET
    cache, key = new_cache(len(prompts), total), jax.random.key(seed)
    ids = _complete(
        apply,
        bound,
        cache,
        ids,
        lengths,
        jnp.asarray(stops),
        key,
        temperature,
        top_p,
        new_tokens,
        first_position,
        prefill=prefill,
        greedy=temperature == 0,
    )
    found = []
    for row, start in zip(whole(ids), lengths, strict=True):
        new = row[start : start + new_tokens].tolist()
        found.append(new[: next((i for i, token in enumerate(new) if token in stops), len(new))])
    return found


def sample_token(logits: jax.Array, key: jax.Array, temperature, top_p) -> jax.Array:
    """One id per row of logits `(rows, vocabulary)`, drawn at a temperature from the likeliest `top_p` of the mass."""
    logits = logits / temperature
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the likeliest id is always kept
    lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= lowest, logits, -jnp.inf), axis=-1)


@functools.partial(jax.jit, static_argnames=("apply", "prefill", "greedy"))
def _complete(
    apply, bound, cache, ids, lengths, stops, key, temperature, top_p, new_tokens, offset, *, prefill, greedy
):
    # The shortest prompt's part is read at once; the rest of the longer ones goes through the loop, where their own
    # ids take the place of drawn ones. So no row is padded on the left and positions are the same in all rows.
    rows, total = ids.shape
    run = lift(apply)

    def read(tokens, first, cache):
        positions = jnp.broadcast_to(offset + first + jnp.arange(tokens.shape[1]), tokens.shape)
        logits, cache = run(bound, tokens, positions=positions, cache=cache)
        return logits[:, -1], cache

    def unfinished(carry):
        at, _, _, _, done = carry
        return (at < total) & ~done.all()

    def body(carry):
        at, ids, logits, cache, done = carry
        if greedy:
            drawn = logits.argmax(-1)
        else:
            drawn = sample_token(logits, jax.random.fold_in(key, at), temperature, top_p)
        token = jnp.where(at < lengths, ids[:, at], drawn).astype(ids.dtype)
        ids = ids.at[:, at].set(token)
        done |= (at >= lengths) & jnp.isin(token, stops) | (at + 1 >= lengths + new_tokens)
        logits, cache = read(token[:, None], at, cache)
        return at + 1, ids, logits, cache, done

    logits, cache = read(ids[:, :prefill], 0, cache)
    start = (jnp.asarray(prefill), ids, logits, cache, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, body, start)[1]
