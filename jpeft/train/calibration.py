"""What a method learns from the run's own data before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from jpeft.core.calibrate import calibrate
from jpeft.train import data
from jpeft.train.config import TrainConfig
from jpeft.train.step import loss_sum
from jpeft.train.tokens import Example

__all__ = ["calibration_for"]


def calibration_for(
    apply: Callable, params, sites, method, training: list[Example], config: TrainConfig, length: int
) -> Any:
    """The calibration that `method.init` takes, from the first `calibration_batches` batches; empty where it asks none.

    Padding is left out; the loss is the run's own. The same run gives the same calibration again.
    """
    endless = data.batches(training, length, config.batch_size, config.seed, config.packing)
    batches = itertools.islice(endless, config.calibration_batches)

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
