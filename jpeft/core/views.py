"""View: a Weight as the lifted function sees it, and the equations that only change how it is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax

from jpeft.core.layout import Layout
from jpeft.core.shards import field_specs
from jpeft.core.weight import Weight

__all__ = ["LAZY", "View"]


@dataclass(frozen=True)
class View:
    """A Weight as the function sees it: through a lazy layout and a lazy cast."""

    weight: Weight
    layout: Layout
    dtype: Any
    path: str

    @classmethod
    def of(cls, weight: Weight, path: str) -> View:
        return cls(weight.fitted(), Layout.identity(weight.shape), weight.dtype, path)

    def through(self, layout: Layout | None) -> View | None:
        return None if layout is None else View(self.weight, layout, self.dtype, self.path)

    def cut(self, axis: int, fn: Callable, *, drop: bool = False) -> View | None:
        """Slice (or index, with `drop`) every field along a view axis; None where the Weight cannot."""
        base_axis = self.layout.base_axis(axis)
        if base_axis is None or len(self.layout.cuts[base_axis]) != 1:
            return None
        weight = self.weight.along(base_axis, fn, drop=drop)
        if weight is None:
            return None
        if drop:
            layout = self.layout.squeeze([axis]).without(base_axis)
        else:
            cuts = list(self.layout.cuts)
            cuts[base_axis] = (weight.shape[base_axis],)
            layout = Layout(tuple(cuts), self.layout.axes)
        return View(weight, layout, self.dtype, self.path)

    def layers_differ_at(self) -> tuple[int, ...]:
        """Places along view axis 0, a stack of layers, from which on the Weight is of another kind."""
        axis = self.layout.base_axis(0)
        return self.weight.cuts() if axis is not None and self.weight.labels[axis] == "s" else ()

    def shards(self, entries, sizes: dict[str, int]) -> tuple[View, Weight, Layout]:
        """`(view, specs, layout)` where view axis k is split over the mesh axes `entries[k]`: the view in a form that
        can be cut so, how each field is split, and one shard's layout.

        Raises:
            ValueError: a split axis is no whole axis of the leaf, or one that the fields do not show.
        """
        cuts = list(self.layout.cuts)
        split: list[Any] = [None] * len(cuts)
        for axis, names in enumerate(entries):
            if not names:
                continue
            base_axis = self.layout.base_axis(axis)
            if base_axis is None or len(cuts[base_axis]) != 1:
                raise ValueError(f"axis {axis} is split over the mesh after it was merged or cut")
            count = math.prod(sizes[n] for n in ((names,) if isinstance(names, str) else names))
            cuts[base_axis], split[base_axis] = (cuts[base_axis][0] // count,), names
        letters = "".join({c for c, names in zip(self.weight.labels, split, strict=True) if names and c in "io"})
        whole = replace(self, weight=self.weight.cut_out().cuttable(letters))
        return whole, field_specs(whole.weight, split), Layout(tuple(cuts), self.layout.axes)

    def op_arguments(self) -> tuple[Layout, str, Any]:
        return self.layout, self.weight.labels, self.dtype

    def dense(self) -> jax.Array:
        return self.layout.apply(self.weight.dense()).astype(self.dtype)


# Equations that leave a View lazy: (view, equation, other operands) -> View, or None where they cannot.


def _cast(view, eqn, _):
    return View(view.weight, view.layout, eqn.params["new_dtype"], view.path)


def _reshape(view, eqn, _):
    return None if eqn.params["dimensions"] is not None else view.through(view.layout.reshape(eqn.params["new_sizes"]))


def _squeeze(view, eqn, _):
    return _squeezed(view, eqn.params["dimensions"])


def _squeezed(view, dims):
    for axis in sorted((d % len(view.layout.axes) for d in dims), reverse=True):
        base_axis = view.layout.base_axis(axis)
        if base_axis is not None and view.weight.labels[base_axis] in "sb":
            view = view.cut(axis, lambda a, k: a.squeeze(k), drop=True)
        else:
            view = view.through(view.layout.squeeze([axis]))
        if view is None:
            return None
    return view


def _slice(view, eqn, _):
    strides = eqn.params["strides"] or [1] * len(view.layout.axes)
    for axis, cut in enumerate(zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)):
        if view is not None and cut != (0, view.layout.shape[axis], 1):
            view = view.cut(axis, lambda a, k, cut=cut: lax.slice_in_dim(a, *cut, axis=k))
    return view


def _dynamic_slice(view, eqn, starts):
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if view is not None and size != view.layout.shape[axis]:
            cut = lambda a, k, s=starts[axis], n=size: lax.dynamic_slice_in_dim(a, s, n, k)
            view = view.cut(axis, cut)
    return view


def _expand(view, eqn, _):
    """New axes of size one; a true broadcast is not lazy."""
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    kept = tuple(shape[d] for d in dims) == view.layout.shape and math.prod(shape) == math.prod(view.layout.shape)
    return view.through(view.layout.reshape(shape)) if kept else None


def _split(view, eqn, _):
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])
    return _pieces(
        view, axis, [(int(end) - int(n), int(end)) for n, end in zip(eqn.params["sizes"], ends, strict=True)]
    )


def _unstack(view, eqn, _):
    axis = eqn.params["axis"]
    pieces = _pieces(view, axis, [(n, n + 1) for n in range(view.layout.shape[axis])])
    return pieces and [_squeezed(piece, [axis]) for piece in pieces]


def _pieces(view, axis: int, bounds) -> list[View] | None:
    """The view cut along an axis; None where it cannot be."""
    pieces = [view.cut(axis, lambda a, k, b=b: lax.slice_in_dim(a, *b, axis=k)) for b in bounds]
    return None if None in pieces else pieces


LAZY: dict[str, Callable] = {
    "broadcast_in_dim": _expand,
    "split": _split,
    "unstack": _unstack,
    "transpose": lambda view, eqn, _: view.through(view.layout.transpose(eqn.params["permutation"])),
    "reshape": _reshape,
    "convert_element_type": _cast,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "sharding_constraint": lambda view, eqn, _: view,
    "copy": lambda view, eqn, _: view,
    "copy_p": lambda view, eqn, _: view,
    "name": lambda view, eqn, _: view,
    "stop_gradient": lambda view, eqn, _: replace(view, weight=jax.tree.map(lax.stop_gradient, view.weight)),
    "pvary": lambda view, eqn, _: view,  # inserted again where the fields are used
}
