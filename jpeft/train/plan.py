"""The training step compiled ahead of time for devices that are not there: what it takes, or why it does not fit."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.core.sites import Sites
from jpeft.parallel.layout import shard
from jpeft.parallel.mesh import describe
from jpeft.parallel.offload import results_in_host
from jpeft.parallel.program import Collective, collectives, flops, memory, per_device
from jpeft.train.step import State, make_step, state_shardings

__all__ = ["Plan", "abstract_batch", "flops_per_token", "plan"]

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What one step takes on one device.

    Attributes:
        mesh: as it is written.
        fits: whether the compiler found room.
        gib: what is needed at the peak, in GiB; what the compiler said where it does not fit.
        limit_gib: what there is.
        parts_gib: of what. Temporaries hold the activations; of a program that does not fit they are what is left of
            `gib`.
        host_gib: in the host's memory.
        exchanges: collectives of a step; of none where it does not fit.
        seconds: lowering and compiling.
        text: the optimised HLO; empty where it does not fit.
    """

    mesh: str
    fits: bool
    gib: float
    limit_gib: float
    parts_gib: dict[str, float]
    host_gib: float = 0.0
    exchanges: tuple[Collective, ...] = ()
    seconds: float = 0.0
    text: str = ""

    @property
    def headroom(self) -> float:
        """What is left, as a part of the limit; negative where it does not fit."""
        return 1 - self.gib / self.limit_gib

    @property
    def gathered_bytes(self) -> dict[str, int]:
        """Bytes gathered on each device in a step, by dtype.

        On slices of hundreds of chips the TPU's compiler writes gathers of small pieces as sums of `u32` words, zero on
        all devices but one: nothing else sums such words, and they count as gathered.
        """
        found: dict[str, int] = {}
        for e in self.exchanges:
            if e.kind == "all-gather" or (e.kind, e.dtype) == ("all-reduce", "u32"):
                found[e.dtype] = found.get(e.dtype, 0) + e.bytes
        return found


def abstract_batch(rows: int, length: int, sharding=None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `data.batches` gives."""
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in dtypes.items()}


def flops_per_token(apply: Callable, params, sites: Sites, method, tx: optax.GradientTransformation, length: int):
    """Floating-point operations of a step a token, in rows of `length`: what is computed again counts again."""
    trainable, frozen = _halves(method, params, sites)
    state = jax.eval_shape(lambda t: State(jnp.zeros((), jnp.int32), t, tx.init(t)), trainable)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return flops(make_step(apply, method, tx), state, frozen, abstract_batch(1, length), key) / length


def plan(
    apply: Callable,
    params,
    sites: Sites,
    method,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rows: int,
    length: int,
    limit_gib: float,
    accumulation: int = 1,
) -> Plan:
    """Compile the step for the mesh's devices, which need not exist here, and read what it takes. Nothing runs.

    Args:
        params: the pretrained tree's shapes.
        rows: of the whole batch, all devices'.
        limit_gib: what a program may use on one device.

    Raises:
        ValueError: a mesh that does not fit the model or the batch; an optimizer whose state is the host's, on devices
            that show no memory of a host.
    """
    begun = time.perf_counter()
    layout = shard(mesh, method, params, sites, tx)
    layout.check_rows(rows)
    if rows // accumulation % layout.batch_shards:
        raise ValueError(
            f"microbatches of {rows // accumulation} rows cannot be split over {layout.batch_shards} devices; "
            f"accumulation may be at most {rows // layout.batch_shards}"
        )
    trainable, frozen = _halves(method, params, sites)
    if any(jax.tree.leaves(results_in_host(tx.init, trainable))):
        _check_host(mesh.devices.flat[0])
    state = jax.eval_shape(lambda t: State(jnp.zeros((), jnp.int32), t, tx.init(t)), trainable)
    on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state, frozen = jax.tree.map(on, state, state_shardings(layout)), jax.tree.map(on, frozen, layout.frozen)
    batch = abstract_batch(rows, length, layout.batch)
    key = on(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    shards = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    parts = {
        "weights": per_device(frozen, layout.frozen),
        "adapters": per_device(state.trainable, layout.trainable),
        "optimizer": per_device(*_on_device(state.optimizer_state)),
        "batch": per_device(batch, shards(batch)),
    }
    step = make_step(apply, method, tx, accumulation, layout)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, batch, key)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error))
            if needed is None:
                raise
            parts = {name: size / GIB for name, size in parts.items()}
            parts["temporaries"] = max(0.0, needed - sum(parts.values()))
            seconds = time.perf_counter() - begun
            return Plan(describe(mesh.shape), False, needed, limit_gib, parts, seconds=seconds)
    found, text = memory(compiled), compiled.as_text()
    parts |= {"temporaries": found.temporaries + found.results, "program": found.program}
    return Plan(
        describe(mesh.shape),
        found.peak / GIB <= limit_gib,
        found.peak / GIB,
        limit_gib,
        {name: size / GIB for name, size in parts.items()},
        found.host / GIB,
        tuple(collectives(text)),
        time.perf_counter() - begun,
        text,
    )


def _check_host(device) -> None:
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"{device.device_kind}, only compiled for, shows no memory of a host to keep the optimizer's state in; "
            "plan with the state on the device, where it takes what the plan says of the optimizer"
        )


def _on_device(state) -> tuple[list, list]:
    """The arrays of a state that are not in the host's memory, and their shardings."""
    here = [x for x in jax.tree.leaves(state) if x.sharding.memory_kind != "pinned_host"]
    return here, [x.sharding for x in here]


def _halves(method, params, sites) -> tuple[Any, Any]:
    return jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), params)


def _needed(message: str) -> float | None:
    """GiB that a program needs, from the compiler's refusal; None where it refused for another reason."""
    units = {"": GIB, "K": 2**20, "M": 2**10, "G": 1.0}
    for pattern in (r"Used ([\d.]+)([KMG]?)\S* of [\d.]+[KMG]? ?hbm", r"\(([\d.]+)([KMG])\) exceeds available HBM"):
        if found := re.search(pattern, message):
            return float(found[1]) / units[found[2]]
    return None
