"""Parallel adapters (He et al. 2021, "Towards a unified view", arXiv 2110.04366).

    y' = y + s·up(act(down(x)))        down (*stack, *batch, d, m), up (*stack, *batch, m, d), each with a bias

x is what the sublayer is given and y what it puts out: for a feed-forward layer the input of its first kernel and the
output of its last. The defaults are the paper's for feed-forward layers: s = 4, ReLU, down from U(±1/√d), up zero, so
that the start is exactly the pretrained function. Its sizes were m = 512 and, mixed with prefixes, m = 200 to 512 of
d = 1024; the `adapters` package has d / 2 (`ParBnConfig`), as here.

Where a norm stands in front of the sublayer x is the norm's output; the `adapters` package takes the residual there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.biases import Owned
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets
from jpeft.core.weight import Weight, apply, dense, matrix_sizes, static, weight
from jpeft.methods._bottleneck import Bottleneck, _BottleneckMethod

__all__ = ["Beside", "Entrance", "ParallelAdapter"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Given:
    """A note: what a sublayer is given, (*batch, *free, d), and the path of the kernel that it enters by."""

    value: Any
    path: str = field(metadata={"static": True})

    beyond_attention = True


@weight
class Entrance(Weight):
    """The kernel by which x enters a sublayer; it notes x for the adapter at the sublayer's end."""

    base: Any
    axes: str = static()
    path: str = static()

    SLICEABLE = "o"

    def apply(self, op, x):
        return apply(op, x, self.base)

    def dense(self):
        return dense(self.base)

    def notes(self, op, reached):
        reached = super().notes(op, reached)
        return reached if op.transposed else (*reached, _Given(op.inputs(op.operand), self.path))


@weight
class Beside(Bottleneck):
    """An adapter, at a sublayer's end, of what entered it by the kernel at `entrance`. Shapes: as `Bottleneck`."""

    entrance: str = static(default="")

    def read(self, op, y):
        found = [note.value for note in op.reached if isinstance(note, _Given) and note.path == self.entrance]
        if not found or found[0].shape[:-1] != y.shape[:-1]:
            came = f"it comes as {found[0].shape} for outputs of {y.shape}" if found else "it does not get there"
            raise ValueError(
                f"expected what enters by {self.entrance} at the end of its sublayer, but {came}: the function that "
                "runs is not the one that find_sites saw, or it reshapes or permutes tokens between the two"
            )
        return found[0]

    def notes(self, op, reached):
        mine = lambda note: isinstance(note, _Given) and note.path == self.entrance
        return tuple(note for note in super().notes(op, reached) if not mine(note))


@dataclass(frozen=True)
class _End(Owned):
    """Where a sublayer ends, its kernel (`owner`), the kernel by which x enters it, and how many inputs that has."""

    entrance: str = ""
    inputs: int = 0
    problem: str = ""


@dataclass(frozen=True)
class _Start(Site):
    """A kernel by which x enters a sublayer."""


@dataclass(frozen=True)
class ParallelAdapter(_BottleneckMethod):
    """An adapter beside each feed-forward layer. Cannot merge: a nonlinearity stands between the projections.

    Trainable parameters: 2dm + m + d for each. The sublayer's first kernel is found by tracing the model, not by name:
    the first of those whose products make the target's inputs. With `targets="attention-output"` the adapters stand
    beside the attention, x the input of the queries; the model then calls `jpeft.attention`, or attends in plain steps.

    Fields:
        targets: the sublayers' last kernels; by default feed-forward down projections by name.
        bottleneck, reduction, activation, init_weights, init_std, ln_before, ln_after: as in `Houlsby`, d that of x.
        scale: the factor s.

    Raises:
        ValueError: as `Houlsby`; from `init` too: a target whose inputs no kernel is known to make, or that is another
            target's first kernel.

    Example:
        >>> import jpeft
        >>> jpeft.ParallelAdapter(bottleneck=512).scale
        4.0
    """

    targets: Targets = field(default="down", kw_only=True)
    reduction: int = 2
    init_weights: Literal["houlsby", "bert", "mam_adapter"] = "mam_adapter"
    scale: float = 4.0

    SMALL = {"targets": "(out|down)/kernel|^(out|back|expert)$", "bottleneck": 5, "activation": "silu", "scale": 1.0}

    def matched(self, sites: Sites) -> dict[str, Site]:
        kernels = {s.path: s for s in sites if s.kind in self.KINDS and "?" not in s.axes}
        ends: dict[str, Site] = {}
        starts: dict[str, Site] = {}
        for path, site in super().matched(sites).items():
            end = _End(**{"owner": path, **vars(site)})
            first = _entrance_of(kernels[end.owner], kernels)
            if first is None:
                ends[path] = replace(end, problem="no kernel of as many layers is known that makes its inputs")
            else:
                ends[path] = replace(end, entrance=first.path, inputs=matrix_sizes(first.shape, first.axes)[1])
                starts[first.path] = _Start(**vars(first))
        for path in ends.keys() & starts.keys():
            ends[path] = replace(ends[path], problem="another target's sublayer begins here")
        return ends | {path: site for path, site in starts.items() if path not in ends}

    def width_of(self, site: Site) -> int:
        return self.bottleneck or site.inputs // self.reduction  # type: ignore[attr-defined]

    def check(self, site: Site) -> str | None:
        if not isinstance(site, _End):
            return None
        if site.problem:
            return f"{site.problem}; leave it out of targets"
        if self.bottleneck is None and site.inputs % self.reduction:
            return (
                f"the {site.inputs} inputs of {site.entrance} are not divisible by reduction={self.reduction}; "
                "write bottleneck=..."
            )
        return None

    def wrap(self, key, leaf, site: Site) -> Weight:
        axes = site.axes.lstrip("s")
        if not isinstance(site, _End):
            return Entrance(leaf, axes=axes, path=site.path)
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        arrays = self.arrays(key, lead, site.inputs, self.width_of(site), n_out, dtype)
        return Beside(
            leaf, **arrays, axes=axes, activation=self.activation, scale=float(self.scale), entrance=site.entrance
        )


def _entrance_of(last: Site, kernels: dict[str, Site]) -> Site | None:
    """The first of the kernels that make the inputs of `last`, in as many layers and experts; None where none does."""
    lead = lambda site: matrix_sizes(site.shape, site.axes)[0]
    makers = [kernels[path] for path in last.inputs_from if path in kernels]
    return next((site for site in makers if lead(site) == lead(last)), None)
