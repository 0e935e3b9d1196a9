"""SHiRA: sparse high-rank adapters (Bhardwaj et al. 2024, arXiv 2406.13175).

    W' = W + S(values, index)

values (*stack, *batch, k) start at zero, index (*stack, *batch, 2, k) stays. The paper's masks, k = rank · (in + out)
as in HF PEFT, so that a matrix trains as many numbers as LoRA of that rank:

    rand      k entries, all equally likely
    wm        the k largest |W|
    grad      the k largest |∂loss/∂W|, summed over batches
    snip      the k largest |W · ∂loss/∂W|
    struct    `rank` whole rows, `rank` whole columns, evenly spaced, and the diagonal
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jpeft.core.export import Export
from jpeft.core.method import Method, Saved
from jpeft.core.sites import Site
from jpeft.core.weight import dense, matrix_sizes, to_matrix
from jpeft.methods._sparse import DENSE, INDEX, Entries, FoundEntries, largest_index, random_index, too_many_entries

__all__ = ["SHiRA"]

_MASKS = ("rand", "wm", "grad", "snip", "struct")


@dataclass(frozen=True)
class SHiRA(Method):
    """A sparse update of high rank, as large as a LoRA of rank `rank`. Mergeable; the pretrained function at first.

    Fields:
        rank: sizes the adapter; the update's own rank is not bounded by it.
        mask: which entries train: `"rand"` (HF PEFT's), `"wm"`, `"grad"`, `"snip"` or `"struct"`. `"grad"` and `"snip"`
            need a calibration with a loss.
        offset: moves the rows and columns of `"struct"`; adapters with different offsets share only the diagonal and
            crossings, which is what makes them add well.

    Raises:
        ValueError: from the constructor: a rank below 1, a negative offset, an unknown mask; from `init`: a matrix with
            fewer entries (for `"struct"` rows or columns) than the rank asks for; no calibration where one is needed.

    Example:
        >>> import jpeft
        >>> jpeft.SHiRA(rank=8, mask="wm").mask
        'wm'
    """

    rank: int = 32
    mask: Literal["rand", "wm", "grad", "snip", "struct"] = "rand"
    offset: int = 0

    FORMS_DENSE_UPDATE = DENSE
    ADDS_FROZEN = INDEX
    OBSERVES = "gradients"
    EXPORT = Export(
        "SHIRA",
        {"dense": {"shira_weight": ("values", "k"), "shira_indices": ("index", "pk")}},
        config={"r": "rank"},
        fixed={"mask_type": "random"},
        neutral={"random_seed": (), "init_weights": ()},
    )
    SMALL = {"rank": 2}

    @property
    def CALIBRATION(self) -> str:  # noqa: N802  the same data as on a method's class
        return "gradients of the loss" if self.mask in ("grad", "snip") else ""

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1, got rank={self.rank}")
        if self.offset < 0:
            raise ValueError(f"expected offset >= 0, got offset={self.offset}")
        if self.mask not in _MASKS:
            raise ValueError(f"expected mask in {_MASKS}, got {self.mask!r}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        if self.mask == "struct" and self.rank > min(n_in, n_out):
            return f"rank {self.rank} is above min(in, out) = min({n_in}, {n_out}); write a smaller rank"
        if self.mask != "struct" and self.rank * (n_in + n_out) > n_in * n_out:
            return (
                f"rank {self.rank} asks for {self.rank * (n_in + n_out)} of its {n_in} × {n_out} entries; "
                f"write a rank of at most {n_in * n_out // (n_in + n_out)}, or leave it out of `targets`"
            )
        return too_many_entries(site)

    def observe(self, state, seen, site: Site):
        gradient = seen.astype(jnp.promote_types(seen.dtype, jnp.float32))
        return gradient if state is None else state + gradient

    def wrap(self, key, leaf, site: Site) -> Entries:
        return self.wrap_calibrated(key, leaf, site, None)

    def wrap_calibrated(self, key, leaf, site: Site, given) -> Entries:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        count = self.rank * (n_in + n_out)
        if self.mask == "rand":
            index = random_index(key, lead, n_in, n_out, count)
        elif self.mask == "struct":
            one = rows_columns_diagonal(n_in, n_out, self.rank, self.offset)
            index = jnp.broadcast_to(one, (*lead, *one.shape))
        elif isinstance(given, Saved):
            index = given["index"]
        else:
            score = {"wm": lambda: dense(leaf), "grad": lambda: given, "snip": lambda: given * dense(leaf)}[self.mask]()
            index = largest_index(jnp.abs(to_matrix(score, site.axes)), count)
        values = jnp.zeros((*lead, index.shape[-1]), jnp.promote_types(leaf.dtype, jnp.float32))
        kind = FoundEntries if self.CALIBRATION else Entries
        return kind(leaf, values, index, axes=site.axes.lstrip("s"))


def rows_columns_diagonal(n_in: int, n_out: int, rank: int, offset: int) -> np.ndarray:
    """Positions (2, k) of `rank` evenly spaced inputs and outputs, whole, and of the diagonal, each once."""
    mask = np.eye(n_out, n_in, dtype=bool)
    spaced = lambda n: (np.arange(rank) * n // rank + offset) % n
    mask[spaced(n_out)] = True
    mask[:, spaced(n_in)] = True
    return np.stack(np.nonzero(mask)).astype(np.int32)
