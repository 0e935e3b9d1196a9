"""Update: a Weight whose update is a dense matrix, `W' = W + ΔW`, for methods whose ΔW has no cheaper product.

A subclass defines `matrix`, ΔW in matrix form; the rest follows. The forward adds `op(x, ΔW)` to the base's own
product, so a compressed base stays compressed. ΔW is made again in the backward pass: what a step keeps between the
two has the size of the fields, not of the weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes

__all__ = ["Update", "from_channels_first"]


class Update(Weight):
    """`base + matrix()`. A subclass is decorated with `@weight`, has `base` and `axes`, and defines `matrix`."""

    def matrix(self) -> jax.Array:
        """ΔW, (*stack, *batch, in, out), in the dtype `wide`."""
        raise TypeError(f"{type(self).__name__} defines no matrix")

    @property
    def wide(self):
        """The dtype to form ΔW in: that of the weights and of the trainable fields, float32 at least."""
        dtypes = [field.dtype for name in self.trainable_fields() if (field := getattr(self, name)) is not None]
        return jnp.result_type(jnp.float32, self.dtype, *dtypes)

    def apply(self, op, x) -> jax.Array:
        y = apply(op, x, self.base)
        product = jax.checkpoint(lambda x: op.base(x, self._in_place()))
        return y + product(x).astype(y.dtype)

    def dense(self) -> jax.Array:
        update = self._in_place()
        return (dense(self.base).astype(update.dtype) + update).astype(self.dtype)

    def _in_place(self):
        """ΔW in the leaf's own shape."""
        return from_matrix(self.matrix(), self.labels, self.shape)


def from_channels_first(matrix: jax.Array, weight: Weight, channels: int) -> jax.Array:
    """A convolution's matrix with inputs in the order (channels, *window) as one in the order of the leaf's own axes.

    `channels` is the axis of the leaf that has the input channels, counted from the last.
    """
    lead, _, n_out = matrix_sizes(weight.shape, weight.labels)
    inputs = [k for k, c in enumerate(weight.labels) if c == "i"]
    place = inputs.index(weight.ndim + channels)
    sizes = [weight.shape[k] for k in inputs]
    ordered = matrix.reshape(*lead, sizes.pop(place), *sizes, n_out)
    return jnp.moveaxis(ordered, len(lead), len(lead) + place).reshape(matrix.shape)
