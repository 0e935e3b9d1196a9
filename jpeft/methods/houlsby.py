"""Houlsby adapters, after attention and after feed-forward (Houlsby et al. 2019, arXiv 1902.00751).

    y' = y + up(act(down(y)))        down (*stack, *batch, d, m), up (*stack, *batch, m, d), each with a bias

y is what the attention's output projection, or the feed-forward's down projection, puts out: the adapter acts in front
of the residual sum. Both kernels start truncated-normal with a standard deviation of 1e-3 and the biases at zero, so
that the start is near the pretrained function, but not it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jpeft.core.targets import Targets
from jpeft.methods._bottleneck import _BottleneckMethod

__all__ = ["Houlsby"]


@dataclass(frozen=True)
class Houlsby(_BottleneckMethod):
    """Two adapters in every layer. Cannot merge: a nonlinearity stands between the projections.

    Trainable parameters: 2dm + m + d for each adapter. The paper trains the norms and a new head as well: write
    `chain(NormTuning(), Houlsby())`, and the head's path in `modules_to_save`. The `adapters` package (its
    `DoubleSeqBnConfig`, "double_seq_bn") has activation "swish" and init_weights "bert" with 0.02.

    Where a layer has a bias the adapter stands at the bias, so that a method on the kernel acts under it wherever it
    comes in a chain; one without holds it at the kernel, and what comes later in the chain is added behind it.

    Fields:
        targets: layers, by their kernels; by default attention outputs and feed-forward down projections by name.
        bottleneck: the adapter's inner size m; d / reduction where None.
        reduction: d / m.
        activation: a name of `jax.nn`, or "gelu" (exact), "gelu_new" (its approximation), "leakyrelu".
        init_weights: how kernels start, in the words of the `adapters` package: "houlsby" (both truncated normal),
            "bert" (both normal), "mam_adapter" (down uniform in ±1/√d, up zero: exactly the pretrained function).
        init_std: of the first two; the `adapters` package's "houlsby" has 1e-2.
        ln_before, ln_after: a new LayerNorm at the adapter's input; at its output, in front of the sum with y.

    Raises:
        ValueError: from the constructor: sizes below 1, an unknown activation or start; from `init`: a reduction that
            does not divide d, a target that matches nothing.

    Example:
        >>> import jpeft
        >>> jpeft.Houlsby(bottleneck=64).activation
        'gelu'
    """

    targets: Targets = field(default=("attention-output", "down"), kw_only=True)
    activation: str = "gelu"
    init_weights: Literal["houlsby", "bert", "mam_adapter"] = "houlsby"
    init_std: float = 1e-3

    # The start of the papers is too near the pretrained function for a test on a width of 24 to tell them apart.
    SMALL = {"targets": "(out|down)/kernel|^(out|back|expert|torch_head)$", "bottleneck": 5, "init_std": 0.1}
