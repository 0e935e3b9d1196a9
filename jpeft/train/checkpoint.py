"""Checkpoints of a run: state, data position and settings, written by Orbax, restored to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jpeft.parallel.hosts import ProcessLost
from jpeft.parallel.offload import in_host
from jpeft.train.adapter import flatten, refuse_other_base, unflatten
from jpeft.train.config import differences
from jpeft.train.step import State

__all__ = ["Checkpoints"]


class Checkpoints:
    """The `checkpoints/` folder of a run; the newest two are kept.

    Each holds the trainable arrays, the optimizer's state, the step, the data iterator's position, the settings and the
    base's fingerprint; never the base. The random key of a step follows from the settings' seed and the step.

    One appears whole or not at all. Of several processes each writes its own part of the arrays, and all must call
    every method.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        self._newest = self._manager.latest_step()

    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may be on its way to the disk."""
        return self._newest

    def save(self, state: State, position: Any, settings: dict, base_fingerprint: dict) -> None:
        """Write the state after `state.step` steps, unless it is there already.

        Returns as soon as the arrays are copied to the host; the rest is written while the run goes on, and the end of
        the `with` waits for it. An error of that writing is raised by the next call.
        """
        step = int(state.step)
        if step == self.latest():
            return
        meta = {"position": position, "settings": settings, "fingerprint": base_fingerprint}
        items = ocp.args.Composite(state=ocp.args.StandardSave(_numbered(state)), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items, force=True)
        self._newest = step

    def restore(self, like: State, settings: dict, base_fingerprint: dict) -> tuple[State, Any]:
        """`(state, data position)` of the newest checkpoint.

        Raises:
            ValueError: other settings, another base, or arrays that do not fit, each named.
        """
        step = self.latest()
        where = f"the checkpoint of step {step} in {self._manager.directory}"
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        refuse_other_base(meta["fingerprint"], base_fingerprint, where)
        changed = differences(meta["settings"], settings)
        if changed:
            raise ValueError(
                f"{where} was made with other settings; give those again, or another --out, or --overwrite to start "
                "anew\n  " + "\n  ".join(changed)
            )
        names = list(flatten(like))
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_struct, _numbered(like))))
        arrays = self._manager.restore(step, args=arguments).state
        flat = {name: arrays[f"{i:05d}"] for i, name in enumerate(names)}
        restored = unflatten(flat, like, where)
        # JAX takes what Orbax restores to be on the device, whatever the array's sharding says.
        back = lambda x, before: jax.device_put(x, jax.memory.Space.Host) if in_host(before) else x
        return jax.tree.map(back, restored, like), meta["position"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        # What writes beside the run waits for all processes: not where one of them is gone.
        if kind is None or not issubclass(kind, ProcessLost):
            self._manager.wait_until_finished()
            self._manager.close()


def _numbered(state: State) -> dict[str, jax.Array]:
    # Orbax knows dictionaries, not Weights; numbers, since a path may hold any character.
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _struct(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else np.asarray(x)
