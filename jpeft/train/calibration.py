"""What a method learns from the run's own data before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax

from jpeft.core.calibrate import calibrate
from jpeft.parallel import make_mesh
from jpeft.parallel.hosts import place, whole
from jpeft.parallel.layout import batch_sharding
from jpeft.train.config import TrainConfig
from jpeft.train.data import Batches, Dealt
from jpeft.train.step import loss_sum

__all__ = ["calibration_for"]


def calibration_for(apply: Callable, params, sites, method, training: Dealt, config: TrainConfig, length: int) -> Any:
    """The calibration that `method.init` takes, from the first `calibration_batches` batches; empty where it asks none.

    Padding is left out; the loss is the run's own. The same run gives the same calibration again.
    All processes must call it.
    """
    endless = Batches(training, length, config.batch_size, config.seed, config.packing)
    batches = itertools.islice(endless, config.calibration_batches)
    if jax.process_count() > 1:
        sharding = batch_sharding(make_mesh(config.mesh))
        placed = lambda batch: place(batch, sharding, config.batch_size, endless.rows)
        batches = ({name: whole(x) for name, x in placed(batch).items()} for batch in batches)

    def run(params, batch):
        return apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])

    return calibrate(
        run,
        params,
        sites,
        batches,
        method=method,
        loss=lambda params, batch: loss_sum(apply, params, batch) / batch["weights"].sum(),
        mask=lambda batch: batch["segment_ids"] > 0,
    )
