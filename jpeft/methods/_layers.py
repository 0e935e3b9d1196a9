"""Which layers are the last: by the number in the path, where layers are leaves of their own, else by their place."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jpeft.core.sites import Site

__all__ = ["LAYER", "check_pattern", "last_layers", "place"]

LAYER = r"(?:^|[/_.])(\d+)(?=/)"
"""A regex whose first group is the layer's number in a path."""


def check_pattern(pattern: str) -> None:
    """Raise a ValueError for a pattern that gives no number."""
    if re.compile(pattern).groups < 1:
        raise ValueError(f"expected layer_pattern with a group for the number, got {pattern!r}")


def place(site: Site, pattern: str) -> tuple[str, int] | None:
    """The stack and the number of a layer that is a leaf of its own; None for others."""
    found = re.search(pattern, site.path)
    return (site.path[: found.start(1)], int(found[1])) if found and "s" not in site.axes else None


def last_layers(sites: Iterable[Site], num_layers: int, pattern: str) -> dict[tuple[str, int] | None, bool]:
    """Whether a layer is among the last of its stack, for each `place` in a stack of at least two layers.

    Raises:
        ValueError: a stack of fewer than `num_layers`.
    """
    stacks: dict[str, set[int]] = {}
    for stack, number in filter(None, (place(site, pattern) for site in sites)):
        stacks.setdefault(stack, set()).add(number)
    stacks = {stack: numbers for stack, numbers in stacks.items() if len(numbers) > 1}
    short = [f"{stack}*: {len(numbers)} layers" for stack, numbers in stacks.items() if len(numbers) < num_layers]
    if short:
        raise ValueError(f"expected stacks of at least num_layers={num_layers} layers, got {', '.join(short)}")
    return {
        (stack, number): number in sorted(numbers)[-num_layers:]
        for stack, numbers in stacks.items()
        for number in numbers
    }
