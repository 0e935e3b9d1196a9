"""Full fine-tuning: every parameter trains as it is (for language models: Howard and Ruder 2018, arXiv 1801.06146).

The baseline that the other methods are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jpeft.core.method import Selective
from jpeft.core.targets import Targets

__all__ = ["FullFineTuning"]


@dataclass(frozen=True)
class FullFineTuning(Selective):
    """All parameters that the function uses, or those that `targets` match, train in full.

    Raises:
        ValueError: from `init`: a target that matches nothing.

    Example:
        >>> import jpeft
        >>> jpeft.FullFineTuning(targets="norm").targets
        'norm'
    """

    targets: Targets = field(default="", kw_only=True)

    KINDS = ("dense", "experts", "embedding", "conv", "scale", "bias", "other")
    FORMS_DENSE_UPDATE = "the weights themselves train, and their gradients are dense"
