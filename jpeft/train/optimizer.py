"""The default optimizer: AdamW under a clipped gradient, its rate rising linearly and falling by a cosine."""

from __future__ import annotations

import optax

from jpeft.parallel.offload import offload

__all__ = ["schedule", "adamw"]

_FLOOR = 0.1  # of the highest rate, where the cosine ends


def schedule(learning_rate: float, steps: int, warmup: float) -> optax.Schedule:
    """The rate of step 0 to `steps - 1`: up during the first `warmup` part, then down to a tenth."""
    rising = round(warmup * steps)
    if steps - rising < 1:
        return optax.constant_schedule(learning_rate)
    falling = optax.cosine_decay_schedule(learning_rate, steps - rising, alpha=_FLOOR)
    if not rising:
        return falling
    start = learning_rate / (rising + 1)  # the first step moves too
    return optax.join_schedules([optax.linear_schedule(start, learning_rate, rising), falling], [rising])


def adamw(
    learning_rate: float,
    steps: int,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    in_host: bool = False,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on gradients of global norm at most `clip_norm`.

    `in_host` keeps its moments in the host's memory, by `offload`.
    """
    tx = optax.adamw(schedule(learning_rate, steps, warmup), weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), offload(tx) if in_host else tx)
