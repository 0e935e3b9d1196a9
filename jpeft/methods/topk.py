"""TopK: the largest entries of each matrix train (SHiRA-WM of Bhardwaj et al. 2024, arXiv 2406.13175), or the smallest
(PaFi, Liao et al. 2023, arXiv 2305.16742).

    W' = W + S(values, index),        index: the k entries of W with the largest (or smallest) |W_io|

values (*stack, *batch, k) start at zero; the choice is made for each matrix apart, once, from the pretrained weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.weight import dense, matrix_sizes, to_matrix
from jpeft.methods._sparse import DENSE, INDEX, Entries, largest_index, too_many_entries

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(Method):
    """A fixed fraction of each matrix's entries trains, chosen by magnitude. Mergeable.

    Fields:
        fraction: of each matrix's entries, at least one.
        count: entries of each matrix, in place of a fraction.
        which: `"largest"` or `"smallest"` magnitudes.

    Raises:
        ValueError: from the constructor: a fraction outside (0, 1], a count below 1, an unknown `which`; from `init`: a
            matrix with fewer entries than `count`, or with more than an index can name.

    Example:
        >>> import jpeft
        >>> jpeft.TopK(fraction=0.005, targets=["q_proj", "v_proj"]).fraction
        0.005
    """

    fraction: float = 0.01
    count: int | None = None
    which: Literal["largest", "smallest"] = "largest"

    FORMS_DENSE_UPDATE = DENSE
    ADDS_FROZEN = INDEX
    SMALL = {"fraction": 0.05}

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"expected 0 < fraction <= 1, got fraction={self.fraction}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"expected count >= 1, got count={self.count}")
        if self.which not in ("largest", "smallest"):
            raise ValueError(f"expected which as 'largest' or 'smallest', got {self.which!r}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        if self.count is not None and self.count > n_in * n_out:
            return f"count {self.count} is above its {n_in} × {n_out} entries; write a smaller count, or a fraction"
        return too_many_entries(site)

    def wrap(self, key, leaf, site: Site) -> Entries:
        matrix = to_matrix(dense(leaf), site.axes)
        *lead, n_in, n_out = matrix.shape
        count = self.count or max(1, int(self.fraction * n_in * n_out))
        magnitude = jnp.abs(matrix)
        index = largest_index(magnitude if self.which == "largest" else -magnitude, count)
        values = jnp.zeros((*lead, count), jnp.promote_types(leaf.dtype, jnp.float32))
        return Entries(leaf, values, index, axes=site.axes.lstrip("s"))
