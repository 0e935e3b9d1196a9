"""FP4: bitsandbytes' 4-bit float, a sign, two bits of exponent and one of mantissa (arXiv 2305.14314 compares it).

Its entries are 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1, and their negatives: not those of the E2M1 of other libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.core.weight import weight
from jpeft.quant.blockwise import Blockwise, FourBit

__all__ = ["FP4", "Float4"]


@weight
class Float4(Blockwise):
    """`FP4`'s Weight."""

    CODEBOOK = "fp4"


@dataclass(frozen=True)
class FP4(FourBit):
    """Freeze the targets in bitsandbytes' 4-bit float. On normal weights its error is a third above NF4's.

    Fields:
        block_size, double_quant, compute_dtype: as `NF4`.

    Raises:
        ValueError: as `NF4`.

    Example:
        >>> import jpeft
        >>> jpeft.FP4(double_quant=False).block_size
        64
    """

    WEIGHT = Float4
