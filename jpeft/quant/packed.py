"""Packed: what all compressing Weights share, and the Methods that put them in place.

A Packed stands for a frozen leaf. Its `base` holds one number for each of the leaf's, in the leaf's own axes and shape,
so it is sliced, stacked and sharded like the leaf; what decodes them lies beside it in matrix form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jpeft.core.method import Method
from jpeft.core.ops import Gather
from jpeft.core.sites import Site
from jpeft.core.weight import Weight, array_of, from_matrix, labels_of, matrix_sizes, static, to_matrix, weight
from jpeft.kernels.nf4 import choose
from jpeft.quant.pieces import Pieces

__all__ = ["Packed", "Quantizer"]

_COMPUTE = ("bfloat16", "float16", "float32", "float64")


@weight
class Packed(Weight):
    """The base of compressing Weights. A subclass defines `encode`, `matrix` and `rows`.

    Static fields:
        leaf_dtype: the dtype of the leaf that it stands for; decoded values are rounded to it.
        compute_dtype: the dtype of products with it; the equation's own where None.
    """

    base: Any
    axes: str = static()
    leaf_dtype: Any = static()
    compute_dtype: str | None = static(None)

    @property
    def dtype(self):
        return self.leaf_dtype

    @classmethod
    def encode(cls, array: jax.Array, **statics) -> Self:
        """The Weight that stands for `array`."""
        raise TypeError(f"{cls.__name__} defines no encode")

    def matrix(self) -> jax.Array:
        """The decoded matrix (*lead, in, out), float32."""
        raise TypeError(f"{type(self).__name__} defines no matrix")

    def rows(self, op: Gather, x) -> jax.Array:
        """The decoded rows of the matrix that `op` looks up, float32."""
        raise TypeError(f"{type(self).__name__} defines no rows")

    def standing_for(self, array):
        kept = {name: getattr(self, name) for name in self.statics()}
        return self.encode(array, **kept)

    @classmethod
    def statics(cls) -> list[str]:
        """Names of the fields that say how an array is encoded."""
        return [n for n, f in cls.__dataclass_fields__.items() if f.metadata.get("static")]  # type: ignore[attr-defined]

    def codes(self) -> jax.Array:
        """`base` in matrix form."""
        return to_matrix(array_of(self.base), self.labels)

    def codes_at(self, op: Gather, x) -> jax.Array:
        """The rows of `codes` that `op` looks up; zeros where it fills."""
        codes = self.codes()
        return replace(op, dtype=codes.dtype, params={**op.params, "fill_value": 0}).contract(x, codes)

    def dense(self):
        return from_matrix(self.matrix(), self.labels, self.shape).astype(self.dtype)

    def apply(self, op, x):
        if isinstance(op, Gather) and not op.transposed:
            return op.restore(self.rows(op, x).astype(self.dtype).astype(op.dtype))
        return self.product(op, x, jnp.dtype(self.compute_dtype or op.dtype))

    def product(self, op, x, dtype) -> jax.Array:
        """`op` in `dtype`, the matrix decoded again in the backward pass instead of kept for it."""
        inner = replace(op, dtype=dtype)
        x = x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        y = jax.checkpoint(lambda x, w: inner.base(x, w.dense()))(x, self)
        return y.astype(result_dtype(op))


def result_dtype(op):
    """The dtype of an equation's result."""
    return op.params.get("preferred_element_type") or op.dtype


def matrix_of(array: jax.Array, axes: str) -> jax.Array:
    """A leaf in matrix form, from the letters of its written axes."""
    return to_matrix(array, labels_of(array.ndim, axes))


def leaf_of(matrix: jax.Array, like: jax.Array, axes: str) -> jax.Array:
    """A matrix in the axes of the leaf `like`."""
    return from_matrix(matrix, labels_of(like.ndim, axes), like.shape)


def lead_of(w: Weight) -> tuple[int, ...]:
    """The stack and batch axes of a Weight."""
    return matrix_sizes(w.shape, w.labels)[0]


@dataclass(frozen=True)
class Quantizer(Method):
    """Base of the Methods that compress. Nothing trains in them: their trainable half is empty.

    A leaf that came compressed in the method's own format stays as it came, its block size and scales included.

    Fields:
        compute_dtype: of products with the compressed weights; the activation's own where None.

    Class data:
        WEIGHT: the Weight that they put in place; its static fields are named as the method's own fields.
    """

    compute_dtype: str | None = None

    NO_OP_AT_START = False  # compressing changes the weights
    WEIGHT: ClassVar[type[Packed]] = Packed

    def __post_init__(self):
        super().__post_init__()
        if self.compute_dtype is None:
            return
        try:
            name = jnp.dtype(self.compute_dtype).name
        except TypeError:
            name = None
        if name not in _COMPUTE:
            raise ValueError(f"expected compute_dtype among {', '.join(_COMPUTE)}, got {self.compute_dtype!r}")
        object.__setattr__(self, "compute_dtype", name)

    def check(self, site: Site) -> str | None:
        if not jnp.issubdtype(site.dtype, jnp.floating):
            return (
                f"expected real weights with a fraction, got {jnp.dtype(site.dtype).name}; leave it out of the targets"
            )
        if self.compute_dtype == "float64" and not jax.config.read("jax_enable_x64"):
            return "compute_dtype='float64' needs jax.config.update('jax_enable_x64', True); else write 'float32'"
        if self.compute_dtype in ("float16", "float64") and choose.target().platform == "tpu":
            return (
                f"a TPU multiplies in bfloat16 and float32, got compute_dtype={self.compute_dtype!r}; write 'bfloat16'"
            )
        return super().check(site)

    def wrap(self, key, leaf, site: Site) -> Packed:
        if isinstance(leaf, self.WEIGHT):  # as it came: again, at other block sizes, it would lose more
            return leaf if self.compute_dtype is None else leaf.replace(compute_dtype=self.compute_dtype)
        if isinstance(leaf, Packed | Pieces):
            name, came = type(self).__name__, type(leaf).__name__
            raise ValueError(
                f"{site.path}: it came compressed, as {came}, and {name} would compress it once more; leave {name} "
                "out, and the other methods adapt it as it is (LoRA on it is QLoRA)"
            )
        if isinstance(leaf, Weight):
            raise ValueError(
                f"{site.path}: {type(self).__name__} compresses the pretrained weights, and a {type(leaf).__name__} "
                f"stands there already; put {type(self).__name__} first in the chain"
            )
        own = {name: getattr(self, name) for name in self.WEIGHT.statics() if hasattr(self, name)}
        packed = self.WEIGHT.encode(leaf, axes=site.axes.lstrip("s"), leaf_dtype=jnp.dtype(leaf.dtype), **own)
        for x in jax.tree.leaves(packed):
            known = not isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
            if known and not jnp.isfinite(x).all():
                raise ValueError(f"{site.path}: expected finite weights, got an infinity or NaN, which has no code")
        return packed
