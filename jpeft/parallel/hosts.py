"""Several processes that run one program, each on its own devices: joining them, and what one of them has of the rest.

The engine is JAX's own: `jax.distributed` finds the others, watches them and agrees on the step to stop at. Every
process runs the same code; a function here that says so must be called by all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

__all__ = [
    "ProcessLost",
    "everywhere",
    "is_first",
    "join",
    "meet",
    "only_first_prints",
    "place",
    "rows_here",
    "spread",
    "stop_asked",
    "watched",
    "whole",
]

HEARTBEAT_SECONDS = 60
"""A process that is not heard of for so long is lost, and the others end."""


class ProcessLost(RuntimeError):
    """Another process of the run is gone, and with it what its devices held."""


_ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Join the other processes of the run, if there are any. To be called before anything asks JAX for its devices.

    Args:
        coordinator: `host:port` of process 0, as the others reach it; `JAX_COORDINATOR_ADDRESS` where None.
        processes: how many there are; `JAX_NUM_PROCESSES` where None.
        process_id: this one's number, from 0; `JAX_PROCESS_ID` where None.
        distributed: find out from the cluster what is not given (Cloud TPU, GKE, Slurm, Open MPI). Where it is False
            and nothing is given, the process is alone.
        environment: where the variables are.

    Raises:
        ValueError: a part of the three, or numbers that do not fit, or a cluster that says nothing.
        RuntimeError: where JAX has its devices already, or the coordinator is not reached in five minutes.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    for name, variable in _ENVIRONMENT.items():
        if given[name] is None and environment.get(variable):
            given[name] = environment[variable] if name == "coordinator" else _number(variable, environment[variable])
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not distributed:
        return
    if missing and not distributed:
        names = ", ".join(f"--{name.replace('_', '-')} ({_ENVIRONMENT[name]})" for name in missing)
        raise ValueError(f"several processes need all of coordinator, processes and process id; missing: {names}")
    address, count, number = given["coordinator"], given["processes"], given["process_id"]
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"expected a coordinator as host:port, got {address!r}; write for example {address}:8476")
    if count is not None and number is not None and not 0 <= number < count:
        raise ValueError(f"expected a process id from 0 to {count - 1}, got {number} of {count} processes")
    if count == 1 and not distributed:
        return
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            cluster_detection_method=None if missing else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster that says who the processes are ({error}); give --coordinator HOST:PORT "
            "--processes N --process-id K"
        ) from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Standard output of process 0 alone; errors go where they always go."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def meet(where: str) -> None:
    """Wait until every process is here. All must call it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def everywhere(value: Any) -> list[Any]:
    """Every process's JSON value, in the order of the processes. All must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def whole(x) -> np.ndarray:
    """The values of an array that may lie on devices of several processes. All must call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def spread(tree, shardings) -> Any:
    """A tree's arrays where `shardings` says, on other processes' devices too. All must call it, with equal values."""

    def one(x, sharding):
        if sharding.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(one, tree, shardings)


def rows_here(sharding: Sharding, rows: int) -> list[int]:
    """Which rows of a batch, its first axis, this process's devices hold."""
    found = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in found if index for row in range(*index[0].indices(rows))})


def place(batch: dict[str, np.ndarray], sharding: Sharding, rows: int, held: Sequence[int]) -> dict[str, jax.Array]:
    """The whole batch's arrays, from the rows that each process holds.

    Args:
        batch: arrays whose first axis goes over `held`.
        sharding: of the whole batch's first axis.
        rows: of the whole batch.
        held: their numbers, ascending; `rows_here` at least.
    """
    number = {row: k for k, row in enumerate(held)}

    def one(x: np.ndarray) -> jax.Array:
        def piece(index) -> np.ndarray:
            return x[[number[row] for row in range(*index[0].indices(rows))]]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, piece)

    return {name: one(x) for name, x in batch.items()}


def stop_asked(step: int) -> bool:
    """Whether all processes are to stop before this step, as one got SIGTERM. All must call it, for each step."""
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Say it as ProcessLost, where an exchange with another process fails."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise ProcessLost(
            f"process {jax.process_index()} lost another one of {jax.process_count()}: look for the first error in the "
            "others' output. The run goes on from its last checkpoint when all are started again with the same command"
        ) from error


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"expected a number in {name}, got {text!r}")
    return int(text)
