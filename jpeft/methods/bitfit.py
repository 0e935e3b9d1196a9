"""BitFit: only the bias vectors train (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jpeft.core.method import Selective
from jpeft.core.targets import Targets

__all__ = ["BitFit"]


@dataclass(frozen=True)
class BitFit(Selective):
    """Every vector that is added to an activation trains; nothing is inserted, so merging is exact.

    Llama, Qwen3 and Gemma have no biases: there the default target matches nothing, which is an error.

    Raises:
        ValueError: from `init`: the model has no biases where the targets look.

    Example:
        >>> import jpeft
        >>> jpeft.BitFit().targets
        'bias'
    """

    targets: Targets = field(default="bias", kw_only=True)

    KINDS = ("bias",)
