"""Pieces: a stack of layers that are not all of one kind, some compressed and some dense, or compressed differently.

    W = [piece_0; piece_1; ...]        along the stack, each (n, *axes) a Weight or an array

So come models whose maker left single layers dense. A scan over the stack runs in as many parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.core.layout import taken
from jpeft.core.weight import Unfrozen, Weight, apply, dense, static, weight

__all__ = ["Pieces", "stacked"]


@weight
class Pieces(Weight):
    """The stack is the leaf's first axis; `base` has two pieces or more, of one dtype."""

    base: tuple[Any, ...]
    axes: str = static()

    SLICEABLE = "io"  # as far as the pieces are

    @property
    def shape(self):
        return (sum(self._lengths), *self.base[0].shape[1:])

    @property
    def dtype(self):
        return self.base[0].dtype

    @property
    def _lengths(self) -> list[int]:
        return [piece.shape[0] for piece in self.base]

    def cuts(self):
        return tuple(np.cumsum(self._lengths)[:-1].tolist())

    def apply(self, op, x):
        return apply(op, x, self.dense())

    def dense(self):
        return jnp.concatenate([dense(piece) for piece in self.base])

    def standing_for(self, array):
        """Each piece again, of its layers."""
        parts = jnp.split(array, self.cuts())
        again = lambda piece, a: piece.standing_for(a) if isinstance(piece, Weight) else a.astype(piece.dtype)
        return self.replace(base=tuple(again(piece, a) for piece, a in zip(self.base, parts, strict=True)))

    def along(self, axis, fn, *, drop=False):
        if axis == 0:
            return self._layers(taken(fn, self.shape[0]))
        cut = [p.along(axis, fn, drop=drop) if isinstance(p, Weight) else fn(p, axis) for p in self.base]
        if any(piece is None for piece in cut):
            return None
        written = axis - (self.ndim - len(self.axes))
        return self.replace(base=tuple(cut), axes=self.axes[:written] + self.axes[written + drop :])

    def _layers(self, layers: np.ndarray | None) -> Weight | None:
        """The Weight of layers that are so many apart; None where they are not known."""
        if layers is None:
            return None
        step = int(layers[1] - layers[0]) if layers.size > 1 else 1
        found, start = [], 0
        for piece, n in zip(self.base, self._lengths, strict=True):
            inside = layers[(layers >= start) & (layers < start + n)] - start
            if inside.size:
                cut = lambda a, k, of=inside: lax.slice_in_dim(a, int(of[0]), int(of[-1]) + 1, step, k)
                found.append(piece.along(0, cut) if isinstance(piece, Weight) else cut(piece, 0))
            start += n
        if len(found) > 1:
            return self.replace(base=tuple(found))
        return found[0] if isinstance(found[0], Weight) else Unfrozen(found[0], axes=self.axes)


def stacked(layers: Sequence[Any], axes: str) -> Any:
    """Layers, Weights or arrays, as one leaf: one Weight or array where they are alike, else `Pieces`."""
    kind: Callable = lambda x: (jax.tree.structure(x), [(a.shape, a.dtype) for a in jax.tree.leaves(x)])
    runs: list[list[Any]] = []
    for layer in layers:
        if not runs or kind(runs[-1][0]) != kind(layer):
            runs.append([])
        runs[-1].append(layer)
    pieces = [jax.tree.map(lambda *a: jnp.stack(a), *run) for run in runs]
    return pieces[0] if len(pieces) == 1 else Pieces(tuple(pieces), axes=axes)
