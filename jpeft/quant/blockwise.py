"""Blockwise: 4-bit codes with a scale for each block of inputs. What NF4 and FP4 share; see `kernels/nf4/reference.py`.

Shapes: base the leaf's, uint4; scales (*stack, *batch, blocks, out), float32, or uint8 with nested (*stack, *batch,
groups) and offset (*stack, *batch), float32. A block is `block_size` of the merged inputs; the last may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jpeft.core.ops import Dot
from jpeft.core.weight import Layer, static, weight
from jpeft.kernels.nf4 import reference
from jpeft.kernels.nf4.op import nf4_matmul
from jpeft.quant.packed import Packed, Quantizer, lead_of, leaf_of, matrix_of, result_dtype

__all__ = ["Blockwise", "FourBit"]


@weight
class Blockwise(Packed):
    """Entries of a codebook of 16, times the scale of their block. `double_quant`: the scales have 8 bits."""

    scales: Any
    nested: Any = None
    offset: Any = None
    axes: str = static()
    block_size: int = static(64)
    double_quant: bool = static(False)

    FIELDS = {"scales": "ko", "nested": "q", "offset": ""}
    LEFT_WHOLE = frozenset({"base"})
    CODEBOOK: ClassVar[str] = ""
    GROUP: ClassVar[int] = reference.GROUP

    @property
    def SLICEABLE(self):  # noqa: N802  a group of 8-bit scales crosses outputs; a block crosses inputs
        return "" if self.double_quant else "o"

    @classmethod
    def encode(cls, array, **statics):
        matrix = matrix_of(array, statics["axes"])
        codes, scales = reference.quantize(matrix, block_size=statics["block_size"], codebook=cls.CODEBOOK)
        parts = reference.quantize_scales(scales) if statics["double_quant"] else (scales,)
        return cls(leaf_of(codes, array, statics["axes"]), *parts, **statics)

    def along(self, axis, fn, *, drop=False):
        """Groups of scales cannot be cut along the outputs: there the scales become float32, with the same values."""
        if self.double_quant and self.labels[axis] == "o":
            return self.with_plain_scales().along(axis, fn, drop=drop)
        return super().along(axis, fn, drop=drop)

    def cuttable(self, letters):
        """Along the outputs as `along`: the scales become float32, all codes stay packed."""
        return self.with_plain_scales() if "o" in letters else self

    def with_plain_scales(self, table: np.ndarray = reference.DYNAMIC) -> Blockwise:
        """The same weights with float32 scales, from 8-bit scales that are codes of `table`."""
        if not self.double_quant:
            return self
        scales = reference.dequantize_scales(self.scales, self.nested, self.offset, table)
        return self.replace(scales=scales, nested=None, offset=None, double_quant=False)

    @classmethod
    def codebook(cls) -> np.ndarray:
        """The 16 entries, in code order."""
        return reference.CODEBOOKS[cls.CODEBOOK]

    @staticmethod
    def scale_codebook() -> np.ndarray:
        """The 256 entries of 8-bit scales, in code order."""
        return reference.DYNAMIC

    def flat(self):
        """`(packed, absmax)` of a kernel (in, out) as bitsandbytes stores its transpose: see `reference`."""
        return reference.to_bitsandbytes(self.base, self.scales, self.block_size)

    @classmethod
    def from_flat(cls, packed, absmax, nested=None, offset=None, *, shape, scale_table=reference.DYNAMIC, **statics):
        """The inverse of `flat` for a torch weight of `shape` (out, in), with the nested scales where there are any.

        Scales that are codes of another `scale_table` than ours become float32, with its values.
        """
        codes, scales = reference.from_bitsandbytes(packed, absmax, shape, statics["block_size"])
        made = cls(codes, scales, nested, offset, axes="io", double_quant=nested is not None, **statics)
        return made if np.array_equal(scale_table, reference.DYNAMIC) else made.with_plain_scales(scale_table)

    def packed(self):
        """The arrays of `reference.decode`, the codes in matrix form."""
        return self.codes(), self.scales, self.nested, self.offset

    def matrix(self):
        return reference.dequantize(*self.packed(), block_size=self.block_size, codebook=self.CODEBOOK)

    def rows(self, op, x):
        scales = self.with_plain_scales().scales
        n_in, outside = self.codes().shape[0], scales.shape[0]  # a row number beyond the last stays beyond the last
        block = jnp.where(x < n_in, x // self.block_size, outside)
        scale = replace(op, dtype=scales.dtype).contract(block, scales)
        return reference.lookup(self.codes_at(op, x), self.codebook()) * scale

    def product(self, op, x, dtype):
        if not isinstance(op, Dot) or lead_of(self) or op.params.get("out_sharding") is not None:
            return super().product(op, x, dtype)
        in_place = isinstance(self.base, Layer) and self.labels == "io"  # in matrix form in its stack
        y = nf4_matmul(
            op.inputs(x),
            self.base.stack if in_place else self.codes(),
            self.scales,
            self.nested,
            self.offset,
            self.base.number if in_place else None,
            block_size=self.block_size,
            codebook=self.CODEBOOK,
            transposed=op.transposed,
            rounded=self.dtype,
            dtype=dtype,
            precision=op.params.get("precision"),
            result=result_dtype(op),
        )
        return op.restore(y)


@dataclass(frozen=True)
class FourBit(Quantizer):
    """Base of the 4-bit Methods.

    Fields:
        block_size: inputs that share a scale. Where it does not divide the inputs the last block of each output is
            shorter, as in bitsandbytes.
        double_quant: store the scales in 8 bits too, in groups of 256.
    """

    block_size: int = 64
    double_quant: bool = True

    SMALL = {"block_size": 8}

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 2:
            raise ValueError(f"expected a whole block_size >= 2, such as 64, got block_size={self.block_size!r}")
