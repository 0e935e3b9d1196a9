"""Prompts: virtual tokens put into a batch, and the positions that an attention prefix takes.

A virtual token is an id of `VIRTUAL` or more. A method that trains prompts adapts the model's embedding: there such an
id finds a trained row, wherever it stands; nothing else of the model knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["VIRTUAL", "prompted"]

VIRTUAL = 2**30
"""The first virtual id, above every vocabulary."""

# What a virtual token brings in each of a batch's arrays; `tokens`, `positions` and `segment_ids` are made to measure.
_FILL = {"labels": -100, "mask": 1, "token_type_ids": 0, "targets": 0, "weights": 0}
_ENTRIES = ("tokens", "segment_ids", "positions", *_FILL)
_OF_THE_NEXT = ("targets", "weights")  # what stands at a token and is about the one after it
_OF_THE_LOSS = (*_OF_THE_NEXT, "labels")
_DECODER = "decoder_"


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

    Shapes: every entry of the table becomes `(rows, length + segments · num_tokens)`. What is left over at the end of a
    row with fewer sequences is padding: zeros, and -100 in the `labels`. Entries without an item for each token stay as
    they are. A method with neither prompt nor prefix leaves the batch as it is.

    | entry (rows, length) | at a virtual token |
    |---|---|
    | `tokens` | `VIRTUAL + j`, j of the method's prompt (of the row's task, where the batch has `tasks` `(rows,)`) |
    | `targets`, `weights` | those of the token before it, where the next token is one of the sequence's own; else 0 |
    | `labels` | -100 |
    | `mask` | 1 |
    | `token_type_ids` | 0 |
    | `segment_ids` | those of its sequence |
    | `positions` | counted on from its sequence's first position, as are the tokens after it |

    `targets` and `weights` are of the next token, so that the last virtual token in front of it learns it; nothing
    learns the first of a sequence, as before. A prefix in the attention (`method.position_shift`) adds no token: the
    `positions`, made where the batch has none, begin behind it.

    Args:
        batch: arrays by name, of NumPy or JAX; `tokens` at least. With `segment_ids` (packed rows, 0 is padding) every
            run of one id is a sequence and gets the prompt. With a `mask` a row is one sequence, from its first token
            that counts to its last. With neither there is no padding.
        method: the method that the adapter was made with.
        at: for each virtual token, before which of the sequence's own tokens it stands, growing; all before the first
            where empty. P-tuning's templates: `at=(0, 0, 3, 3)` puts two in front and two before the fourth token. In a
            sequence of fewer tokens those stand behind the last one.
        segments: the most sequences in a row. Counted where the batch is concrete; of packed rows it must be said under
            `jit`, as it decides the shape: sequences beyond it would get no prompt there, and be cut off.
        max_length: the model's context.
        stream: `"decoder_"` for the decoder's half of an encoder-decoder batch, whose entries begin so. The `targets`,
            `weights` and `labels` of a batch that has `decoder_tokens` belong to it.

    Raises:
        ValueError: tokens that are not `(rows, length)`; a result longer than `max_length`; more segments than said, or
            none said under `jit`; an entry shaped like the tokens that the table does not have; `at` of another length,
            falling or below zero; `tasks` that are missing, or that the method does not have.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> batch = {"tokens": jnp.array([[5, 6, 7]]), "segment_ids": jnp.array([[1, 1, 0]])}
        >>> jpeft.prompted(batch, jpeft.PromptTuning(num_tokens=2))["segment_ids"]
        Array([[1, 1, 1, 1, 0]], dtype=int32)
    """
    count, shift = method.prompt_length, method.position_shift
    if not count and not shift:
        return dict(batch)
    shape = np.shape(batch[stream + "tokens"])
    if len(shape) != 2:
        raise ValueError(f"expected {stream}tokens of shape (rows, length), got {shape}")
    own = _own(batch, stream, shape)
    sequences = _Sequences.of(own, shape)
    if shift:
        positions = own.get("positions", jnp.where(sequences.real, sequences.inside, 0))
        own["positions"] = positions + jnp.where(sequences.real, shift, 0).astype(positions.dtype)
    if count:
        most = _segments(sequences.started, "segment_ids" in own, segments)
        _check_length(shape[1], most, count, shift, max_length)
        places = _Places.of(sequences, _checked(at, count), most)
        ids = _virtual_ids(method, batch.get("tasks"), shape[0])
        own = {entry: places.filled(entry, x, ids) for entry, x in own.items()}
    else:
        _check_length(shape[1], 0, 0, shift, max_length)
    named = lambda entry: entry if entry in _OF_THE_LOSS and entry in batch else stream + entry
    return {**batch, **{named(entry): x for entry, x in own.items()}}


def _own(batch: Mapping[str, Any], stream: str, shape: tuple[int, ...]) -> dict[str, Array]:
    """The stream's entries with an item for each token, by their names in the table."""
    two = _DECODER + "tokens" in batch
    stream_of = lambda k: _DECODER if two and (k.startswith(_DECODER) or k in _OF_THE_LOSS) else ""
    own = {k.removeprefix(stream): x for k, x in batch.items() if stream_of(k) == stream and np.shape(x)[:2] == shape}
    if unknown := sorted(set(own) - set(_ENTRIES)):
        raise ValueError(f"expected entries shaped like the tokens among {sorted(_ENTRIES)}, got {unknown} as well")
    return {entry: jnp.asarray(x) for entry, x in own.items()}


@dataclass(frozen=True)
class _Sequences:
    """Which tokens count, `real`; how many sequences of the row have begun, `started`; a token's place in its own,
    `inside`, 0 for the first. All (rows, length).
    """

    real: Array
    started: Array
    inside: Array

    @classmethod
    def of(cls, own: dict[str, Array], shape) -> _Sequences:
        ids = own.get("segment_ids", own.get("mask", jnp.ones(shape, jnp.int32))).astype(jnp.int32)
        real = ids != 0
        if "segment_ids" in own:
            begins = real & (ids != jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1])
        else:
            begins = real & (jnp.cumsum(real, axis=1) == 1)
        index = jnp.arange(shape[1])
        inside = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        return cls(real, jnp.cumsum(begins, axis=1), inside)


@dataclass(frozen=True)
class _Places:
    """Where in the new rows everything goes.

    Shapes: first (rows, segments), where in the old row a sequence begins, beyond its end for one that there is not;
    token, target (rows, length); virtual (rows, segments, count); earlier (rows, length), the virtual tokens of its own
    sequence before a token; steps (rows, segments, count), the tokens of its sequence before a virtual one.
    """

    total: int
    first: Array
    token: Array
    target: Array
    virtual: Array
    earlier: Array
    steps: Array

    @classmethod
    def of(cls, given: _Sequences, before: np.ndarray, segments: int) -> _Places:
        rows, length = given.real.shape
        count, index, row = len(before), jnp.arange(length), jnp.arange(rows)[:, None]
        total = length + segments * count
        ends = jnp.where(given.real, given.inside + 1, 0)
        sizes = jnp.zeros((rows, segments + 1), jnp.int32).at[row, given.started].max(ends, mode="drop")
        begins = given.real & (given.inside == 0) & (given.started > 0)
        first = jnp.full((rows, segments + 1), total).at[row, jnp.where(begins, given.started, 0)].min(index)[:, 1:]

        size = jnp.take_along_axis(sizes, jnp.minimum(given.started, segments), axis=1)

        def earlier(inside):
            """Virtual tokens before a place in a sequence; behind its end, all."""
            return jnp.where(inside < size, jnp.searchsorted(before, inside, side="right"), count)

        offset = jnp.maximum(given.started - 1, 0) * count
        begun = given.started > 0
        put = lambda inside: index + jnp.where(begun, offset + earlier(inside), 0)
        steps = jnp.arange(count) + jnp.minimum(before, sizes[:, 1:, None])
        virtual = first[..., None] + (jnp.arange(segments) * count)[:, None] + steps
        return cls(
            total,
            first,
            token=put(given.inside),
            target=put(given.inside + 1),
            virtual=jnp.where(first[..., None] < length, virtual, total),  # beyond the end: dropped
            earlier=jnp.where(given.real, earlier(given.inside), 0),
            steps=steps,
        )

    def filled(self, entry: str, x: Array, ids: Array) -> Array:
        """An entry with its virtual tokens."""
        if entry == "tokens":
            x, fill = x.astype(jnp.promote_types(x.dtype, jnp.int32)), ids[:, None, :]
        elif entry == "segment_ids":
            fill = self.at_start(x)
        elif entry == "positions":
            x, fill = x + self.earlier.astype(x.dtype), self.at_start(x) + self.steps
        else:
            fill = jnp.asarray(_FILL[entry])
        row = jnp.arange(len(x))[:, None]
        out = jnp.full((len(x), self.total, *x.shape[2:]), _FILL["labels"] if entry == "labels" else 0, x.dtype)
        if entry in _OF_THE_NEXT:
            return out.at[row, self.target].set(x, mode="drop")
        fill = jnp.broadcast_to(fill, self.virtual.shape).reshape(len(x), -1, *(1,) * (x.ndim - 2))
        virtual = self.virtual.reshape(len(x), -1)
        return out.at[row, self.token].set(x, mode="drop").at[row, virtual].set(fill.astype(x.dtype), mode="drop")

    def at_start(self, x: Array) -> Array:
        """Of each sequence's first token, (rows, segments, 1)."""
        return jnp.take_along_axis(x, jnp.minimum(self.first, x.shape[1] - 1), axis=1)[..., None]


def _segments(started, packed: bool, segments: int | None) -> int:
    """The most sequences in a row, as far as it can be known."""
    if segments is not None and segments < 1:
        raise ValueError(f"expected segments >= 1, got {segments=}")
    if isinstance(started, jax.core.Tracer):
        if packed and segments is None:
            raise ValueError("expected segments=, the most sequences in a packed row: it decides shapes, under jit too")
        return segments or 1
    most = int(np.max(np.asarray(started), initial=0))
    if segments is not None and most > segments:
        raise ValueError(f"expected at most segments={segments} sequences in a row, got {most}")
    return segments or max(most, 1)


def _check_length(length: int, segments: int, count: int, shift: int, max_length: int | None) -> None:
    added = segments * count + shift
    if max_length is None or length + added <= max_length:
        return
    parts = [f"{segments} · {count} virtual ones"] * bool(count) + [f"a prefix of {shift}"] * bool(shift)
    cut = f"cut the rows to {max_length - added} tokens, or " if max_length > added else ""
    raise ValueError(
        f"the prompt overflows the context: {length} tokens and {' and '.join(parts)} are {length + added}, the model "
        f"holds {max_length}; {cut}use fewer virtual tokens"
    )


def _checked(at: Sequence[int], count: int) -> np.ndarray:
    places = np.asarray(at if len(at) else (0,) * count)
    whole = places.shape == (count,) and np.issubdtype(places.dtype, np.integer)
    if not whole or np.any(np.diff(places) < 0) or np.any(places < 0):
        raise ValueError(
            f"expected at= with a place for each of {count} virtual tokens, whole, growing, from 0 on, got {tuple(at)}"
        )
    return places


def _virtual_ids(method, tasks, rows: int) -> Array:
    """`(rows, num_tokens)`: the ids of each row's prompt."""
    if tasks is None and method.num_prompts > 1:
        raise ValueError(f"expected the batch to have tasks (rows,), one of {method.num_prompts} for each row")
    ids = VIRTUAL + jnp.arange(method.prompt_length)
    if tasks is None:
        return jnp.broadcast_to(ids, (rows, method.prompt_length))
    if np.shape(tasks) != (rows,):
        raise ValueError(f"expected tasks of shape (rows,) = ({rows},), got {np.shape(tasks)}")
    if not isinstance(tasks, jax.core.Tracer):
        known = np.unique(np.asarray(tasks))
        if np.any((known < 0) | (known >= method.num_prompts)):
            raise ValueError(f"expected tasks from 0 to {method.num_prompts - 1}, got {known}")
    return jnp.asarray(tasks, jnp.int32)[:, None] * method.prompt_length + ids
