"""Int8: 8-bit weights with one scale for each output (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339).

    W[i, o] = codes[i, o] · absmax[o] / 127

Codes and scales are those of bitsandbytes. Activations stay in their own dtype, where LLM.int8 rounds them to 8 bits
and takes their outliers out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jpeft.core.weight import static, weight
from jpeft.kernels import int8
from jpeft.quant.packed import Packed, Quantizer, leaf_of, matrix_of

__all__ = ["Int8", "Rowwise8"]


@weight
class Rowwise8(Packed):
    """`Int8`'s Weight. Shapes: base the leaf's, int8; absmax (*stack, *batch, out), float32."""

    absmax: Any
    axes: str = static()

    FIELDS = {"absmax": "o"}
    SLICEABLE = "io"

    @classmethod
    def encode(cls, array, **statics):
        codes, absmax = int8.quantize(matrix_of(array, statics["axes"]))
        return cls(leaf_of(codes, array, statics["axes"]), absmax, **statics)

    def matrix(self):
        return int8.dequantize(self.codes(), self.absmax)

    def rows(self, op, x):
        # NaN where the lookup fills, which codes cannot say
        filled = replace(op, dtype=jnp.dtype("float32")).contract(x, jnp.ones((self.codes().shape[0], 1)))
        return int8.decode(self.codes_at(op, x)[..., None, :], self.absmax)[..., 0, :] * filled


@dataclass(frozen=True)
class Int8(Quantizer):
    """Freeze the targets in 8 bits.

    Fields:
        compute_dtype: as `NF4`.

    Raises:
        ValueError: as `NF4`.

    Example:
        >>> import jpeft
        >>> jpeft.Int8(compute_dtype="bfloat16").compute_dtype
        'bfloat16'
    """

    WEIGHT = Rowwise8
