"""How a leaf is seen after transposes and reshapes that have not been carried out.

A `Layout` describes a view of an array of shape `base` without holding it. Every base axis is cut into one or more
*parts* (major first); a view axis is a run of parts, and

    view = reshape(transpose(reshape(base, parts)), view shape).

Parts of size one may be hidden: they belong to no view axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax

__all__ = ["Layout", "taken"]

Part = tuple[int, int]  # (base axis, which part of it)


@dataclass(frozen=True)
class Layout:
    """`cuts[k]` are the sizes of base axis k's parts; `axes[j]` the parts that view axis j runs over."""

    cuts: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[Part, ...], ...]

    @classmethod
    def identity(cls, shape) -> Layout:
        return cls(tuple((int(n),) for n in shape), tuple(((k, 0),) for k in range(len(shape))))

    def size(self, part: Part) -> int:
        return self.cuts[part[0]][part[1]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(map(self.size, parts)) for parts in self.axes)

    @property
    def base_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(sizes) for sizes in self.cuts)

    def base_axis(self, view_axis: int) -> int | None:
        """The base axis that a view axis is, whole; None where it is merged or cut."""
        parts = [p for p in self.axes[view_axis]]
        whole = {p[0] for p in parts}
        if len(whole) == 1:
            (axis,) = whole
            if parts == [(axis, n) for n in range(len(self.cuts[axis]))]:
                return axis
        return None

    def transpose(self, permutation) -> Layout:
        return Layout(self.cuts, tuple(self.axes[k] for k in permutation))

    def squeeze(self, dims) -> Layout:
        dims = {d % len(self.axes) for d in dims}
        return Layout(self.cuts, tuple(a for k, a in enumerate(self.axes) if k not in dims))

    def without(self, base_axis: int) -> Layout:
        """The view after `base_axis`, which no view axis shows, is gone from the base."""
        move = lambda part: (part[0] - (part[0] > base_axis), part[1])
        cuts = tuple(c for k, c in enumerate(self.cuts) if k != base_axis)
        return Layout(cuts, tuple(tuple(map(move, a)) for a in self.axes))

    def reshape(self, shape) -> Layout | None:
        """The reshaped view, or None where the new axes do not fall on part boundaries even after cutting parts."""
        flat = [p for axis in self.axes for p in axis if self.size(p) != 1]
        sizes = [self.size(p) for p in flat]
        pieces: list[list[int]] = [[] for _ in flat]  # sizes that each part is cut into
        runs: list[list[tuple[int, int]]] = []
        k, left = 0, sizes[0] if sizes else 1
        for new in shape:
            run, need = [], int(new)
            while need != 1:
                if k == len(flat):
                    return None
                take = math.gcd(need, left) if left > need else left
                if take == 1 or need % take or left % take or (left > need and take != need):
                    return None
                run.append((k, len(pieces[k])))
                # the major piece of a part comes first
                pieces[k].append(take)
                need, left = need // take, left // take
                if left == 1:
                    k += 1
                    left = sizes[k] if k < len(flat) else 1
            runs.append(run)
        cuts = [list(c) for c in self.cuts]
        names: dict[tuple[int, int], Part] = {}
        renamed: dict[Part, list[Part]] = {}
        for axis, parts in enumerate(self.cuts):
            new_sizes: list[int] = []
            for n, size in enumerate(parts):
                part = (axis, n)
                if part in flat and size != 1:
                    j = flat.index(part)
                    renamed[part] = [(axis, len(new_sizes) + m) for m in range(len(pieces[j]))]
                    for m in range(len(pieces[j])):
                        names[j, m] = renamed[part][m]
                    new_sizes += pieces[j]
                else:
                    new_sizes.append(size)
            cuts[axis] = new_sizes
        return Layout(tuple(map(tuple, cuts)), tuple(tuple(names[r] for r in run) for run in runs))

    def apply(self, array):
        """The view of a concrete array of the base shape, carried out."""
        if self == Layout.identity(array.shape):
            return array
        parts = [(k, n) for k, sizes in enumerate(self.cuts) for n in range(len(sizes))]
        shown = [p for axis in self.axes for p in axis]
        order = shown + [p for p in parts if p not in shown]
        permutation = [parts.index(p) for p in order]
        if len(parts) != array.ndim:
            array = array.reshape([self.size(p) for p in parts])
        if permutation != sorted(permutation):
            array = lax.transpose(array, permutation)
        return array if array.shape == self.shape else array.reshape(self.shape)


def taken(fn: Callable, size: int) -> np.ndarray | None:
    """The places that `fn(array, axis)`, a cut, takes of an axis; None where they are known only when it runs."""
    with jax.ensure_compile_time_eval():
        value = fn(np.arange(size), 0)
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)
