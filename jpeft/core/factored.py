"""Factored: a Weight whose update is a product of two factors, `W' = W + s·A·B`, stored or made from its fields.

A subclass defines `factors`; the rest follows. The product itself is formed by `dense` alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes

__all__ = ["Factored"]


class Factored(Weight):
    """`base + scale · a @ b`. A subclass is decorated with `@weight` and has, besides `base` and `axes`, a field `key`
    (*stack, *batch) or None and the static `scale` and `dropout`: the rate on the input of A while there is a key.
    """

    key: jax.Array | None
    scale: float
    dropout: float

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A (*stack, *batch, in, rank) and B (*stack, *batch, rank, out)."""
        raise TypeError(f"{type(self).__name__} defines no factors")

    def randomized(self, key):
        outer = super().randomized(key)
        if not self.dropout:
            return outer
        lead = matrix_sizes(self.shape, self.labels)[0]
        return outer.replace(key=jax.random.split(key, lead) if lead else key)

    def apply(self, op, x):
        y = apply(op, x, self.base)
        a, b = self.factors()
        down, up = (b.mT, a.mT) if op.transposed else (a, b)
        h = op.contract(self._dropped(x), down)
        return y + op.restore(op.mix(h * jnp.asarray(self.scale, h.dtype), up)).astype(y.dtype)

    def dense(self):
        update = from_matrix(self._update(), self.labels, self.shape)
        return (dense(self.base).astype(update.dtype) + update).astype(self.dtype)

    def _wide(self):
        """The dtype that merging computes in."""
        a, b = jax.eval_shape(self.factors)
        return jnp.result_type(jnp.float32, self.dtype, a.dtype, b.dtype)

    def _update(self):
        """The update in matrix form."""
        wide = self._wide()
        a, b = self.factors()
        return jnp.matmul(a.astype(wide), b.astype(wide), precision="highest") * jnp.asarray(self.scale, wide)

    def _dropped(self, x):
        """Dropout on the input of A; row numbers (an embedding's input) pass."""
        if self.key is None or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        key = self.key if self.key.ndim == 0 else self.key.reshape(-1)[0]
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), jnp.zeros_like(x))
