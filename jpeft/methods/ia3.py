"""(IA)³: learned scales of keys, values and hidden activations (Liu et al. 2022, arXiv 2205.05638).

    y = l ∘ (x·W + b)        keys and values: one scale for each output, the bias included
    y = (l ∘ x)·W + b        feed-forward down projections: one scale for each input

with l (*stack, *batch, out) or (*stack, *batch, in) trainable and one at the start, exactly the pretrained function.
The paper scales keys and values of every attention, cross-attention included, and the hidden activations of every
feed-forward block; HF PEFT's defaults take queries instead of keys for some models. Keys are scaled before a rotary
embedding, where the scale can be merged; the paper's models have none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from jpeft.core.biases import Owned, with_biases
from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets, select
from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes, static, to_matrix, weight

__all__ = ["IA3", "ScaledOutputs", "ScaledInputs"]


@weight
class ScaledOutputs(Weight):
    """`base ∘ scale` along the outputs, scale (*stack, *batch, out).

    `owner` names the scale where a kernel and its bias have one together.
    """

    base: Any
    scale: Any = None
    axes: str = static()
    owner: str = static("")

    FIELDS = {"scale": "o"}
    TRAINABLE = frozenset({"scale"})
    SLICEABLE = "io"

    def tied(self) -> dict[str, str]:
        return {"scale": self.owner} if self.owner else {}

    def apply(self, op, x):
        scale = op.spread(self.scale)
        if op.transposed:
            return apply(op, op.map_inputs(x, lambda x: (x * scale).astype(x.dtype)), self.base)
        y = apply(op, x, self.base)
        return (y * op.restore(scale)).astype(y.dtype)

    def dense(self):
        return self._scaled(self.scale[..., None, :])

    def _scaled(self, scale):
        matrix = to_matrix(dense(self.base), self.labels)
        wide = jnp.result_type(matrix.dtype, scale.dtype, jnp.float32)
        return from_matrix(matrix.astype(wide) * scale.astype(wide), self.labels, self.shape).astype(self.dtype)


@weight
class ScaledInputs(ScaledOutputs):
    """`base ∘ scale` along the inputs, scale (*stack, *batch, in)."""

    FIELDS = {"scale": "i"}

    def apply(self, op, x):
        scale = op.spread(self.scale)
        if op.transposed:
            y = apply(op, x, self.base)
            return (y * op.restore(scale)).astype(y.dtype)
        return apply(op, op.map_inputs(x, lambda x: (x * scale).astype(x.dtype)), self.base)

    def dense(self):
        return self._scaled(self.scale[..., :, None])


@dataclass(frozen=True)
class _FeedForward(Site):
    """A site that is scaled at its inputs."""


@dataclass(frozen=True)
class IA3(Method):
    """Scales of keys, values and hidden activations. Mergeable; exactly the pretrained function at the start.

    Where a kernel has a bias beside it in the tree, both are scaled by the one array that the halves hold once.

    Fields:
        targets: what is scaled; by default keys, values and down projections by their names. A model that names them
            otherwise needs its own; of a fused projection all outputs are scaled, queries included.
        feedforward: which of them are scaled at their inputs: targets, each matching something in the model; by default
            the down projections, and none for an empty list.

    Raises:
        ValueError: from `init`: a target or `feedforward` that matches nothing; inputs of a convolution or of an
            embedding; a bias that fits several kernels.

    Example:
        >>> import jpeft
        >>> jpeft.IA3(targets=["key-value", "fc_2"], feedforward="fc_2").targets
        ('key-value', 'fc_2')
    """

    targets: Targets = field(default=("key-value", "down"), kw_only=True)
    feedforward: Targets | None = None

    SMALL = {"targets": "(key|value|down)/kernel|embed|fused|expert|conv|torch_head", "feedforward": "down|expert"}
    EXPORT = Export(
        peft_type="IA3",
        tensors={"dense": {"ia3_l": ("scale", "oi")}, "conv": {"ia3_l": ("scale", "xow")}},
        modules={"feedforward_modules": ("feedforward", "scale", "i")},
        neutral={"init_ia3_weights": ()},
    )

    def chosen(self, sites: Sites) -> dict[str, Site]:
        chosen = super().chosen(sites)
        feeds = self._feedforward(sites)
        scaled = with_biases({path: site for path, site in chosen.items() if path not in feeds}, sites)
        fed = {path: _FeedForward(**vars(site)) for path, site in chosen.items() if path in feeds}
        wrong = [f"{path} ({site.kind})" for path, site in fed.items() if site.kind in ("conv", "embedding")]
        if wrong:
            raise ValueError(
                f"feedforward={self.feedforward!r} matches {', '.join(wrong)}; expected dense sites or experts: "
                "the inputs of others have no scale of their own"
            )
        return {path: fed.get(path) or scaled[path] for path in (*chosen, *scaled)}

    def _feedforward(self, sites: Sites):
        """The paths whose inputs are scaled."""
        if self.feedforward == ():
            return {}
        if self.feedforward is not None:
            return select(sites, self.feedforward, self.KINDS)
        try:
            return select(sites, "down", self.KINDS)
        except ValueError:  # a model without any known by name
            return {}

    def shared(self, key, params, chosen):
        kernels = {path: site for path, site in chosen.items() if isinstance(site, Owned) and site.owner == path}
        return {path: self._ones(site.dtype, site) for path, site in kernels.items()}

    def wrap(self, key, leaf, site: Site) -> ScaledOutputs:
        axes = site.axes.lstrip("s")
        if isinstance(site, Owned):
            return ScaledOutputs(leaf, axes=axes, owner=site.owner)
        kind = ScaledInputs if isinstance(site, _FeedForward) else ScaledOutputs
        return kind(leaf, self._ones(leaf.dtype, site), axes=axes, owner="")

    def _ones(self, dtype, site: Site):
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        n = n_in if isinstance(site, _FeedForward) else n_out
        return jnp.ones((*lead, n), jnp.promote_types(dtype, jnp.float32))
