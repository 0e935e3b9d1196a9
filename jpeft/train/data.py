"""Packed batches: examples shuffled by the seed, several to a row, with a position that can be saved and restored.

A run's examples are dealt into shards, and each shard fills its own rows of every batch. Of many processes each reads
the shards whose rows it holds; what a batch contains depends on the number of shards, not on that of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from jpeft.parallel import hosts, make_mesh
from jpeft.parallel.layout import batch_sharding, check_rows
from jpeft.train.config import TrainConfig
from jpeft.train.tokens import Example

__all__ = ["Batches", "Dealt", "deal", "deal_here", "fixed_batches", "of_all", "rows_in_an_epoch"]

_BINS = 32  # rows filled at a time: more bins waste less padding and keep more rows in memory


@dataclass(frozen=True)
class Dealt:
    """Items dealt one by one to `count` shards; `shards` has those that this process reads, by number."""

    count: int
    total: int
    shards: Mapping[int, Sequence[Any]]

    def map(self, fn: Callable[[Sequence[Any]], Sequence[Any]]) -> Dealt:
        """`fn` of each shard's items."""
        return Dealt(self.count, self.total, {k: fn(items) for k, items in self.shards.items()})

    def of_each(self, fn: Callable[[Sequence[Any]], Any]) -> list[Any]:
        """`fn`'s JSON value of every shard, of those too that other processes read. All processes must call it."""
        found = of_all({str(k): fn(items) for k, items in self.shards.items()})
        return [found[str(k)] for k in range(self.count)]


def deal(items: Sequence[Any], count: int = 1, held: Iterable[int] | None = None) -> Dealt:
    """Item k to shard k % count.

    Args:
        held: the shards that this process reads; all where None.

    Raises:
        ValueError: more shards than items.
    """
    if len(items) < count:
        raise ValueError(f"expected at least one record for each of {count} shards, got {len(items)}")
    return Dealt(count, len(items), {k: items[k::count] for k in sorted(range(count) if held is None else held)})


def deal_here(items: Sequence[Any], config: TrainConfig) -> Dealt:
    """As `deal`, to the `data_shards` of a settled config; on a mesh those alone that this process's rows need.

    Raises:
        ValueError: a batch that the mesh cannot share; more shards than items.
    """
    count, size = config.data_shards or 1, config.batch_size
    if config.mesh is None:
        return deal(items, count)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, size // config.accumulation)
    rows = hosts.rows_here(batch_sharding(mesh), size)
    return deal(items, count, {row * count // size for row in rows})


class Batches:
    """An endless iterator of batches, with `get_state()` and `set_state(state)` as JSON values.

    A batch is a dictionary of `(rows, length)` arrays: `tokens`, `targets` (the next token of the same example),
    `weights` (1 where the target is learned), `segment_ids` (1, 2, ... by example, 0 where padded), `positions` (within
    an example, from `first_position` on).

    Attributes:
        rows: the numbers, in the whole batch of `batch_size` rows, of those that are here.
    """

    def __init__(
        self,
        examples: Dealt,
        length: int,
        batch_size: int,
        seed: int,
        packing: bool = True,
        first_position: int = 0,
    ):
        if batch_size % examples.count:
            raise ValueError(f"expected shards that divide a batch of {batch_size} rows, got {examples.count}")
        each = batch_size // examples.count
        rename = functools.partial(_rename, first_position=first_position)
        self.rows = [row for k in examples.shards for row in range(k * each, (k + 1) * each)]
        self._shards = {}
        for k, shard in examples.shards.items():
            source = grain.MapDataset.source(shard).seed(seed).shuffle().repeat()
            self._shards[k] = iter(_packed(source, length, seed, packing).batch(each).map(rename))

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [next(shard) for shard in self._shards.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """The position of each shard that is read here, by its number."""
        return {str(k): shard.get_state() for k, shard in self._shards.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where `get_state` was called; of the positions of all shards each process takes its own."""
        for k, shard in self._shards.items():
            shard.set_state(state[str(k)])


def of_all(by_shard: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values by shard, as all processes together have them: `get_state`'s. All must call it."""
    return {k: value for here in hosts.everywhere(by_shard) for k, value in here.items()}


def fixed_batches(
    examples: Sequence[Example], length: int, batch_size: int, packing: bool = True, first_position: int = 0
) -> list[dict]:
    """Every example once, in order; the last batch is filled with empty rows, which weigh nothing."""
    rows = [_rename(row, first_position) for row in _rows_once(examples, length, packing)]
    rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[i : i + batch_size]]) for name in rows[0]}
        for i in range(0, len(rows), batch_size)
    ]


def rows_in_an_epoch(examples: Sequence[Example], length: int, packing: bool = True) -> int:
    """How many rows one pass over the examples fills."""
    return sum(1 for _ in _rows_once(examples, length, packing))


def _rows_once(examples: Sequence[Example], length: int, packing: bool):
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
