"""Rotation: a Weight whose inputs are turned, `W' = R·W`, for methods whose R is orthogonal or nearly so.

A subclass defines `turned`; the rest follows. A product turns its inputs, `y = (x·R)·W`, so a compressed base stays
compressed; a tied head turns its outputs back. An embedding's inputs are row numbers: there the outputs are turned,
`W' = W·R`. A convolution has no inputs to turn but its windows: there the kernel is, small against the activations.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jpeft.core.ops import Conv
from jpeft.core.sites import Site
from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes, to_matrix

__all__ = ["Rotation", "turned_axis", "cayley", "skew"]


class Rotation(Weight):
    """A turned base. A subclass is decorated with `@weight`, has `base`, `axes` and the static `side`.

    `side` is `i` where the inputs are turned, `o` where the outputs are. Fields have no axes `i` and `o` of their own.
    """

    side: Literal["i", "o"]

    @property
    def SLICEABLE(self) -> str:  # type: ignore[override]  # noqa: N802  the axes that are not turned
        return "o" if self.side == "i" else "i"

    def turned(self, rows: jax.Array, op, inverse: bool) -> jax.Array:
        """`rows @ R`, rows (*batch, *free, n), by `op.mix` and `op.mix_blocks`; with `inverse` `rows @ R.T`."""
        raise TypeError(f"{type(self).__name__} defines no turned")

    def apply(self, op, x) -> jax.Array:
        if isinstance(op, Conv) and self.side == "i":
            return op.base(x, from_matrix(self.rotated(), self.labels, self.shape))
        turn = lambda rows: self.turned(rows, op, op.transposed)
        if (self.side == "i") != op.transposed:
            return apply(op, op.map_inputs(x, turn), self.base)
        return op.map_outputs(apply(op, x, self.base), turn)

    def dense(self) -> jax.Array:
        return from_matrix(self.rotated(), self.labels, self.shape).astype(self.dtype)

    def rotated(self) -> jax.Array:
        """The turned base in matrix form, in float32 at least."""
        matrix = to_matrix(dense(self.base), self.labels)
        matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        if self.side == "i":
            return self.turned(matrix.mT, _Exact, True).mT
        return self.turned(matrix, _Exact, False)


class _Exact:
    """The verbs of an op for matrices (*lead, rows, n), at full precision."""

    @staticmethod
    def mix(h, m):
        return jnp.matmul(h, m.astype(h.dtype), precision="highest")

    @staticmethod
    def mix_blocks(h, m):
        return jnp.einsum("...rnk,...nko->...rno", h, m.astype(h.dtype), precision="highest")


def turned_axis(site: Site) -> tuple[Literal["i", "o"], int]:
    """The side of a site that is turned, and its size."""
    _, n_in, n_out = matrix_sizes(site.shape, site.axes)
    return ("o", n_out) if site.kind == "embedding" else ("i", n_in)


def skew(vector: jax.Array, size: int) -> jax.Array:
    """The skew-symmetric matrix (..., size, size) whose part above the diagonal is `vector`, row by row."""
    rows, columns = jnp.triu_indices(size, 1)
    upper = jnp.zeros((*vector.shape[:-1], size, size), vector.dtype).at[..., rows, columns].set(vector)
    return upper - upper.mT


def cayley(q: jax.Array) -> jax.Array:
    """R - 1 for the rotation R = (1 - Q)(1 + Q)⁻¹ of skew-symmetric matrices Q (..., n, n)."""
    one = jnp.eye(q.shape[-1], dtype=q.dtype)
    return jnp.linalg.solve(one - q, 2 * q).mT
