"""OLoRA: orthonormal low-rank adaptation (Büyükakyüz 2024, arXiv 2406.01775).

    W' = R + s·A·B,        R = W − s·A₀·B₀,        Wᵀ = Q·T,        A₀ = T_rᵀ,        B₀ = Q_rᵀ

for W (in, out), Q (out, ·) orthonormal, T (·, in) triangular, Q_r and T_r the first `rank` of Q's columns and T's rows;
shapes as PiSSA's.
There is no pivoting, so Q spans what the first `rank` inputs lead to.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jpeft.core.sites import Site
from jpeft.methods.pissa import _NonzeroStart

__all__ = ["OLoRA"]


@dataclass(frozen=True)
class OLoRA(_NonzeroStart):
    """LoRA with an orthonormal B at the start. Mergeable; the pretrained function at the start, to rounding.

    Fields: as `LoRA`'s rank, alpha, scaling, dropout, rank_pattern, alpha_pattern and dtype.

    Raises:
        ValueError: as `LoRA`; from `init`: a base that an earlier method adapts.

    Example:
        >>> import jpeft
        >>> jpeft.OLoRA(rank=16, alpha=16).rank
        16
    """

    OBSERVES = "weights"

    def factors(self, key, matrix, site: Site, given):
        rank = self.rank_of(site.path)
        q, t = jnp.linalg.qr(matrix.mT)
        return t[..., :rank, :].mT, q[..., :rank].mT
