"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, ICLR, OpenReview TwJrTz9cRS; not on arXiv).

    W' = W + W ∘ (A·B)

with A (*stack, *batch, in, rank) and B (*stack, *batch, rank, out). The rank of the update is up to rank(W)·rank. As
for LoRA, A starts Kaiming-uniform and B at zero; for an embedding A at zero and B from N(0, 1).

The forward reads W densely, so a compressed base is decoded whenever the update is formed; it stays compressed in
memory. A lookup of rows scales only the rows that it finds. `W` and `W ∘ (A·B)` are multiplied apart, since in 16 bits
an update below 1/256 of W would be rounded away in their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.ops import Gather
from jpeft.core.sites import Site
from jpeft.core.update import Update
from jpeft.core.weight import apply, dense, matrix_sizes, static, to_matrix, weight
from jpeft.methods._factors import kaiming_uniform, rank_problem

__all__ = ["HiRA", "Hadamard"]


@weight
class Hadamard(Update):
    """`base ∘ (1 + a @ b)`. Shapes: a (*stack, *batch, in, rank), b (*stack, *batch, rank, out)."""

    base: Any
    a: Any
    b: Any
    axes: str = static()

    FIELDS = {"a": "ir", "b": "ro"}
    TRAINABLE = frozenset({"a", "b"})
    SLICEABLE = "io"

    def apply(self, op, x):
        if not isinstance(op, Gather):
            return super().apply(op, x)
        y = apply(op, x, self.base)
        a, b = (self.b.mT, self.a.mT) if op.transposed else (self.a, self.b)
        return y + y * op.restore(op.mix(op.contract(x, a), b)).astype(y.dtype)

    def matrix(self):
        factor = jnp.matmul(self.a.astype(self.wide), self.b.astype(self.wide), precision="highest")
        return to_matrix(dense(self.base), self.labels).astype(self.wide) * factor


@dataclass(frozen=True)
class HiRA(Method):
    """An update of high rank: the pretrained weights themselves, each scaled by a low-rank matrix's entry. Mergeable.

    Fields:
        rank: of the matrix that scales the weights.

    Raises:
        ValueError: from the constructor: a rank below 1; from `init`: a rank above min(in, out) of a site.

    Example:
        >>> import jpeft
        >>> jpeft.HiRA(rank=16, targets=["q_proj", "v_proj"]).rank
        16
    """

    rank: int = 32

    FORMS_DENSE_UPDATE = "the update is the base's own entries, scaled one by one"
    EXPORT = Export(
        "HIRA",
        {
            "dense": {"hira_A": ("a", "ri"), "hira_B": ("b", "or")},
            "embedding": {"hira_embedding_A": ("a", "ri"), "hira_embedding_B": ("b", "or")},
            "conv": {"hira_A": ("a", "ri"), "hira_B": ("b", "orw")},
        },
        config={"r": "rank"},
        fixed={"init_weights": True},
        neutral={"init_weights": (False, "gaussian"), "hira_dropout": ()},
    )
    SMALL = {"rank": 3}

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1, got rank={self.rank}")

    def check(self, site: Site) -> str | None:
        return rank_problem(self.rank, site)

    def wrap(self, key, leaf, site: Site) -> Hadamard:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        a = kaiming_uniform(key, (*lead, n_in, self.rank), n_in, dtype)
        b = jnp.zeros((*lead, self.rank, n_out), dtype)
        if site.kind == "embedding":
            a, b = jnp.zeros_like(a), jax.random.normal(key, b.shape, dtype)
        return Hadamard(leaf, a, b, axes=site.axes.lstrip("s"))
