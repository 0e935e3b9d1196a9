"""Last layers: only the last few layers train, in full (Lee et al. 2019, arXiv 1911.03090; Howard and Ruder 2018,
arXiv 1801.06146, unfreeze from there).

Where layers are leaves of their own, the number in the path says which are last. Where they are stacked in one leaf,
its end along the stack is a trainable array of its own:

    W = [base; tail],        base (n - num_layers, ...) frozen, tail (num_layers, ...) trainable

and a scan over the stack runs in two parts, so that the backward pass ends where training does: it neither keeps
activations of the frozen layers nor forms their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import lax

from jpeft.core.layout import taken
from jpeft.core.method import Selective
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets
from jpeft.core.weight import Unfrozen, Weight, apply, dense, from_matrix, labels_of, static, to_matrix, weight
from jpeft.methods._layers import LAYER, check_pattern, last_layers, place

__all__ = ["LastLayers", "Tail"]


@weight
class Tail(Weight):
    """A stack of layers whose end trains: `base` followed by `tail` (num_layers, *batch, in, out) along the stack."""

    base: Any
    tail: Any
    axes: str = static()

    FIELDS = {"tail": "io"}
    TRAINABLE = frozenset({"tail"})
    SLICEABLE = "io"

    @property
    def shape(self):
        stack, layers = self._stack, self._layers
        return tuple(n + layers if axis == stack else n for axis, n in enumerate(self.base.shape))

    def cuts(self):
        return (self.base.shape[self._stack], *super().cuts())

    def apply(self, op, x):
        return apply(op, x, self.dense())

    def dense(self):
        return jnp.concatenate([dense(self.base), self._end()], self._stack)

    def along(self, axis, fn, *, drop=False):
        if axis != self._stack:
            return super().along(axis, fn, drop=drop)
        layers = taken(fn, self.shape[axis])
        cut = self.base.shape[axis]
        if layers is not None and layers.max() < cut:
            piece = self.base.along(axis, fn) if isinstance(self.base, Weight) else fn(self.base, axis)
        elif layers is not None and layers.min() >= cut:
            step = layers[1] - layers[0] if layers.size > 1 else 1
            piece = lax.slice_in_dim(self._end(), layers[0] - cut, layers[-1] + 1 - cut, step, axis)
        else:  # layers of both kinds, or known only when they are run
            piece = fn(self.dense(), axis)
        return Unfrozen(piece, axes=self.axes)

    @property
    def _stack(self) -> int:
        return labels_of(self.base.ndim, self.axes).index("s")

    @property
    def _layers(self) -> int:
        labels = labels_of(self.base.ndim, self.axes)
        return self.tail.shape[sum(c in "sb" for c in labels[: self._stack])]

    def _end(self):
        """The tail in the leaf's own layout."""
        sizes = list(self.base.shape)
        sizes[self._stack] = self._layers
        return from_matrix(self.tail, self.labels, tuple(sizes))


@dataclass(frozen=True)
class LastLayers(Selective):
    """The last layers train in full, and nothing else: no embedding, no final norm, no head. Merging is exact.

    Fields:
        num_layers: how many; of several stacks (an encoder, a decoder) that many of each.
        layer_pattern: a regex whose first group is the layer's number in a path, searched from the left. Paths alike up
            to that number are one stack if they have at least two numbers. Stacked leaves need none.

    Raises:
        ValueError: from the constructor: num_layers below 1, a pattern without a group; from `init`: no layers where
            the targets look, a stack of fewer, a leaf stacked in more than one way.

    Example:
        >>> import jpeft
        >>> jpeft.LastLayers(num_layers=2, targets="mlp").num_layers
        2
    """

    num_layers: int = 1
    layer_pattern: str = LAYER
    targets: Targets = field(default="", kw_only=True)

    KINDS = ("dense", "experts", "embedding", "conv", "scale", "bias", "other")
    FORMS_DENSE_UPDATE = "the weights themselves train, and their gradients are dense"

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers < 1:
            raise ValueError(f"expected num_layers >= 1, got num_layers={self.num_layers}")
        check_pattern(self.layer_pattern)

    def chosen(self, sites: Sites) -> dict[str, Site]:
        last = last_layers(sites, self.num_layers, self.layer_pattern)
        chosen = super().chosen(sites)
        kept = {
            path: site for path, site in chosen.items() if "s" in site.axes or last.get(place(site, self.layer_pattern))
        }
        if not kept:
            raise ValueError(
                f"none of {', '.join(list(chosen)[:5])}{', ...' if len(chosen) > 5 else ''} is in the last layers: "
                "expected stacked leaves, or paths with a layer's number; write layer_pattern=r'block(\\d+)/'"
            )
        return kept

    def check(self, site: Site) -> str | None:
        if site.axes.count("s") > 1:
            return f"its axes {site.axes!r} are stacked in more than one way, and the layers in no one order"
        if "s" in site.axes and (length := site.shape[site.axes.index("s")]) < self.num_layers:
            return f"num_layers {self.num_layers} is above its {length} layers"
        return None

    def wrap(self, key, leaf, site: Site) -> Weight:
        axis = site.axes.find("s")
        if axis < 0 or site.shape[axis] == self.num_layers:
            return super().wrap(key, leaf, site)
        cut, axes = site.shape[axis] - self.num_layers, site.axes.lstrip("s")
        layers = lambda start, stop: _along(leaf, axis, lambda a, k: lax.slice_in_dim(a, start, stop, axis=k))
        tail = to_matrix(dense(layers(cut, site.shape[axis])), site.axes)
        return Tail(layers(0, cut), tail, axes=axes)


def _along(leaf, axis: int, fn):
    return leaf.along(axis, fn) if isinstance(leaf, Weight) else fn(leaf, axis)
