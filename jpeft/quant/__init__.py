"""Weights that compress, and the Methods that put them under other methods: `chain(NF4(), LoRA())`."""

from jpeft.core.method import Method
from jpeft.quant.fp4 import FP4
from jpeft.quant.int8 import Int8
from jpeft.quant.merging import requantize
from jpeft.quant.nf4 import NF4
from jpeft.quant.streaming import compressing

__all__ = ["FP4", "NF4", "Int8", "compressing", "quantizers", "requantize"]


def quantizers() -> dict[str, type[Method]]:
    """`{name: class}` of every Method that compresses.

    Example:
        >>> from jpeft.quant import quantizers
        >>> list(quantizers())
        ['FP4', 'Int8', 'NF4']
    """
    return {"FP4": FP4, "Int8": Int8, "NF4": NF4}
