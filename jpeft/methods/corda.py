"""CorDA: context-oriented decomposition adaptation (Yang et al. 2024, arXiv 2406.05223).

    W' = R + s·A·B,        R = W − s·A₀·B₀,        C·W = U·S·Vᵀ,        A₀ = C⁻¹·U_r·√(S_r/s),        B₀ = √(S_r/s)·V_rᵀ

for W (in, out) and the inputs' covariance C (in, in), the batches' mean of XᵀX with X (rows, in) divided by its largest
entry, as in the authors' code, and 0.01 times its mean diagonal added to the diagonal; shapes as PiSSA's. `r` are the
first components, those that the context of the calibration uses most, or the last.

No inverse is needed, as C⁻¹·U_r·S_r = W·V_r: A₀ is W·V_r / √(s·S_r), and R is W without its part along V_r. The authors
and HF PEFT invert C, and add more to its diagonal where that fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.sites import Site
from jpeft.methods.pissa import _NonzeroStart

__all__ = ["CorDA"]

_dot = partial(jnp.matmul, precision="highest")


@dataclass(frozen=True)
class CorDA(_NonzeroStart):
    """LoRA on the part of each weight that a context uses most, or least. Mergeable; the pretrained function at the
    start, to rounding.

    Fields:
        mode: `"ipm"`, the instruction-previewed mode: calibrate on the new task, whose components train; or `"kpm"`,
            knowledge-preserved: calibrate on what must not be forgotten, whose components stay.
        rank, alpha, scaling, dropout, rank_pattern, alpha_pattern, dtype: as `LoRA`.

    Raises:
        ValueError: as `LoRA`; an unknown mode; from `calibrate`: inputs that are zero or not finite; from `init`: no
            calibration, or a base that an earlier method adapts.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> params, x = {"kernel": jnp.ones((8, 6))}, jax.random.normal(jax.random.key(0), (16, 8))
        >>> sites = jpeft.find_sites(apply, params, x)
        >>> method = jpeft.CorDA(rank=2)
        >>> calibration = jpeft.calibrate(apply, params, sites, [x], method=method)
        >>> trainable, frozen = method.init(jax.random.key(0), params, sites, calibration)
    """

    mode: Literal["ipm", "kpm"] = "ipm"

    KINDS = ("dense",)
    CALIBRATION = "the inputs of the matrices"
    OBSERVES = "inputs"
    SMALL = {"rank": 2, "alpha": 2}  # a scale of one, the paper's

    def __post_init__(self):
        super().__post_init__()
        self._one_of("mode", "ipm", "kpm")

    def observe(self, state, seen, site: Site):
        """The sum of the batches' covariances, and their number."""
        total, batches = state or (0.0, 0)
        return total + _covariance(seen), batches + 1

    def conclude(self, states, chosen):
        for path, (total, _) in states.items():
            traces = np.trace(np.asarray(total), axis1=-2, axis2=-1)
            if not np.all(np.isfinite(traces) & (traces > 0)):
                raise ValueError(
                    f"{path}: expected inputs that are finite and not all zero; leave it out of the targets"
                )
        return {path: total / batches for path, (total, batches) in states.items()}

    def factors(self, key, matrix, site: Site, given):
        rank = self.rank_of(site.path)
        covariance = given.astype(matrix.dtype)
        damp = 0.01 * jnp.mean(jnp.diagonal(covariance, axis1=-2, axis2=-1), -1)[..., None, None]
        in_context = _dot(covariance, matrix) + damp * matrix
        _, s, vt = jnp.linalg.svd(in_context, full_matrices=False)
        part = slice(None, rank) if self.mode == "ipm" else slice(-rank, None)
        root = jnp.sqrt(s[..., part] / self.scale_of(site.path))
        present = s[..., part] > jnp.finfo(s.dtype).eps * s[..., :1]  # a weight of lower rank has nothing there
        share = jnp.where(present, root / jnp.where(present, s[..., part], 1), 0)
        return _dot(matrix, vt[..., part, :].mT) * share[..., None, :], root[..., None] * vt[..., part, :]


@jax.jit
def _covariance(x):
    x = x / jnp.abs(jnp.max(x, axis=(-2, -1), keepdims=True))
    return _dot(x.mT, x)
