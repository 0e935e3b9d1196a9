"""The search for the intrinsic dimension: the least in which training reaches a given part of what it can.

d90 is that for 90 % of full fine-tuning (Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jpeft.methods.intrinsicdimension import IntrinsicDimension

__all__ = ["intrinsic_dimension", "Search"]


@dataclass(frozen=True)
class Search:
    """What the search found; prints as a table.

    Attributes:
        dimension: the least dimension that was enough; None where none was.
        threshold: the score that is enough.
        tries: `(dimension, score)` in the order in which they were tried.
    """

    dimension: int | None
    threshold: float
    tries: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        rows = [
            f"{d:>12,}  {score:>10.4f}  {'yes' if score >= self.threshold else 'no'}" for d, score in sorted(self.tries)
        ]
        found = "none was enough" if self.dimension is None else f"the least that was enough: {self.dimension:,}"
        return "\n".join([f"{'dimension':>12}  {'score':>10}  >= {self.threshold:.4f}", *rows, found])


def intrinsic_dimension(
    score: Callable[[Any], float],
    baseline: float,
    method: IntrinsicDimension | None = None,
    *,
    fraction: float = 0.9,
    start: int = 1024,
    smallest: int = 1,
    largest: int = 2**20,
    factor: int = 4,
    precision: float = 0.1,
) -> Search:
    """The least dimension of `method` whose score is at least `fraction · baseline`.

    From `start` the dimension is multiplied by `factor` until it is enough (divided, until it is not); the bracket is
    then halved in the logarithm until its ends differ by less than `precision` of the lower one. The score is taken to
    grow with the dimension; single runs are noisy, so let `score` average over seeds where that matters.

    Args:
        score: `score(method) -> float`: train with the method, evaluate, higher is better. Each call is one run.
        baseline: the score of full fine-tuning, above zero.
        method: targets and structure; its own dimension is not used. `IntrinsicDimension()` where None.
        fraction: part of the baseline that is enough; 0.9 gives d90.
        start, smallest, largest: the first dimension tried, and the ends of the search. SAID needs `smallest` above the
            number of its λ.
        factor, precision: see above.

    Raises:
        ValueError: a baseline, fraction, range, factor or precision that makes no search.

    Example:
        >>> import jpeft
        >>> found = jpeft.intrinsic_dimension(lambda method: min(1.0, method.dimension / 300), baseline=1.0)
        >>> 270 <= found.dimension <= 297
        True
    """
    method = IntrinsicDimension() if method is None else method
    if not (baseline > 0 and math.isfinite(baseline)):
        raise ValueError(f"expected a baseline above zero, a score of which higher is better, got {baseline=}")
    if not 0 < fraction <= 1:
        raise ValueError(f"expected 0 < fraction <= 1, got {fraction=}")
    if not 1 <= smallest <= start <= largest:
        raise ValueError(f"expected 1 <= smallest <= start <= largest, got {smallest=}, {start=}, {largest=}")
    if not (isinstance(factor, int) and factor > 1 and precision > 0):
        raise ValueError(f"expected a whole factor > 1 and precision > 0, got {factor=}, {precision=}")
    threshold = fraction * baseline
    tries: list[tuple[int, float]] = []

    def enough(dimension: int) -> bool:
        tries.append((dimension, float(score(replace(method, dimension=dimension)))))
        return tries[-1][1] >= threshold

    low, high = _bracket(enough, start, smallest, largest, factor)
    while low is not None and high is not None and high > max(low + 1, (1 + precision) * low):
        middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return Search(high, threshold, tuple(tries))


def _bracket(enough, start: int, smallest: int, largest: int, factor: int) -> tuple[int | None, int | None]:
    """`(a dimension that is not enough, one that is)`, neighbours in a geometric row; None where there is none."""
    low = high = None
    if enough(start):
        high = start
        while low is None and high > smallest:
            smaller = max(smallest, high // factor)
            low, high = (low, smaller) if enough(smaller) else (smaller, high)
    else:
        low = start
        while high is None and low < largest:
            larger = min(largest, low * factor)
            low, high = (low, larger) if enough(larger) else (larger, high)
    return low, high
