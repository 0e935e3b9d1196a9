"""The training loop: batches in, a run's folder out; stopped at any step, it goes on to the same result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jpeft.parallel import hosts, make_mesh, shard
from jpeft.train import data
from jpeft.train.adapter import fingerprint, save_adapter
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.config import TrainConfig
from jpeft.train.data import Dealt
from jpeft.train.folder import RunFolder
from jpeft.train.optimizer import adamw, schedule
from jpeft.train.report import Speed, plot_losses, progress
from jpeft.train.step import init_state, make_evaluation, make_step, state_shardings
from jpeft.train.tokens import Example, with_prompt

__all__ = ["Result", "fit", "total_steps"]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `finished` is False where a signal stopped it; `method` binds `trainable` and `frozen`."""

    finished: bool
    steps: int
    heldout_loss_before: float
    heldout_loss_after: float
    tokens_per_second: float
    method: Any
    trainable: Any
    frozen: Any


def fit(
    apply: Callable,
    params,
    sites,
    method,
    training: list[Example] | Dealt,
    held_out: list[Example],
    config: TrainConfig,
    length: int,
    folder: RunFolder | None = None,
    calibration=None,
    base: dict | None = None,
) -> Result:
    """Fine-tune `params` by `method`, writing all but the samples and the summary into the run's folder.

    `training` may be dealt already (`data.deal_here`). `calibration` is what a method that starts from data is given,
    by `calibration_for`. Rows of `length` hold the method's virtual tokens too. `base` is the fingerprint of the
    pretrained tree, where `params` were made of another.

    SIGTERM and the first SIGINT save a checkpoint and return; the same call then goes on from there. Of several
    processes, which all call this, one that gets the signal stops all of them, after the same step.

    Raises:
        ValueError: a loss that is not finite (the last good state is saved first), or a folder of another run.
        ProcessLost: another process of the run is gone.
    """
    config.check()
    folder = folder or RunFolder.plan(config)
    config = folder.settled(config)
    if not isinstance(training, Dealt):
        training = data.deal_here(training, config)
    with_prompts = functools.partial(_with_prompts, method=method)
    shown = training.map(with_prompts), with_prompts(held_out)
    steps = total_steps(config, shown[0], length)
    method = method.for_steps(steps)
    planned = schedule(config.learning_rate, steps, config.warmup)
    rate = lambda step: np.asarray(planned(step)).item()
    plain = adamw(
        config.learning_rate, steps, config.warmup, config.weight_decay, config.clip_norm, config.offload_optimizer
    )
    tx = method.optimizer(plain)
    key = jax.random.key(config.seed)
    layout = pretrained = None
    if config.mesh is not None:
        mesh = make_mesh(config.mesh)
        layout = shard(mesh, method, params, sites, tx, calibration or None)
        pretrained = shard(mesh, None, params, sites)
        params = hosts.spread(params, pretrained.frozen)
    trainable, frozen = method.init(key, params, sites, calibration or None)
    if layout is not None:
        trainable, frozen = hosts.spread((trainable, frozen), (layout.trainable, layout.frozen))
    state = init_state(trainable, tx)
    if layout is not None:
        state = hosts.spread(state, state_shardings(layout))
    step_fn, evaluate = make_step(apply, method, tx, config.accumulation, layout), make_evaluation(apply, layout)
    rows = config.batch_size, config.packing
    batches = data.Batches(shown[0], length, rows[0], config.seed, rows[1], method.position_shift)
    held_out_batches = data.fixed_batches(shown[1], length, *rows, method.position_shift)
    settings = {**config.to_dict(), "steps": steps, "training_checksum": _checksum(training)}
    base = base or fingerprint(params)

    def on_devices(batch, held: Sequence[int] = range(config.batch_size)):
        return batch if layout is None else hosts.place(batch, layout.batch, config.batch_size, held)

    def loss_before() -> float:
        plain_batches = map(on_devices, data.fixed_batches(held_out, length, *rows))
        return make_evaluation(apply, pretrained)(params if pretrained is None else ({}, params), plain_batches)

    def heldout_loss(*halves) -> float:
        return evaluate(method.bind(*halves) if layout is None else halves, map(on_devices, held_out_batches))

    folder.begin(config)
    adapter = lambda *kept: save_adapter(
        folder.path / "adapter",
        *kept,
        base=config.model or "",
        base_fingerprint=base,
        seed=config.seed,
    )
    speed = Speed()
    with _signals() as stopped, Checkpoints(folder.path / "checkpoints") as checkpoints, hosts.watched():
        save = lambda state, position: checkpoints.save(state, data.of_all(position), settings, base)
        if checkpoints.latest() is not None:
            state, position = checkpoints.restore(state, settings, base)
            batches.set_state(position)
            folder.rewind(int(state.step))
            held_out_losses = [m["heldout_loss"] for m in folder.metrics() if "heldout_loss" in m]
        else:
            held_out_losses = [loss_before()]
            folder.log(step=0, heldout_loss=held_out_losses[0])
            save(state, batches.get_state())
        done = start = int(state.step)
        with progress(start, steps, config.log_every, speed) as (update, say):
            say(f"held-out loss before: {held_out_losses[0]:.4f}" + (f"; going on from step {done}" if done else ""))
            while done < steps and not stopped(done):
                position, batch = batches.get_state(), next(batches)
                state, metrics = step_fn(state, frozen, on_devices(batch, batches.rows), key)
                metrics = jax.device_get(metrics)  # all in one transfer
                loss = float(metrics["loss"])
                if not metrics["finite"]:
                    save(state, position)
                    adapter(method, state.trainable, frozen)
                    raise _not_finite(done + 1, loss, float(metrics["gradient_norm"]), folder)
                done += 1
                tokens = int(metrics["tokens"])
                speed.step(tokens)
                folder.log(
                    step=done,
                    loss=loss,
                    gradient_norm=float(metrics["gradient_norm"]),
                    learning_rate=rate(done - 1),
                    tokens=tokens,
                )
                update(done, loss, rate(done - 1))
                if done == steps or config.evaluate_every and done % config.evaluate_every == 0:
                    held_out_losses.append(heldout_loss(state.trainable, frozen))
                    folder.log(step=done, heldout_loss=held_out_losses[-1])
                    say(f"held-out loss after {done} steps: {held_out_losses[-1]:.4f}")
                    speed.pause()
                if done % config.save_every == 0 or done == steps:
                    save(state, batches.get_state())
                    speed.pause()
        save(state, batches.get_state())
        kept = (method, state.trainable, frozen)
        if done == steps:
            kept = method.after_training(state.trainable, frozen)
        adapter(*kept)
    if hosts.is_first():
        plot_losses(folder.metrics(), folder.path / "loss.png")
    return Result(done == steps, done, held_out_losses[0], held_out_losses[-1], speed.tokens_per_second, *kept)


def total_steps(config: TrainConfig, training: Dealt, length: int) -> int:
    """`max_steps`, or as many steps as the epochs take. All processes must call it."""
    if config.max_steps is not None:
        return config.max_steps
    rows = sum(training.of_each(lambda examples: data.rows_in_an_epoch(examples, length, config.packing)))
    return max(1, math.ceil(config.epochs * rows / config.batch_size))


def _with_prompts(examples: Sequence[Example], method) -> list[Example]:
    return [with_prompt(example, method) for example in examples]


def _not_finite(step: int, loss: float, norm: float, folder: RunFolder) -> ValueError:
    return ValueError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}, which is not finite. The state after step "
        f"{step - 1} is in {folder.path}/adapter and {folder.path}/checkpoints. Start again in another --out with a "
        "lower --learning-rate, a longer --warmup, or --dtype float32"
    )


def _checksum(training: Dealt) -> int:
    def of_one(examples: Sequence[Example]) -> int:
        value = 0
        for example in examples:
            value = zlib.crc32(np.concatenate([example.ids, example.learned.astype(np.int32)]).tobytes(), value)
        return value

    return zlib.crc32(np.asarray(training.of_each(of_one), np.int64).tobytes())


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[int], bool]]:
    """`stopped(step)`: whether SIGTERM or SIGINT has come; a second one does what it always did.

    Of several processes JAX takes SIGTERM, and has them agree on the step to stop at.
    """
    several = jax.process_count() > 1
    asked = threading.Event()
    stopped = hosts.stop_asked if several else lambda step: asked.is_set()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {}

    def handler(number, _):
        signal.signal(number, before[number])
        if several:
            signal.raise_signal(signal.SIGTERM)
        asked.set()

    for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handler)
    try:
        yield stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old)
