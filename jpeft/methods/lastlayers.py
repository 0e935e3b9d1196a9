"""Last layers: only the last few layers train, in full (Lee et al. 2019, arXiv 1911.03090; Howard and Ruder 2018,
arXiv 1801.06146, unfreeze from there).

Where layers are leaves of their own, the number in the path says which are last. Where they are stacked in one leaf,
its end along the stack is a trainable array of its own:

    W = [base; tail],        base (n - num_layers, ...) frozen, tail (num_layers, ...) trainable

and a scan over the stack runs in two parts, so that the backward pass ends where training does: it neither keeps
activations of the frozen layers nor forms their gradients.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.core.method import Selective
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets
from jpeft.core.weight import Unfrozen, Weight, apply, dense, from_matrix, labels_of, static, to_matrix, weight

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
        layers = _concrete(lambda: fn(np.arange(self.shape[axis]), 0))
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


def _concrete(fn) -> np.ndarray | None:
    """What `fn` gives, if it depends on nothing that is known only when it is run."""
    with jax.ensure_compile_time_eval():
        value = fn()
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


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
    layer_pattern: str = r"(?:^|[/_.])(\d+)(?=/)"
    targets: Targets = field(default="", kw_only=True)

    KINDS = ("dense", "experts", "embedding", "conv", "scale", "bias", "other")
    FORMS_DENSE_UPDATE = "the weights themselves train, and their gradients are dense"

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers < 1:
            raise ValueError(f"expected num_layers >= 1, got num_layers={self.num_layers}")
        if re.compile(self.layer_pattern).groups < 1:
            raise ValueError(f"expected layer_pattern with a group for the number, got {self.layer_pattern!r}")

    def chosen(self, sites: Sites) -> dict[str, Site]:
        layers: dict[str, set[int]] = {}
        for stack, number in filter(None, map(self._place, sites)):
            layers.setdefault(stack, set()).add(number)
        short = [f"{stack}*: {len(n)} layers" for stack, n in layers.items() if 1 < len(n) < self.num_layers]
        if short:
            raise ValueError(f"expected stacks of at least num_layers={self.num_layers} layers, got {', '.join(short)}")
        last = {
            (s, n) for s, numbers in layers.items() if len(numbers) > 1 for n in sorted(numbers)[-self.num_layers :]
        }
        chosen = super().chosen(sites)
        kept = {path: site for path, site in chosen.items() if "s" in site.axes or self._place(site) in last}
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

    def _place(self, site: Site) -> tuple[str, int] | None:
        """The stack and the number of a layer that is a leaf of its own."""
        found = re.search(self.layer_pattern, site.path)
        return (site.path[: found.start(1)], int(found[1])) if found and "s" not in site.axes else None


def _along(leaf, axis: int, fn):
    return leaf.along(axis, fn) if isinstance(leaf, Weight) else fn(leaf, axis)
