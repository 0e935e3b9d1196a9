"""Pfeiffer adapters, after feed-forward alone (Pfeiffer et al. 2020, arXiv 2005.00247; MAD-X, arXiv 2005.00052).

    y' = y + up(act(down(y)))        down (*stack, *batch, d, m), up (*stack, *batch, m, d), each with a bias

y is what the feed-forward's down projection puts out, in front of the residual sum. Both kernels start from
N(0, 0.02²), as in the authors' code.

That code, the `adapters` package, has one more step where a norm follows the sum, as in BERT: by default its
`SeqBnConfig` hands the adapter norm(y + residual), and applies the norm a second time after it
(`original_ln_before=True`). That reaches beyond the layer and is not offered; this is its `original_ln_before=False`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jpeft.core.targets import Targets
from jpeft.methods._bottleneck import _BottleneckMethod

__all__ = ["Pfeiffer"]


@dataclass(frozen=True)
class Pfeiffer(_BottleneckMethod):
    """One adapter in every layer. Cannot merge: a nonlinearity stands between the projections.

    Trainable parameters: 2dm + m + d for each layer. Two in a chain are stacked, the second on the first, as MAD-X
    stacks a task's on a language's.

    Fields:
        targets: layers, by their kernels; by default feed-forward down projections by name.
        bottleneck, reduction, activation, init_weights, init_std, ln_before, ln_after: as in `Houlsby`.

    Raises:
        ValueError: as `Houlsby`.

    Example:
        >>> import jpeft
        >>> jpeft.Pfeiffer(reduction=8).targets
        'down'
    """

    targets: Targets = field(default="down", kw_only=True)

    SMALL = {"targets": "down/kernel|^(back|expert|torch_head)$", "bottleneck": 5, "init_std": 0.1}
