"""HRA: Householder reflection adaptation (Yuan et al. 2024, arXiv 2405.17484).

    y = (x·R)·W,        R = H_r ... H_2·H_1,        H_i = 1 - 2·u_i·u_iᵀ / ‖u_i‖²

with the u_i the columns of U (in × r). Neighbours start equal, and two equal reflections cancel: exactly the pretrained
function. The chain is one update of rank r, R = 1 - U·T·Uᵀ (normalised columns) with T lower triangular,

    T⁻¹ = 1/2 on the diagonal, (UᵀU)_ij below it

so a product costs two thin ones, as LoRA, and no matrix of inputs × inputs is formed.

With `gram_schmidt` (the paper's λ = ∞, HF PEFT's `apply_GS`) the columns are made orthonormal, and R = 1 - 2·U·Uᵀ
reflects r directions whatever U is: that never is the identity, so the start is not the pretrained function. Equal
neighbours, as HF PEFT starts it, would leave every second direction to rounding; here all columns start random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.rotation import Rotation, turned_axis
from jpeft.core.sites import Site
from jpeft.core.weight import Weight, matrix_sizes, static, weight

__all__ = ["HRA", "Reflections"]


@weight
class Reflections(Rotation):
    """`H_r ... H_1 @ base`. Shapes: u (*stack, *batch, in, r), for an embedding (*stack, *batch, out, r)."""

    base: Any
    u: Any
    axes: str = static()
    side: Any = static("i")
    gram_schmidt: bool = static(False)

    FIELDS = {"u": "dr"}
    TRAINABLE = frozenset({"u"})

    def turned(self, rows, op, inverse):
        u = self.u.astype(jnp.promote_types(self.u.dtype, jnp.float32))
        if self.gram_schmidt:
            q = jnp.linalg.qr(u)[0]
            left, right = 2 * q, q.mT
        else:
            u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
            t = _middle(u)
            left, right = jnp.matmul(u, t.mT if inverse else t, precision="highest"), u.mT
        return rows - op.mix(op.mix(rows, left), right).astype(rows.dtype)


def _middle(u):
    """T of the product of reflections at the unit columns of u, (..., r, r)."""
    inner = jnp.matmul(u.mT, u, precision="highest")
    one = jnp.eye(u.shape[-1], dtype=u.dtype)
    inverse = jnp.tril(inner, -1) + one / 2
    return jax.scipy.linalg.solve_triangular(inverse, jnp.broadcast_to(one, inverse.shape), lower=True)


@dataclass(frozen=True)
class HRA(Method):
    """A chain of Householder reflections. Mergeable; at the start the pretrained function, but with `gram_schmidt`.

    Fields:
        r: number of reflections; even, as they start in pairs that cancel.
        gram_schmidt: orthonormal directions (HF PEFT's `apply_GS`).
        regularization: λ of the penalty λ·Σ‖1 - UᵀU‖² on the unit directions, that a training loop adds to the loss.

    Raises:
        ValueError: from the constructor: r below 1 or odd (but with `gram_schmidt`), a negative regularization; from
            `init`: an r above what is turned.

    Example:
        >>> import jpeft
        >>> jpeft.HRA(r=8, targets=["q_proj", "v_proj"]).r
        8
    """

    r: int = 8
    gram_schmidt: bool = False
    regularization: float = 0.0

    SMALL = {"r": 4, "targets": "."}
    EXPORT = Export(
        peft_type="HRA",
        tensors={"dense": {"hra_u": ("u", "dr")}},
        config={"r": "r", "apply_GS": "gram_schmidt"},
        neutral={"init_weights": ()},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.r < 1 or (self.r % 2 and not self.gram_schmidt):
            raise ValueError(f"expected an even r >= 2, for reflections that start in pairs, got r={self.r}")
        if self.regularization < 0:
            raise ValueError(f"expected regularization >= 0, got regularization={self.regularization}")

    @property
    def NO_OP_AT_START(self) -> bool:  # type: ignore[override]  # noqa: N802
        return not self.gram_schmidt

    def check(self, site: Site) -> str | None:
        size = turned_axis(site)[1]
        return f"r={self.r} is above {size}, the size of what is turned; choose r <= {size}" if self.r > size else None

    def wrap(self, key, leaf, site: Site) -> Reflections:
        lead, *_ = matrix_sizes(site.shape, site.axes)
        side, size = turned_axis(site)
        pairs = 1 if self.gram_schmidt else 2
        bound = 1 / math.sqrt(self.r // pairs)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        u = jax.random.uniform(key, (*lead, size, self.r // pairs), dtype, -bound, bound)
        u = jnp.repeat(u, pairs, axis=-1)
        return Reflections(leaf, u, axes=site.axes.lstrip("s"), side=side, gram_schmidt=self.gram_schmidt)

    def penalty(self, trainable):
        if not self.regularization:
            return 0.0
        leaves = jax.tree.leaves(trainable, is_leaf=lambda x: isinstance(x, Weight))
        return self.regularization * sum(_overlap(w.u) for w in leaves if isinstance(w, Reflections))


def _overlap(u):
    """‖1 - UᵀU‖² of the unit directions."""
    u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
    return jnp.sum((jnp.eye(u.shape[-1], dtype=u.dtype) - jnp.matmul(u.mT, u, precision="highest")) ** 2)
