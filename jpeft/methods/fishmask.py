"""FISH Mask: the entries with the most Fisher information train (Sung et al. 2021, arXiv 2111.09839).

    W' = W + S(values, index),        index: the k entries with the largest F = Σ_batches (∂loss/∂W)²

values (*stack, *batch, k) start at zero. The paper's F is a sum over examples: batches of one example each give it
exactly; larger ones square the mean gradient and tell less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Method, Saved
from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.core.weight import matrix_sizes, to_matrix
from jpeft.methods._sparse import DENSE, INDEX, FoundEntries, largest_index, too_many_entries

__all__ = ["FishMask"]


@dataclass(frozen=True)
class FishMask(Method):
    """A fixed mask of the most informative parameters. Mergeable; the pretrained function at first.

    The paper chooses among all parameters at once; here each matrix keeps at least one entry, and one without any
    information no more. The matrices of one stacked
    leaf then have different numbers of entries: `values` is as long as the largest needs, and the rest of it does
    nothing (its gradients are zero).

    Fields:
        fraction: of the entries of all targets together, or with `scope="matrix"` of each matrix.
        scope: `"global"` (the paper) or `"matrix"`.

    Raises:
        ValueError: from the constructor: a fraction outside (0, 1], an unknown scope; from `init`: no calibration, or a
            matrix with more entries than an index can name.

    Example:
        >>> import jpeft
        >>> jpeft.FishMask(fraction=0.002).scope
        'global'
    """

    fraction: float = 0.005
    scope: Literal["global", "matrix"] = "global"
    targets: Targets = field(default="", kw_only=True)

    KINDS = ("dense", "experts", "embedding", "conv", "scale", "bias")
    FORMS_DENSE_UPDATE = DENSE
    ADDS_FROZEN = INDEX
    CALIBRATION = "squared gradients of the loss"
    OBSERVES = "gradients"
    SMALL = {"fraction": 0.05, "scope": "matrix", "targets": "all-linear"}

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"expected 0 < fraction <= 1, got fraction={self.fraction}")
        if self.scope not in ("global", "matrix"):
            raise ValueError(f"expected scope as 'global' or 'matrix', got {self.scope!r}")

    def check(self, site: Site) -> str | None:
        return too_many_entries(site)

    def observe(self, state, seen, site: Site):
        gradient = seen.astype(jnp.promote_types(seen.dtype, jnp.float32))
        return jnp.square(gradient) if state is None else state + jnp.square(gradient)

    def conclude(self, states: dict[str, Any], chosen: dict[str, Site]) -> dict[str, Any]:
        fisher = {path: to_matrix(state, chosen[path].axes) for path, state in states.items()}
        if self.scope == "matrix":
            size = lambda m: max(1, int(self.fraction * m.shape[-2] * m.shape[-1]))
            return {path: largest_index(m, size(m)) for path, m in fisher.items()}
        total = max(1, int(self.fraction * sum(m.size for m in fisher.values())))
        least = max(kth_largest(list(fisher.values()), total), float(np.finfo(np.float32).tiny))
        return {path: at_least(m, least) for path, m in fisher.items()}

    def wrap_calibrated(self, key, leaf, site: Site, given) -> FoundEntries:
        index = given["index"] if isinstance(given, Saved) else given
        lead = matrix_sizes(site.shape, site.axes)[0]
        values = jnp.zeros((*lead, index.shape[-1]), jnp.promote_types(leaf.dtype, jnp.float32))
        return FoundEntries(leaf, values, index, axes=site.axes.lstrip("s"))


def kth_largest(arrays: list, k: int) -> float:
    """The k-th largest of the nonnegative numbers in several arrays, without a copy of them all.

    Such numbers are ordered as their bits are: one count of the upper 16 bits, one of the lower.
    """
    bits = [np.asarray(a, np.float32).view(np.uint32).ravel() for a in arrays]
    upper, k = _of_rank((b >> 16 for b in bits), k)
    lower, _ = _of_rank((b[b >> 16 == upper] & 0xFFFF for b in bits), k)
    return float(np.uint32(upper << 16 | lower).view(np.float32))


def _of_rank(arrays: Iterable, k: int) -> tuple[int, int]:
    """The k-th largest of numbers of 16 bits, and its rank among those that equal it."""
    counts = sum(np.bincount(a, minlength=2**16) for a in arrays)
    reached = np.cumsum(np.asarray(counts)[::-1])
    place = int(np.searchsorted(reached, k))
    return 2**16 - 1 - place, k - (int(reached[place - 1]) if place else 0)


def at_least(matrices, least: float) -> jax.Array:
    """Positions (*lead, 2, k) of the entries >= `least` > 0 of each matrix, or of its largest where there are none.

    k is the largest number of them in one matrix; elsewhere positions outside the matrix fill up.
    """
    lead, (n_in, n_out) = matrices.shape[:-2], matrices.shape[-2:]
    found = []
    for matrix in np.asarray(matrices, np.float32).reshape(-1, n_in * n_out):
        flat = np.flatnonzero(matrix >= least) if matrix.max() >= least else np.array([matrix.argmax()])
        found.append(np.stack([flat % n_out, flat // n_out]))
    most = max(one.shape[1] for one in found)
    outside = np.array([[n_out], [n_in]])
    filled = [np.concatenate([one, outside.repeat(most - one.shape[1], 1)], 1) for one in found]
    return jnp.asarray(np.stack(filled).reshape(*lead, 2, most), jnp.int32)
