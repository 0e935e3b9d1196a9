"""PiSSA: principal singular values and vectors adaptation (Meng et al. 2024, arXiv 2404.02948).

    W' = R + s·A·B,        R = W − s·A₀·B₀,        W = U·S·Vᵀ,        A₀ = U_r·√(S_r/s),        B₀ = √(S_r/s)·V_rᵀ

with A (*stack, *batch, in, rank), B (*stack, *batch, rank, out) and the residual R frozen. The principal part of W
trains, so A₀·B₀ is W's best approximation of that rank and the start is the pretrained function. The paper takes s = 1
(alpha = rank); for another s the singular values are divided by it, as in HF PEFT.

On compressed weights W is what was compressed, and R is compressed in its place: `chain(NF4(), PiSSA())` is the
paper's QPiSSA, which loses less than compressing W does. Of a model that came compressed W is what it decodes to.

The start A₀, B₀ is kept beside R: on the weights as they were the adapter is `[A A₀]·[B; −B₀]`, a LoRA of twice the
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.method import Saved
from jpeft.core.sites import Site
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import Weight, dense, from_matrix, static, to_matrix, weight
from jpeft.methods.lora import LowRank, _LowRankMethod

__all__ = ["PiSSA", "Residual", "randomized_svd"]


@weight
class Residual(LowRank):
    """`base + scale · a @ b`, where `base + scale · start_a @ start_b` is the leaf as it was. Shapes as `LowRank`."""

    start_a: Any = None
    start_b: Any = None
    axes: str = static()

    FIELDS = {**LowRank.FIELDS, "start_a": "ir", "start_b": "ro"}
    SAVED = frozenset({"start_a", "start_b"})


@dataclass(frozen=True)
class _NonzeroStart(_LowRankMethod):
    """Methods whose A·B starts as a part of W, which is taken out of the base. They define `factors`.

    Another machine's decomposition may cut between two near singular values elsewhere: a saved adapter has its start.
    """

    ADDS_FROZEN = "the start of A and B is kept, without which the adapter means nothing on the original weights"

    def factors(self, key: jax.Array, matrix: jax.Array, site: Site, given) -> tuple[jax.Array, jax.Array]:
        """A₀ (*lead, in, rank) and B₀ (*lead, rank, out) for a leaf in matrix form and what calibration says of it."""
        raise TypeError(f"{type(self).__name__} defines no factors")

    def wrap_calibrated(self, key, leaf, site: Site, given) -> Residual:
        matrix = to_matrix(dense(self._pretrained(leaf, given)), site.axes)
        matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        if isinstance(given, Saved):
            start = _saved_start(given, site)
        else:
            start = self.factors(key, matrix, site, given)
        a, b = (factor.astype(self._dtype(leaf)) for factor in start)
        scale = self.scale_of(site.path)
        left = matrix - scale * jnp.matmul(a.astype(matrix.dtype), b.astype(matrix.dtype), precision="highest")
        left = from_matrix(left, site.axes, leaf.shape).astype(leaf.dtype)
        return Residual(
            leaf.standing_for(left) if isinstance(leaf, Weight) else left,
            a,
            b,
            start_a=jnp.copy(a),
            start_b=jnp.copy(b),
            axes=site.axes.lstrip("s"),
            scale=scale,
            dropout=self.dropout,
        )

    def _pretrained(self, leaf, given):
        """W: the leaf as it was before any method, where the method is shown it; else as it stands."""
        if self.OBSERVES != "weights":
            return leaf
        return given.weights if isinstance(given, Saved) else given

    def exported(self, trainable, frozen):
        """A `LoRA` of twice the rank on the original params, and its trainables."""
        more = 2 if self.scaling == "standard" else 2**0.5
        twice = lambda pattern, times: tuple((regex, times * value) for regex, value in pattern)
        plain = self._as_lora(
            (path for path, w in leaves_with_paths(trainable) if isinstance(w, Residual)),
            rank=2 * self.rank,
            alpha=more * self.alpha,
            rank_pattern=twice(self.rank_pattern, 2),
            alpha_pattern=twice(self.alpha_pattern, more),
        )
        halves = dict(leaves_with_paths(frozen))

        def joined(path, w):
            if not isinstance(w, Residual):
                return w
            a = jnp.concatenate([w.a, halves[path].start_a], axis=-1)
            b = jnp.concatenate([w.b, -halves[path].start_b], axis=-2)
            return LowRank(None, a, b, axes=w.axes, scale=plain.scale_of(path), dropout=w.dropout)

        return plain, map_with_paths(joined, trainable)


def _saved_start(given: Saved, site: Site) -> tuple[jax.Array, jax.Array]:
    missing = [name for name in ("start_a", "start_b") if name not in given]
    if missing:
        raise ValueError(f"{site.path}: the saved adapter lacks {' and '.join(missing)}; it has lost its frozen arrays")
    return given["start_a"], given["start_b"]


@dataclass(frozen=True)
class PiSSA(_NonzeroStart):
    """LoRA on the principal part of each weight. Mergeable; the pretrained function at the start, to rounding.

    Fields:
        iterations: of the randomized decomposition (the paper's fast one, HF PEFT's `pissa_niter_...`); None for the
            exact one. A few are enough: 4 in the authors' scripts.
        rank, alpha, scaling, dropout, rank_pattern, alpha_pattern, dtype: as `LoRA`.

    Raises:
        ValueError: as `LoRA`; fewer iterations than none; from `init`: a base that an earlier method adapts.

    Example:
        >>> import jpeft
        >>> jpeft.PiSSA(rank=16, alpha=16, iterations=4).scale_of("any/path")
        1.0
    """

    iterations: int | None = None

    OBSERVES = "weights"

    def __post_init__(self):
        super().__post_init__()
        if self.iterations is not None and not (isinstance(self.iterations, int) and self.iterations >= 0):
            raise ValueError(f"expected iterations as None or a whole number >= 0, got {self.iterations!r}")

    def factors(self, key, matrix, site: Site, given):
        rank = self.rank_of(site.path)
        if self.iterations is None:
            u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            u, s, vt = randomized_svd(key, matrix, rank, self.iterations)
        root = jnp.sqrt(s[..., :rank] / self.scale_of(site.path))
        return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


def randomized_svd(key: jax.Array, matrix: jax.Array, size: int, iterations: int):
    """`(U, S, Vᵀ)` of the `size` largest singular values, nearly (Halko et al. 2009, arXiv 0909.4061).

    `matrix` (*lead, in, out), U (*lead, in, size), S (*lead, size), Vᵀ (*lead, size, out). The sketch has twice as many
    columns; where that is all there are, the result is exact.
    """
    sketch = 2 * size
    if sketch >= min(matrix.shape[-2:]):
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    else:
        dot = lambda x, y: jnp.matmul(x, y, precision="highest")
        span = lambda x: jnp.linalg.qr(x)[0]
        q = span(dot(matrix, jax.random.normal(key, (*matrix.shape[:-2], matrix.shape[-1], sketch), matrix.dtype)))
        for _ in range(iterations):
            q = span(dot(matrix, span(dot(matrix.mT, q))))
        u, s, vt = jnp.linalg.svd(dot(q.mT, matrix), full_matrices=False)
        u = dot(q, u)
    return u[..., :size], s[..., :size], vt[..., :size, :]
