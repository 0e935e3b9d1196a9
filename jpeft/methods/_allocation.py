"""AdaLoRA's training as optax transformations (Zhang et al. 2023, arXiv 2303.10512, sections 3.1 to 3.3).

A triplet k is a column of Q, its singular value λ and a row of P; a Weight names these three fields in `TRIPLETS`.

    I = |w·∇w|,    Ī ← β₁·Ī + (1 - β₁)·I,    Ū ← β₂·Ū + (1 - β₂)·|I - Ī|,    s = Ī·Ū       of every entry w
    S_k = s(λ_k) + mean_i s(Q_ik) + mean_j s(P_kj)                                         of every triplet
    λ_k = 0 unless S_k is among the b(t) highest                                           of all matrices together

Both see only gradients, updates and parameters of the trainable half, so they serve any loop, under `jit`, `vmap` (a
sweep) and `scan`; b(t) is looked up, so one compilation serves all steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.weight import Weight

if TYPE_CHECKING:
    import optax

__all__ = ["rank_allocator", "add_orthogonal_regularization", "orthogonality", "AllocatorState", "FORMS"]

FORMS = ("squared", "norm")
Triplet = tuple[jax.Array, jax.Array, jax.Array]


class AllocatorState(NamedTuple):
    """Updates made; Ī and Ū of every `(Q, Λ, P)` in the tree's order, float32; the state of what is wrapped."""

    step: jax.Array
    sensitivity: list[Triplet]
    uncertainty: list[Triplet]
    inner: Any


def rank_allocator(method, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, after whose update the triplets beyond the budget have a singular value of exactly zero.

    It wraps, as it needs the gradients that come in and the update that goes out. Every entry stays trainable, so a
    triplet may come back while the budget falls; in the last `tfinal` steps the same ones are kept.

    Args:
        method: an `AdaLoRA` with `total_steps`: the schedule and the smoothing.
        tx: the user's transformation.

    Raises:
        ValueError: no total_steps; at `init`: no triplets, or fewer than the target; at `update`: no parameters.

    Example:
        >>> import jpeft, optax
        >>> tx = jpeft.rank_allocator(jpeft.AdaLoRA(total_steps=1000), optax.adamw(1e-3))
    """
    import optax

    final = method.final_phase
    wrapped = optax.with_extra_args_support(tx)

    def init(params) -> Any:
        triplets = _triplets(params)
        first, last = _ends(triplets, method.target_rank)
        if not triplets or first < last:
            raise ValueError(
                f"expected the trainable half of an AdaLoRA with at least target_rank={method.target_rank} triplets a "
                f"matrix, got {first} triplets in {len(triplets)} leaves"
            )
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), triplets)
        return AllocatorState(jnp.zeros((), jnp.int32), zeros(), zeros(), wrapped.init(params))

    def update(updates, state: Any, params=None, **extra):
        if params is None:
            raise ValueError("the allocator weighs the parameters; write tx.update(gradients, state, trainable)")
        gradients = updates
        updates, inner = wrapped.update(gradients, state.inner, params, **extra)
        seen = params if method.sensitivity == "before" else optax.apply_updates(params, updates)
        step = state.step + 1
        entries = jax.tree.map(_sensitivity, _triplets(seen), _triplets(gradients))
        smoothed = _smoothed(method, state, entries)
        sensitivity, uncertainty = jax.tree.map(
            lambda new, old: jnp.where(step < final, new, old), smoothed, (state.sensitivity, state.uncertainty)
        )
        scores = _importance(jax.tree.map(jnp.multiply, sensitivity, uncertainty))
        first, last = _ends(_triplets(params), method.target_rank)
        planned = np.array([method.budget(t, first, last) for t in range(final + 1)], np.int32)
        kept = _highest(scores, jnp.asarray(planned)[jnp.minimum(step, final)])
        masking = (step >= final) | ((step > method.tinit) & (step % method.delta_t == 0))
        masked = [
            (dq, jnp.where(masking & ~keep, -value, dvalue), dp)
            for (dq, dvalue, dp), (_, value, _), keep in zip(_triplets(updates), _triplets(params), kept, strict=True)
        ]
        return _with_triplets(updates, masked), AllocatorState(step, sensitivity, uncertainty, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def add_orthogonal_regularization(
    weight: float, form: Literal["squared", "norm"] = "squared"
) -> optax.GradientTransformation:
    """Adds to the gradients that of `weight` times `orthogonality`, as optax's `add_decayed_weights` does its term's.

    Put it before `rank_allocator` in a chain: the paper's importance is that of the whole loss.

    Raises:
        ValueError: at `update`: no parameters.

    Example:
        >>> import jpeft, optax
        >>> tx = optax.chain(jpeft.add_orthogonal_regularization(0.1), optax.adamw(1e-3))
    """
    import optax

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("orthogonality is the parameters'; write tx.update(gradients, state, trainable)")
        term = jax.grad(orthogonality)(_triplets(params), form)
        total = jax.tree.map(lambda g, t: g + (weight * t).astype(g.dtype), _triplets(updates), term)
        return _with_triplets(updates, total), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def orthogonality(triplets: list[Triplet], form: str = "squared") -> jax.Array:
    """How far the vectors of all `(Q, Λ, P)` are from orthonormal.

    `"squared"`: Σ ‖QᵀQ - I‖² + ‖PPᵀ - I‖²; `"norm"`: the mean of ‖QᵀQ - I‖ and ‖PPᵀ - I‖ over all matrices.
    """
    squares = []
    for q, _, p in triplets:
        for rows in (q.mT, p):
            off = jnp.matmul(rows, rows.mT, precision="highest") - jnp.eye(rows.shape[-2], dtype=rows.dtype)
            squares.append(jnp.sum(off * off, (-2, -1)).ravel())
    each = jnp.concatenate(squares)
    return each.sum() if form == "squared" else jnp.sqrt(jnp.maximum(each, jnp.finfo(each.dtype).tiny)).mean()


def _is_triplets(x) -> bool:
    names = getattr(type(x), "TRIPLETS", ())
    return isinstance(x, Weight) and bool(names) and getattr(x, names[1]) is not None


def _triplets(tree) -> list[Triplet]:
    """`(Q, Λ, P)` of every Weight that has them, in the tree's order."""
    found = [x for x in jax.tree.leaves(tree, is_leaf=_is_triplets) if _is_triplets(x)]
    return [tuple(getattr(x, name) for name in type(x).TRIPLETS) for x in found]


def _with_triplets(tree, triplets: list[Triplet]) -> Any:
    """The tree with other `(Q, Λ, P)` in it: `_with_triplets(tree, _triplets(tree))` is the tree."""
    new = iter(triplets)
    put = lambda x: x.replace(**dict(zip(type(x).TRIPLETS, next(new), strict=True))) if _is_triplets(x) else x
    return jax.tree.map(put, tree, is_leaf=_is_triplets)


def _ends(triplets: list[Triplet], target: int) -> tuple[int, int]:
    """The budget at first, all triplets, and at last, so many a matrix."""
    values = [value for _, value, _ in triplets]
    return sum(v.size for v in values), target * sum(v.size // v.shape[-1] for v in values)


def _sensitivity(w, gradient):
    return jnp.abs(w.astype(jnp.float32) * gradient.astype(jnp.float32))


def _smoothed(method, state: AllocatorState, entries: list[Triplet]) -> tuple[list[Triplet], list[Triplet]]:
    """The next Ī and Ū."""
    average = lambda beta: lambda old, new: beta * old + (1 - beta) * new
    sensitivity = jax.tree.map(average(method.beta1), state.sensitivity, entries)
    distance = jax.tree.map(lambda new, i: jnp.abs(new - i), entries, sensitivity)
    return sensitivity, jax.tree.map(average(method.beta2), state.uncertainty, distance)


def _importance(scores: list[Triplet]) -> list[jax.Array]:
    """`S (*lead, rank)` of each `(Q, Λ, P)`, from those of its entries."""
    return [value + q.mean(-2) + p.mean(-1) for q, value, p in scores]


def _highest(scores: list[jax.Array], count) -> list[jax.Array]:
    """Booleans like the scores, true for exactly `count` of the highest; of equal ones the first."""
    flat = jnp.concatenate([s.ravel() for s in scores])
    place = jnp.argsort(jnp.argsort(-flat, stable=True))
    cuts = np.cumsum([s.size for s in scores])[:-1]
    return [k.reshape(s.shape) for k, s in zip(jnp.split(place < count, cuts), scores, strict=True)]
