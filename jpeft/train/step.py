"""The training step: masked next-token cross-entropy, summed over microbatches and divided once by the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core.lift import lift
from jpeft.parallel.gathered import collected
from jpeft.parallel.layout import Layout
from jpeft.parallel.offload import in_host

__all__ = ["State", "init_state", "loss_sum", "make_step", "make_evaluation", "state_shardings"]

CHUNK = 2**25
"""Logits held at once, in elements; a larger batch is cut along the sequence and recomputed in the backward pass."""


class State(NamedTuple):
    """What a step changes. `step` counts the updates made."""

    step: jax.Array
    trainable: Any
    optimizer_state: Any


def init_state(trainable, tx: optax.GradientTransformation) -> State:
    """The state before the first step, on its own buffers, since the step donates them."""
    trainable = jax.tree.map(jnp.copy, trainable)
    state = State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))
    # Committed, as the step's results will be beside a loaded model: otherwise the second step compiles again.
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)


def state_shardings(layout: Layout) -> Any:
    """Where each array of a state lies."""
    whole: Any = NamedSharding(layout.mesh, PartitionSpec())
    return State(whole, layout.trainable, layout.optimizer_state)


def loss_sum(apply: Callable, bound, batch: dict[str, jax.Array]) -> jax.Array:
    """sum_t weight_t · -log p(target_t), float32; `batch` as `data.batches` makes it, leaves `(rows, length)`.

    Where `apply` has `hidden` and `logits_from_hidden`, large logits exist only a chunk of the sequence at a time.
    """
    rows, length = batch["tokens"].shape
    inputs = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    vocabulary = getattr(getattr(apply, "config", None), "vocab_size", 0)
    chunks = next(
        n for n in range(1, length + 1) if length % n == 0 and (rows * length // n * vocabulary <= CHUNK or n == length)
    )
    if chunks == 1 or not hasattr(apply, "hidden"):
        logits = lift(apply)(bound, batch["tokens"], **inputs)
        return _cross_entropy(logits, batch["targets"], batch["weights"])
    hidden = lift(apply.hidden)(bound, batch["tokens"], **inputs)
    bound = collected(bound)  # the head once, not for every chunk
    cut = lambda x: jnp.moveaxis(x.reshape(rows, chunks, length // chunks, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(bound, hidden, targets, weights):
        return _cross_entropy(lift(apply.logits_from_hidden)(bound, hidden), targets, weights)

    def body(total, chunk):
        return total + one(bound, *chunk), None

    chunked = (cut(hidden), cut(batch["targets"]), cut(batch["weights"]))
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), chunked)[0]


def _cross_entropy(logits, targets, weights) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights)


def make_step(
    apply: Callable,
    method,
    tx: optax.GradientTransformation,
    accumulation: int = 1,
    layout: Layout | None = None,
) -> Callable:
    """`step(state, frozen, batch, key) -> (state, metrics)`, compiled, donating the state.

    With a `layout` (of `parallel.shard`), each device sums over its own rows and the arrays stay where it says.

    The gradient is that of the whole batch's mean over learned tokens plus the method's penalty, however many
    microbatches it is summed over. The key is folded with the step's number, so a resumed run draws what an
    uninterrupted one draws. Where the loss or the gradient is not finite the state comes back as it was, and
    `metrics["finite"]` is False; `metrics["tokens"]` counts the batch's, padding left out. State in the host's memory
    is updated in place, by `jpeft.offload`.
    """
    tx = optax.with_extra_args_support(tx)
    bind = method.bind if layout is None else layout.bind

    def microbatch_loss(trainable, frozen, batch, key):
        return loss_sum(apply, bind(trainable, frozen, key), batch)

    def penalty(trainable):
        return jnp.asarray(method.penalty(trainable), jnp.float32)

    def gradient(trainable, frozen, batch, key):
        of = jax.value_and_grad(microbatch_loss)
        if accumulation == 1:
            return of(trainable, frozen, batch, key)

        def body(total, inputs):
            index, microbatch = inputs
            new = of(trainable, frozen, microbatch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, new), None

        cut = lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:])
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
        return jax.lax.scan(body, zero, (jnp.arange(accumulation), jax.tree.map(cut, batch)))[0]

    if layout is not None:
        gradient = layout.mapped(gradient)

    def step(state: State, frozen, batch, key):
        total, gradients = gradient(state.trainable, frozen, batch, jax.random.fold_in(key, state.step))
        learned = jnp.maximum(batch["weights"].sum(), 1)
        loss = total / learned
        penalties = jax.grad(penalty)(state.trainable)
        gradients = jax.tree.map(lambda g, p: (g / learned).astype(g.dtype) + p, gradients, penalties)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        offloaded = any(map(in_host, jax.tree.leaves(state.optimizer_state)))
        options = {"finite": finite} if offloaded else {}
        updates, optimizer_state = tx.update(gradients, state.optimizer_state, state.trainable, **options)
        new = State(state.step + 1, optax.apply_updates(state.trainable, updates), optimizer_state)
        kept = jax.tree.map(lambda a, b: a if in_host(b) else jnp.where(finite, a, b), new, state)
        tokens = jnp.sum(batch["segment_ids"] > 0)
        return kept, {"loss": loss, "gradient_norm": norm, "finite": finite, "tokens": tokens}

    if layout is None:
        return jax.jit(step, donate_argnums=0)
    kept = state_shardings(layout)
    return jax.jit(step, donate_argnums=0, out_shardings=(kept, NamedSharding(layout.mesh, PartitionSpec())))


def make_evaluation(apply: Callable, layout: Layout | None = None) -> Callable:
    """`evaluate(bound, batches) -> loss`: the mean over all learned tokens of all batches, dropout off.

    With a `layout`, `bound` is `(trainable, frozen)` as it says, the batches lie on `layout.batch`, and each device
    sums over its own rows.
    """
    sums = lambda bound, batch: (loss_sum(apply, bound, batch), batch["weights"].sum())
    compiled = jax.jit(sums if layout is None else layout.summed(sums))

    def evaluate(bound, batches) -> float:
        sums = [compiled(bound, batch) for batch in batches]
        tokens = math.fsum(float(n) for _, n in sums)
        return math.fsum(float(loss) for loss, _ in sums) / max(tokens, 1.0)

    return evaluate
