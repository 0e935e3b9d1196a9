"""count: how many parameters train, and how many there are, by leaf."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from jpeft.core.method import Tied, full_mask, untied
from jpeft.core.tree import leaves_with_paths
from jpeft.core.weight import Weight

__all__ = ["Count", "count"]


@dataclass(frozen=True)
class Count:
    """Numbers of parameters; prints as a table."""

    trainable: int
    total: int
    groups: tuple[tuple[str, int, int], ...]

    @property
    def fraction(self) -> float:
        return self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        rows = [("parameters", "trainable", "total", "%")]
        for name, train, total in (*self.groups, ("all", self.trainable, self.total)):
            rows.append((name, f"{train:,}", f"{total:,}", f"{100 * train / max(total, 1):.4f}"))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join((str.rjust if k else str.ljust)(c, widths[k]) for k, c in enumerate(row)) for row in rows]
        rule = "─" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def count(tree) -> Count:
    """Trainable and total numbers of parameters of a bound tree or of one half, by leaf. Works on shapes alone.

    The total holds the adapters' own parameters too, as HF PEFT counts.
    """
    groups, seen = [], set()
    whole = jax.tree.map(untied, tree, is_leaf=lambda x: isinstance(x, Tied))
    for path, leaf in leaves_with_paths(whole):
        leaf = _without_seen(leaf, seen)
        sizes = [math.prod(x.shape) for x in jax.tree.leaves(leaf)]
        mask = jax.tree.leaves(full_mask(leaf))
        train = sum(n for n, t in zip(sizes, mask, strict=True) if t)
        groups.append((path, train, sum(sizes)))
    return Count(sum(g[1] for g in groups), sum(g[2] for g in groups), tuple(groups))


def _without_seen(leaf, seen: set):
    """A Weight without the shared arrays that an earlier leaf has shown.

    An array is known by its name and shape among the Weights of a class, and by how many of the class are below: where
    a method is chained with itself, each has arrays of its own.
    """
    if not isinstance(leaf, Weight):
        return leaf
    below = sum(type(w) is type(leaf) for w in _held(leaf))
    shape = lambda field: getattr(getattr(leaf, field), "shape", None)
    marks = {field: (type(leaf), below, name, shape(field)) for field, name in leaf.tied().items()}
    again = [field for field, mark in marks.items() if mark in seen]
    seen.update(marks.values())
    return leaf.replace(base=_without_seen(leaf.base, seen), **dict.fromkeys(again))


def _held(weight: Weight):
    """The Weights inside a Weight, from the outside in."""
    while isinstance(weight.base, Weight):
        weight = weight.base
        yield weight
