"""GraLoRA: granular low-rank adaptation (Jung et al. 2025, arXiv 2505.20355).

W is cut into k × k blocks, each with an update of rank `rank / k` of its own. With A_n (in / k, rank) for the n-th part
of the inputs and B_m (rank, out / k) for the m-th part of the outputs, the block (n, m) is

    ΔW_nm = s · A_n[:, m-th of k parts] · B_m[n-th of k parts, :],        s = alpha / (rank + hybrid_rank)

The parameters are as many as LoRA's, the update's rank up to k times as large. `hybrid_rank` adds a plain low-rank
update across blocks, with the same scale. Every A starts Kaiming-uniform, every B at zero.

Shapes: a (*stack, *batch, k, in / k, rank), b (*stack, *batch, k, rank, out / k), general_a (*stack, *batch, in,
hybrid_rank), general_b (*stack, *batch, hybrid_rank, out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.weight import matrix_sizes, static, weight
from jpeft.methods._factors import kaiming_uniform

__all__ = ["GraLoRA", "Granular"]


@weight
class Granular(Factored):
    """`base + scale · (blocks of a · b, + general_a · general_b)`, as one product of rank k · rank + hybrid_rank.

    Its factors are block matrices, zero but for one block in k: one large product instead of k small ones with
    permutations between, and every operation knows it. Shapes: see the file's head; key (*stack, *batch) or None.
    """

    base: Any
    a: Any
    b: Any
    general_a: Any = None
    general_b: Any = None
    key: Any = None
    axes: str = static()
    scale: float = static(1.0)
    dropout: float = static(0.0)

    FIELDS = {"a": "kmr", "b": "krn", "general_a": "ih", "general_b": "ho", "key": ""}
    TRAINABLE = frozenset({"a", "b", "general_a", "general_b"})
    UP = frozenset({"b", "general_b"})

    def factors(self):
        *lead, k, _, rank = self.a.shape
        eye = jnp.eye(k, dtype=self.a.dtype)
        a = jnp.einsum("...nir,nm->...nimr", self.a, eye).reshape(*lead, -1, k * rank)
        parts = self.b.reshape(*lead, k, k, rank // k, -1)
        b = jnp.einsum("...mnro,ml->...nmrlo", parts, eye).reshape(*lead, k * rank, -1)
        if self.general_a is not None:
            a = jnp.concatenate([a, self.general_a], -1)
            b = jnp.concatenate([b, self.general_b], -2)
        return a, b


@dataclass(frozen=True)
class GraLoRA(Method):
    """Low-rank updates block by block. Mergeable; exactly the pretrained function at the start.

    Fields:
        rank: as many parameters as a LoRA of this rank; each block has an update of rank `rank / gralora_k`.
        gralora_k: blocks along each side; must divide the rank and the inputs and outputs of every site.
        hybrid_rank: rank of a plain low-rank update beside the blocks.
        alpha: numerator of the scale.
        dropout: rate on the input of A, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: a rank or gralora_k below 1, a negative hybrid_rank, a rank that gralora_k
            does not divide, dropout outside [0, 1); from `init`: a site whose inputs or outputs gralora_k does not
            divide, or with fewer than a rank.

    Example:
        >>> import jpeft
        >>> jpeft.GraLoRA(rank=64, gralora_k=4).gralora_k
        4
    """

    rank: int = 32
    gralora_k: int = 2
    hybrid_rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0

    EXPORT = Export(
        "GRALORA",
        tensors={
            "dense": {
                "gralora_A": ("a", "kmr"),
                "gralora_B": ("b", "krn"),
                "gralora_A_general.weight": ("general_a", "hi"),
                "gralora_B_general.weight": ("general_b", "oh"),
            }
        },
        config={
            "r": "rank",
            "gralora_k": "gralora_k",
            "hybrid_r": "hybrid_rank",
            "alpha": "alpha",
            "gralora_dropout": "dropout",
        },
        fixed={"init_weights": True, "bias": "none"},
        neutral={"init_weights": (False,)},
    )
    SMALL = {
        "rank": 4,
        "alpha": 4.0,
        "hybrid_rank": 2,
        "targets": "attention|up/|down/|fused|^out|gate|expert|conv",
    }

    def __post_init__(self):
        super().__post_init__()
        k, rank, hybrid = self.gralora_k, self.rank, self.hybrid_rank
        if k < 1 or rank < 1 or hybrid < 0:
            raise ValueError(
                f"expected rank >= 1, gralora_k >= 1 and hybrid_rank >= 0, got {rank=}, gralora_k={k}, "
                f"hybrid_rank={hybrid}"
            )
        if rank % k:
            raise ValueError(f"expected a rank that gralora_k divides, got {rank=}, gralora_k={k}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        k = self.gralora_k
        if n_in % k or n_out % k:
            return f"gralora_k {k} does not divide its {n_in} inputs and {n_out} outputs; leave the site out"
        if self.rank > min(n_in, n_out) or self.hybrid_rank > min(n_in, n_out):
            asked = f"rank {self.rank}, hybrid_rank {self.hybrid_rank}"
            return f"{asked}: above min(in, out) = min({n_in}, {n_out}); write smaller ones"
        return None

    def wrap(self, key, leaf, site: Site) -> Granular:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        k, rank, hybrid = self.gralora_k, self.rank, self.hybrid_rank
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        block_key, general_key = jax.random.split(key)
        a = kaiming_uniform(block_key, (*lead, k, n_in // k, rank), n_in // k, dtype)
        b = jnp.zeros((*lead, k, rank, n_out // k), dtype)
        general_a = kaiming_uniform(general_key, (*lead, n_in, hybrid), n_in, dtype) if hybrid else None
        general_b = jnp.zeros((*lead, hybrid, n_out), dtype) if hybrid else None
        axes, scale = site.axes.lstrip("s"), self.alpha / (rank + hybrid)
        return Granular(leaf, a, b, general_a, general_b, axes=axes, scale=scale, dropout=self.dropout)
