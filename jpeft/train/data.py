"""Packed batches: examples shuffled by the seed, several to a row, with a position that can be saved and restored."""

from __future__ import annotations

import functools

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from jpeft.train.tokens import Example

__all__ = ["batches", "fixed_batches", "rows_in_an_epoch"]

_BINS = 32  # rows filled at a time: more bins waste less padding and keep more rows in memory


def batches(
    examples: list[Example], length: int, batch_size: int, seed: int, packing: bool = True, first_position: int = 0
):
    """An endless iterator of batches, with `get_state()` and `set_state(state)` as JSON values.

    A batch is a dictionary of `(batch_size, length)` arrays: `tokens`, `targets` (the next token of the same example),
    `weights` (1 where the target is learned), `segment_ids` (1, 2, ... by example, 0 where padded), `positions` (within
    an example, from `first_position` on).
    """
    source = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    rename = functools.partial(_rename, first_position=first_position)
    return iter(_packed(source, length, seed, packing).batch(batch_size).map(rename))


def fixed_batches(
    examples: list[Example], length: int, batch_size: int, packing: bool = True, first_position: int = 0
) -> list[dict]:
    """Every example once, in order; the last batch is filled with empty rows, which weigh nothing."""
    rows = [_rename(row, first_position) for row in _rows_once(examples, length, packing)]
    rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[i : i + batch_size]]) for name in rows[0]}
        for i in range(0, len(rows), batch_size)
    ]


def rows_in_an_epoch(examples: list[Example], length: int, packing: bool = True) -> int:
    """How many rows one pass over the examples fills."""
    return sum(1 for _ in _rows_once(examples, length, packing))


def _rows_once(examples: list[Example], length: int, packing: bool):
    return iter(_packed(grain.MapDataset.source(examples), length, 0, packing))


def _packed(source, length: int, seed: int, packing: bool):
    return FirstFitPackIterDataset(
        source.map(_shifted).to_iter_dataset(),
        length_struct={"tokens": length, "targets": length, "weights": length},
        num_packing_bins=_BINS,
        seed=seed,
        max_sequences_per_bin=None if packing else 1,
    )


def _shifted(example: Example) -> dict[str, np.ndarray]:
    # Shifting inside the example, before packing, is what keeps the loss from crossing into a neighbour.
    return {
        "tokens": example.ids[:-1],
        "targets": np.where(example.learned, example.ids, 0)[1:],
        "weights": example.learned[1:].astype(np.float32),
    }


def _rename(row: dict, first_position: int) -> dict[str, np.ndarray]:
    return {
        "tokens": row["tokens"],
        "targets": row["targets"],
        "weights": row["weights"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"] + np.where(row["tokens_segment_ids"] > 0, first_position, 0),
    }
