"""How torch lays out what a Weight's field is: letters in, letters out. See `core.export` for the letters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jpeft.core.sites import Site

__all__ = ["Layout", "Window"]


@dataclass(frozen=True)
class Window:
    """The input axes of a convolution's kernel: their sizes in the leaf's order, torch's order (channels, *window)."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, site: Site) -> Window | None:
        """None where the site is no convolution.

        Raises:
            ValueError: outputs in the middle: the channels are known by standing beside the outputs, at either end.
        """
        if site.kind != "conv":
            return None
        axes = site.axes.lstrip("s")
        sizes = tuple(n for n, c in zip(site.shape, site.axes, strict=True) if c == "i")
        rest = tuple(range(len(sizes)))
        if axes.endswith("o"):
            return cls(sizes, (rest[-1], *rest[:-1]))
        if axes.startswith("o"):
            return cls(sizes, rest)
        raise ValueError(
            f"{site.path}: of the axes {axes} it is not known which are the channels; expected o at an end"
        )


@dataclass(frozen=True)
class Layout:
    """From a field of one layer, with the letters `has`, to torch's tensor, with the letters `wants`, and back."""

    has: str
    wants: str
    window: Window | None = None

    def shape(self, field: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, of a field of this shape."""
        return self._plan(field)[2]

    def to_torch(self, field: np.ndarray) -> np.ndarray:
        """The tensor of a field."""
        apart, order, shape = self._plan(field.shape)
        return np.array(field.reshape(apart).transpose(order).reshape(shape), order="C")

    def from_torch(self, tensor: np.ndarray, field: Sequence[int]) -> np.ndarray:
        """The field, of this shape, of a tensor."""
        apart, order, _ = self._plan(field)
        back = tensor.reshape([apart[k] for k in order]).transpose(np.argsort(order))
        return np.array(back.reshape(tuple(field)), order="C")

    def _plan(self, field: Sequence[int]):
        """`(the field's shape with a convolution's axes apart, their order in torch, torch's shape)`."""
        sizes: list[int] = []
        places: dict[str, list[int]] = {}
        for letter, size in zip(self.has, field, strict=True):
            apart, order = (self.window.sizes, self.window.order) if letter == "i" and self.window else ((size,), (0,))
            places[letter] = [len(sizes) + k for k in order]
            sizes += apart
        order, shape = [], []
        for token in re.findall(r"\([^)]*\)|.", self.wants):
            axes = [k for letter in token.strip("()") for k in places.get(letter, [])]
            order += axes
            if token.startswith("("):
                shape.append(math.prod(sizes[k] for k in axes))
            elif axes:
                shape += [sizes[k] for k in axes]
            else:
                shape += [1] * (len(self.window.sizes) - 1 if token == "w" and self.window else 1)
        return sizes, order, tuple(shape)
