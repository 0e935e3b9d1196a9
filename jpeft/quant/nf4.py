"""NF4: 4-bit NormalFloat, the frozen weights of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    W[i, o] = codebook[codes[i, o]] · scales[block of i, o]

The codebook's 16 entries are quantiles of N(0, 1) scaled to [-1, 1], so that weights that are normal within a block use
every code equally often; with double quantization a weight costs 4 + 8/64 + 32/(64·256) = 4.127 bits. Codes and scales
are those of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.core.weight import weight
from jpeft.quant.blockwise import Blockwise, FourBit

__all__ = ["NF4", "NormalFloat4"]


@weight
class NormalFloat4(Blockwise):
    """`NF4`'s Weight."""

    CODEBOOK = "nf4"


@dataclass(frozen=True)
class NF4(FourBit):
    """Freeze the targets in 4-bit NormalFloat. `chain(NF4(), LoRA())` is QLoRA.

    `merge` gives full precision; `jpeft.quant.requantize` compresses again, and says what that costs. A leaf that came
    in NF4, as from a folder of bitsandbytes', stays as it came.

    Fields:
        block_size: inputs that share a scale; the last block of each output may be shorter.
        double_quant: store the scales in 8 bits too.
        compute_dtype: of products; the activation's own where None (bitsandbytes' default is float32).

    Raises:
        ValueError: from the constructor: a block size below 2, a compute_dtype that is no float; from `init`: integers
            or complex numbers, weights that are not finite (not seen under `jit`), a compute_dtype that the hardware
            lacks, a leaf that a former method adapts or that came compressed in another format or in pieces.

    Example:
        >>> import jpeft
        >>> qlora = jpeft.chain(jpeft.NF4(block_size=64), jpeft.LoRA(rank=16))
        >>> qlora.methods[0].double_quant
        True
    """

    WEIGHT = NormalFloat4
