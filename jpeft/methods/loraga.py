"""LoRA-GA: low-rank adaptation with gradient approximation (Wang et al. 2024, arXiv 2407.05000).

    W' = R + s·A·B,        R = W − s·A₀·B₀,        ∂loss/∂W = U·S·Vᵀ,        A₀ = c·U_I,        B₀ = c·V_Jᵀ

with I and J two halves of the 2·rank leading directions, so that the first step on A and B moves W as the gradient
does; shapes as PiSSA's. `c = out^¼ / √γ` (the paper's stable scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.sites import Site
from jpeft.core.weight import matrix_sizes, to_matrix
from jpeft.methods.pissa import _NonzeroStart, randomized_svd

__all__ = ["LoRAGA"]


@dataclass(frozen=True)
class LoRAGA(_NonzeroStart):
    """LoRA along the directions of the first gradients. Mergeable; the pretrained function at the start, to rounding.

    Fields:
        direction: which of the 2·rank directions A and B get: `"ArB2r"` (A the first half, B the second), `"A2rBr"`
            (the other way round), `"ArBr"` (B the 1st, 3rd, ..., A the 2nd, 4th, ...) or `"random"` halves.
        scale: of A and B: `"stable"` (out^¼ / √gamma), `"gd_scale"` (1/s), `"weight_svd"` (the mean of √(σ/s) over
            the weight's `rank` largest singular values) or `"unit"`.
        gamma: γ of the stable scale.
        weighted: HF PEFT's way: B also has the gradient's singular values, and alone the stable scale; `"weight_svd"`
            is the ratio of the weight's largest singular value to B's first; `"random"` gives A and B the same
            directions.
        rank, alpha, scaling, dropout, rank_pattern, alpha_pattern, dtype: as `LoRA`.

    Raises:
        ValueError: as `LoRA`; an unknown direction or scale; gamma not above zero; from `calibrate`: a gradient that is
            not finite; from `init`: a rank above min(in, out) / 2, no calibration, or a base that an earlier method
            adapts.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> params, x = {"kernel": jnp.ones((8, 6))}, jax.random.normal(jax.random.key(0), (16, 8))
        >>> sites = jpeft.find_sites(apply, params, x)
        >>> method = jpeft.LoRAGA(rank=2)
        >>> loss = lambda params, x: jnp.mean(apply(params, x) ** 2)
        >>> calibration = jpeft.calibrate(apply, params, sites, [x], method=method, loss=loss)
        >>> trainable, frozen = method.init(jax.random.key(0), params, sites, calibration)
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "gd_scale", "weight_svd", "unit"] = "stable"
    gamma: float = 16.0
    weighted: bool = False

    CALIBRATION = "the gradient of a loss"
    OBSERVES = "gradients"
    SMALL = {"rank": 4}

    def __post_init__(self):
        super().__post_init__()
        self._one_of("direction", "ArB2r", "A2rBr", "ArBr", "random")
        self._one_of("scale", "stable", "gd_scale", "weight_svd", "unit")
        if not self.gamma > 0:
            raise ValueError(f"expected gamma > 0, got gamma={self.gamma}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        rank = self.rank_of(site.path)
        if 2 * rank > min(n_in, n_out):
            return (
                f"rank {rank} takes {2 * rank} directions of a gradient that has min(in, out) = min({n_in}, {n_out}); "
                f"write rank_pattern={{{site.path!r}: ...}}"
            )
        return super().check(site)

    def observe(self, state, seen, site: Site):
        """The sum of the batches' gradients, and their number."""
        total, batches = state or (0.0, 0)
        return total + seen.astype(jnp.promote_types(seen.dtype, jnp.float32)), batches + 1

    def conclude(self, states, chosen):
        wrong = [path for path, (total, _) in states.items() if not np.isfinite(np.asarray(total)).all()]
        if wrong:
            raise ValueError(f"expected finite gradients, got others at {', '.join(wrong[:5])}; look at the loss")
        return {path: total / batches for path, (total, batches) in states.items()}

    def factors(self, key, matrix, site: Site, given):
        rank = self.rank_of(site.path)
        gradient = to_matrix(given, site.axes).astype(matrix.dtype)
        svd_key, half_key = jax.random.split(key)
        u, s, vt = randomized_svd(svd_key, gradient, 2 * rank, iterations=4)
        for_a, for_b = self._halves(half_key, rank, gradient.shape[:-2])
        a = jnp.take_along_axis(u, for_a[..., None, :], -1)
        b = jnp.take_along_axis(vt, for_b[..., None], -2)
        s = jnp.take_along_axis(s, for_b, -1)
        a_factor, b_factor = self._factors(svd_key, matrix, s, rank, self.scale_of(site.path))
        return a * a_factor, b * b_factor * (s[..., None] if self.weighted else 1)

    def _halves(self, key, rank: int, lead: tuple[int, ...]):
        """The directions of A and of B, (*lead, rank) each, from 0 to 2·rank − 1."""
        every = jnp.arange(2 * rank)
        if self.direction == "random":
            order = jax.random.permutation(key, jnp.broadcast_to(every, (*lead, 2 * rank)), axis=-1, independent=True)
            return order[..., :rank], order[..., :rank] if self.weighted else order[..., rank:]
        first, second = (every[::2], every[1::2]) if self.direction == "ArBr" else (every[:rank], every[rank:])
        halves = (first, second) if self.direction == "ArB2r" else (second, first)
        return tuple(jnp.broadcast_to(half, (*lead, rank)) for half in halves)

    def _factors(self, key, matrix, s, rank: int, scale: float):
        """The scales of A and of B; `s` are the singular values of B's directions, (*lead, rank)."""
        if self.scale == "unit":
            return 1.0, 1.0
        if self.scale == "gd_scale":
            return 1 / scale, 1 / scale
        if self.scale == "stable":
            c = matrix.shape[-1] ** 0.25 / self.gamma**0.5
        else:
            _, sigma, _ = randomized_svd(key, matrix, rank, iterations=4)
            if self.weighted:
                c = jnp.where(s[..., 0] > 0, sigma[..., 0] / s[..., 0], 1.0)[..., None, None]
            else:
                c = jnp.mean(jnp.sqrt(sigma / scale), -1)[..., None, None]
        return (1.0, c) if self.weighted else (c, c)
