"""RoAd: 2D rotary adaptation (Liao and Monz 2024, arXiv 2409.00119).

    y = R·(x·W + b),        R of 2×2 blocks        [ α₁·cos θ₁   -α₁'·sin θ₁' ]
                                                   [ α₂'·sin θ₂'  α₂·cos θ₂   ]

Pairs of outputs, bias included, are turned and stretched: θ zero and α one at the start, exactly the pretrained
function. Variant road_1 has one θ and α a pair, road_2 one a row of the block, road_4 one an entry. The cost is
elementwise. Pairs are neighbours (group_size 2); HF PEFT pairs the halves of groups of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from jpeft.core.biases import Owned, with_biases
from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.sites import Site, Sites
from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes, static, to_matrix, weight

__all__ = ["RoAd", "RotatedOutputs"]

_PER_OUTPUT = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # numbers of each kind that a variant has for an output


@weight
class RotatedOutputs(Weight):
    """`base @ R.T`. Shapes: theta, alpha (*stack, *batch, n) with n half the outputs, the outputs, or twice as many.

    `owner` names both where a kernel and its bias have them together.
    """

    base: Any
    theta: Any = None
    alpha: Any = None
    axes: str = static()
    variant: str = static("road_1")
    group_size: int = static(2)
    owner: str = static("")

    FIELDS = {"theta": "t", "alpha": "t"}
    TRAINABLE = frozenset({"theta", "alpha"})
    SLICEABLE = "i"

    def tied(self) -> dict[str, str]:
        return {name: f"{self.owner}/{name}" for name in ("theta", "alpha")} if self.owner else {}

    def apply(self, op, x):
        straight, across = map(op.spread, self._columns())
        turn = lambda y: (y * straight + _quarter(y, self.group_size) * across).astype(y.dtype)
        back = lambda y: (y * straight - _quarter(y * across, self.group_size)).astype(y.dtype)
        if op.transposed:
            return apply(op, op.map_inputs(x, back), self.base)
        return op.map_outputs(apply(op, x, self.base), turn)

    def dense(self):
        straight, across = (c[..., None, :] for c in self._columns())
        matrix = to_matrix(dense(self.base), self.labels)
        matrix = matrix.astype(jnp.result_type(matrix.dtype, straight.dtype))
        turned = matrix * straight + _quarter(matrix, self.group_size) * across
        return from_matrix(turned, self.labels, self.shape).astype(self.dtype)

    def _columns(self):
        """α·cos θ and α·sin θ of each output, (*stack, *batch, out), in float32 at least."""
        wide = jnp.promote_types(self.theta.dtype, jnp.float32)
        theta, alpha = (self._of_outputs(v.astype(wide)) for v in (self.theta, self.alpha))
        return alpha[0] * jnp.cos(theta[0]), alpha[1] * jnp.sin(theta[1])

    def _of_outputs(self, v):
        """What each output has for its cosine and for its sine."""
        lead = v.shape[:-1]
        if self.variant == "road_2":
            return v, v
        if self.variant == "road_1":
            pairs = v.reshape(*lead, -1, 1, self.group_size // 2)
            both = jnp.concatenate([pairs, pairs], -2).reshape(*lead, -1)
            return both, both
        entries = v.reshape(*lead, -1, 2, self.group_size)
        return entries[..., 0, :].reshape(*lead, -1), entries[..., 1, :].reshape(*lead, -1)


def _quarter(y, group_size: int):
    """Each pair (a, b) of the last axis as (-b, a); a pair lies half a group apart."""
    halves = y.reshape(*y.shape[:-1], -1, 2, group_size // 2)
    return jnp.stack([-halves[..., 1, :], halves[..., 0, :]], -2).reshape(y.shape)


@dataclass(frozen=True)
class RoAd(Method):
    """Rotations of pairs of outputs. Mergeable; exactly the pretrained function at the start.

    Where a kernel has a bias beside it in the tree, both are turned by the arrays that the halves hold once.

    Fields:
        variant: `"road_1"`, `"road_2"` or `"road_4"`: so many numbers of each kind for a pair of outputs.
        group_size: outputs i and i + group_size/2 of a group are a pair; even, and it must divide the outputs.

    Raises:
        ValueError: from the constructor: an unknown variant, an odd group_size; from `init`: a group_size that does not
            divide the outputs of a site; a bias that fits several kernels.

    Example:
        >>> import jpeft
        >>> jpeft.RoAd(variant="road_2", group_size=64).variant
        'road_2'
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 2

    SMALL = {"group_size": 4, "targets": "^(?!.*head)"}
    EXPORT = Export(
        peft_type="ROAD",
        tensors={"dense": {"road_theta": ("theta", "t"), "road_alpha": ("alpha", "t")}},
        config={"variant": "variant", "group_size": "group_size"},
        neutral={"init_weights": ()},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in _PER_OUTPUT:
            raise ValueError(f"expected variant in {tuple(_PER_OUTPUT)}, got {self.variant!r}")
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"expected an even group_size >= 2, got group_size={self.group_size}")

    def check(self, site: Site) -> str | None:
        n_out = matrix_sizes(site.shape, site.axes)[2]
        if n_out % self.group_size:
            return f"group_size={self.group_size} does not divide its {n_out} outputs; choose another group_size"
        return None

    def chosen(self, sites: Sites) -> dict[str, Site]:
        return with_biases(super().chosen(sites), sites)

    def shared(self, key, params, chosen):
        kernels = {path: site for path, site in chosen.items() if isinstance(site, Owned) and site.owner == path}
        starts = {path: self._start(site.dtype, site) for path, site in kernels.items()}
        return {f"{path}/{name}": v for path, start in starts.items() for name, v in start.items()}

    def wrap(self, key, leaf, site: Site) -> RotatedOutputs:
        owner = site.owner if isinstance(site, Owned) else ""
        own = {} if owner else self._start(leaf.dtype, site)
        axes = site.axes.lstrip("s")
        return RotatedOutputs(leaf, **own, axes=axes, variant=self.variant, group_size=self.group_size, owner=owner)

    def _start(self, dtype, site: Site):
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        shape = (*lead, int(n_out * _PER_OUTPUT[self.variant]))
        dtype = jnp.promote_types(dtype, jnp.float32)
        return {"theta": jnp.zeros(shape, dtype), "alpha": jnp.ones(shape, dtype)}
