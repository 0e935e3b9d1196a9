"""Prompts: virtual tokens put into a batch, and the positions that an attention prefix takes.

A virtual token is an id of `VIRTUAL` or more. A method that trains prompts adapts the model's embedding: there such an
id finds a trained row, wherever it stands; nothing else of the model knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["VIRTUAL", "prompted"]

VIRTUAL = 2**30
"""The first virtual id, above every vocabulary."""

# What a virtual token brings in each of a batch's arrays.
_FILL = {"targets": 0, "weights": 0, "labels": -100, "mask": 1, "token_type_ids": 0}


def prompted(
    batch: Mapping[str, Any],
    method,
    *,
    at: Sequence[int] = (),
    segments: int | None = None,
    max_length: int | None = None,
    stream: str = "",
) -> dict[str, Any]:
    """The batch as the method's adapter needs it: with virtual tokens in every sequence, with positions shifted.

    Shapes: every array whose first two axes are those of `tokens`, `(rows, length)`, becomes
    `(rows, length + segments · num_tokens)`; what is left over at a row's end is padding (zeros, `labels` -100). Others
    stay as they are. A method that trains no prompt and no prefix leaves the batch as it is.

    | entry | at a virtual token |
    |---|---|
    | `tokens` | `VIRTUAL + j`, j of the method's prompt (of the row's task, where the batch has `tasks` `(rows,)`) |
    | `targets`, `weights`, `token_type_ids` | 0: nothing is learned there |
    | `labels` | -100 |
    | `mask` | 1 |
    | `segment_ids` | those of its sequence |
    | `positions` | counted on from its sequence's first position, as are the tokens after it |

    A prefix in the attention (`method.position_shift`) adds no token: the `positions` begin behind it.

    Args:
        batch: arrays by name, as the trainer makes them; `tokens` at least. Where there are `segment_ids` (packed rows;
            0 is padding) each segment gets the prompt, where there is a `mask` the masked tokens are padding.
        method: the method that the adapter was made with.
        at: for each virtual token, before which of the sequence's own tokens it stands, growing; all before the first
            where empty. P-tuning's templates: `at=(0, 0, 3, 3)` puts two in front and two before the fourth token.
        segments: the most sequences in a row; counted where the batch is concrete, 1 for rows that are not packed.
        max_length: the model's context.
        stream: a prefix of the entries' names, `"decoder_"` for the decoder's half of an encoder-decoder batch.

    Raises:
        ValueError: a result longer than `max_length`, more segments than said, an entry shaped like the tokens that
            the table does not have, `at` of another length, `tasks` that the method does not have.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> batch = {"tokens": jnp.array([[5, 6, 7]]), "segment_ids": jnp.array([[1, 1, 0]])}
        >>> jpeft.prompted(batch, jpeft.PromptTuning(num_tokens=2))["segment_ids"]
        Array([[1, 1, 1, 1, 0]], dtype=int32)
    """
    name = lambda entry: stream + entry
    tokens = batch[name("tokens")]
    rows, length = tokens.shape
    count, shift = method.prompt_length, method.position_shift
    if not count and not shift:
        return dict(batch)
    own = {k: x for k, x in batch.items() if k.startswith(stream) and getattr(x, "shape", ())[:2] == (rows, length)}
    known = {name(entry) for entry in ("tokens", "segment_ids", "positions", *_FILL)}
    if not stream:
        own = {k: x for k, x in own.items() if not k.startswith("decoder_")}
    if unknown := sorted(set(own) - known):
        raise ValueError(f"expected entries shaped like the tokens among {sorted(known)}, got {unknown} as well")

    ids = batch.get(name("segment_ids"), batch.get(name("mask")))
    ids = jnp.ones((rows, length), jnp.int32) if ids is None else jnp.asarray(ids).astype(jnp.int32)
    begins = (ids != jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]) & (ids != 0)
    started = jnp.cumsum(begins, axis=1)  # sequences of the row that have begun
    inside = jnp.arange(length) - jax.lax.cummax(jnp.where(begins, jnp.arange(length), 0), axis=1)
    result = dict(batch)
    if not count:
        positions = batch.get(name("positions"), jnp.where(ids != 0, inside, 0))
        result[name("positions")] = jnp.asarray(positions) + jnp.where(ids != 0, shift, 0)
        return result

    segments = _segments(started, name("segment_ids") in batch, segments)
    total = length + segments * count
    if max_length is not None and total > max_length:
        raise ValueError(
            f"the prompt overflows the context: {length} tokens and {segments} · {count} virtual ones are {total}, the "
            f"model holds {max_length}; cut the rows to {max_length - segments * count}, or use fewer virtual tokens"
        )
    before = jnp.asarray(_places(at, count))
    sizes = jax.vmap(lambda s, real: jnp.zeros(segments + 1, jnp.int32).at[s].add(real))(started, (ids != 0) * 1)
    earlier = (before <= inside[..., None]).sum(-1)  # virtual tokens of its own sequence before a token
    place = jnp.arange(length) + jnp.where(started > 0, (started - 1) * count + earlier, 0)
    first = jnp.where(begins, jnp.arange(length), total)  # where in the row each sequence begins
    first = jnp.sort(first, axis=1)[:, :segments] if segments <= length else first
    virtual = first[..., None] + (jnp.arange(segments) * count)[:, None] + jnp.arange(count)
    virtual = virtual + jnp.minimum(before, sizes[:, 1 : segments + 1, None])
    virtual = jnp.where(first[..., None] < total, virtual, total)  # beyond the end: dropped

    row = jnp.arange(rows)[:, None]

    def insert(x, filled, padding=0):
        out = jnp.full((rows, total, *x.shape[2:]), padding, x.dtype)
        out = out.at[row, place].set(jnp.asarray(x), mode="drop")
        filled = jnp.broadcast_to(filled, (rows, segments, count)).reshape(rows, -1)
        return out.at[row, virtual.reshape(rows, -1)].set(filled.astype(x.dtype), mode="drop")

    for entry, x in own.items():
        bare = entry.removeprefix(stream)
        x = jnp.asarray(x)
        if bare == "tokens":
            result[entry] = insert(x, _virtual_ids(method, batch, rows)[:, None, :])
        elif bare == "segment_ids":
            starts = jnp.take_along_axis(x, jnp.minimum(first, length - 1), axis=1)
            result[entry] = insert(x, starts[..., None])
        elif bare == "positions":
            at_start = jnp.take_along_axis(x, jnp.minimum(first, length - 1), axis=1)
            moved = x + jnp.where(ids != 0, earlier, 0)
            steps = jnp.arange(count) + jnp.minimum(before, sizes[:, 1 : segments + 1, None])
            result[entry] = insert(moved, at_start[..., None] + steps)
        else:
            result[entry] = insert(x, _FILL[bare], -100 if bare == "labels" else 0)
    return result


def _segments(started, packed: bool, segments: int | None) -> int:
    """The most sequences in a row, as far as it can be known."""
    if isinstance(started, jax.core.Tracer):
        if packed and segments is None:
            raise ValueError("expected segments=, the most sequences in a packed row: it decides shapes, under jit too")
        return segments or 1
    most = int(np.max(np.asarray(started), initial=0))
    if segments is not None and most > segments:
        raise ValueError(f"expected at most segments={segments} sequences in a row, got {most}")
    return segments or max(most, 1)


def _places(at: Sequence[int], count: int) -> np.ndarray:
    places = np.asarray(at if len(at) else (0,) * count)
    if places.shape != (count,) or np.any(np.diff(places) < 0) or np.any(places < 0):
        raise ValueError(f"expected at= with a growing place for each of {count} virtual tokens, got {tuple(at)}")
    return places


def _virtual_ids(method, batch, rows: int):
    """`(rows, num_tokens)`: the ids of each row's prompt."""
    tasks = batch.get("tasks")
    if method.num_prompts > 1 and tasks is None:
        raise ValueError(f"expected the batch to have tasks (rows,), one of {method.num_prompts} for each row")
    if tasks is None:
        return jnp.broadcast_to(VIRTUAL + jnp.arange(method.prompt_length), (rows, method.prompt_length))
    if not isinstance(tasks, jax.core.Tracer) and not np.all((0 <= np.asarray(tasks)) & (tasks < method.num_prompts)):
        raise ValueError(f"expected tasks from 0 to {method.num_prompts - 1}, got {np.unique(np.asarray(tasks))}")
    return VIRTUAL + jnp.asarray(tasks)[:, None] * method.prompt_length + jnp.arange(method.prompt_length)
