"""EVA: explained variance adaptation (Paischer et al. 2024, arXiv 2410.07170).

    W' = W + s·A·B,        A₀ = the leading principal components of the matrix's inputs, in columns,        B₀ = 0

with A (*stack, in, rank) and B (*stack, rank, out). Where a component explains more of the variance than another
matrix's does, its matrix gets the rank: all components of all matrices are sorted by their part of their own inputs'
variance, and as many are kept as `rank` everywhere would come to. The factor s stays what it is for `rank`.

The components are those of the inputs about their mean, gathered batch by batch (incremental PCA, Ross et al. 2008).
HF PEFT goes on through the data until they turn by less than its `tau`; here the batches given are all run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Saved
from jpeft.core.sites import Site
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import matrix_sizes
from jpeft.methods.lora import LowRank, _LowRankMethod, _only
from jpeft.methods.pissa import randomized_svd

__all__ = ["EVA"]


@dataclass(frozen=True)
class EVA(_LowRankMethod):
    """LoRA whose A starts at the principal components of the inputs. Mergeable; exactly the pretrained function at the
    start.

    In a stack of layers every layer gets as many columns as the one with most; those beyond its own rank are zero, in A
    and in B, so that no gradient moves them. A matrix may get rank 0: then it stays as it is.

    Fields:
        rho: how much of a rank may go elsewhere: a matrix gets at most rho·rank (and min(in, out)); 1.0 for none.
        whiten: divide each component by the root of its singular value.
        rank: of each matrix, before it is given to others.
        alpha, scaling, dropout, rank_pattern, alpha_pattern, dtype: as `LoRA`.

    Raises:
        ValueError: as `LoRA`; rho below 1; from `calibrate`: fewer rows than components, or inputs that are all the
            same or not finite; from `init`: no calibration.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> params, x = {"kernel": jnp.ones((8, 6))}, jax.random.normal(jax.random.key(0), (16, 8))
        >>> sites = jpeft.find_sites(apply, params, x)
        >>> method = jpeft.EVA(rank=2)
        >>> calibration = jpeft.calibrate(apply, params, sites, [x], method=method)
        >>> method.init(jax.random.key(0), params, sites, calibration)[0]["kernel"].a.shape
        (8, 2)
    """

    rho: float = 2.0
    whiten: bool = False

    KINDS = ("dense",)
    CALIBRATION = "the inputs of the matrices"
    OBSERVES = "inputs"
    SMALL = {"rank": 2, "alpha": 2.0, "rho": 1.0}  # ranks that move depend on all targets, as they are meant to

    def __post_init__(self):
        super().__post_init__()
        if not self.rho >= 1:
            raise ValueError(f"expected rho >= 1, got rho={self.rho}")

    def observe(self, state, seen, site: Site):
        """`(rows, their mean, their squared deviations' sum, S·Vᵀ of the leading components)` so far."""
        return _with_batch(state, seen, self._most(site))

    def conclude(self, states, chosen):
        found = {path: self._components(path, states[path], site) for path, site in chosen.items()}
        ratios = {path: ratio for path, (_, ratio) in found.items()}
        budget = sum(self.rank_of(path) * math.prod(ratio.shape[:-1]) for path, ratio in ratios.items())
        every = np.concatenate([ratio.ravel() for ratio in ratios.values()])
        kept = np.zeros(every.size, bool)
        kept[np.argsort(-every, kind="stable")[:budget]] = True
        starts, at = {}, 0
        for path, (columns, ratio) in found.items():
            mine = kept[at : at + ratio.size].reshape(ratio.shape)
            at += ratio.size
            most = int(mine.sum(-1).max())
            starts[path] = jnp.asarray(np.where(mine[..., None, :], columns, 0)[..., :most])
        return starts

    def wrap_calibrated(self, key, leaf, site: Site, given) -> LowRank:
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        a = (given["a"] if isinstance(given, Saved) else given).astype(self._dtype(leaf))
        b = jnp.zeros((*lead, a.shape[-1], n_out), a.dtype)
        return LowRank(leaf, a, b, axes=site.axes.lstrip("s"), scale=self.scale_of(site.path), dropout=self.dropout)

    def exported(self, trainable, frozen):
        """A `LoRA` with the ranks as they are now; matrices of rank 0 are none of its targets."""
        ranks = {path: w.a.shape[-1] for path, w in leaves_with_paths(trainable) if isinstance(w, LowRank)}
        ranks = {path: rank for path, rank in ranks.items() if rank}
        root = 1.0 if self.scaling == "standard" else 0.5
        plain = self._as_lora(
            ranks,
            rank_pattern=tuple((_only(path), rank) for path, rank in ranks.items()),
            alpha_pattern=tuple((_only(path), self.scale_of(path) * rank**root) for path, rank in ranks.items()),
        )
        rescaled = lambda path, w: w.replace(scale=plain.scale_of(path)) if path in ranks else None
        return plain, map_with_paths(lambda path, w: rescaled(path, w) if isinstance(w, LowRank) else w, trainable)

    def _most(self, site: Site) -> int:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        return min(round(self.rho * self.rank_of(site.path)), n_in, n_out)

    def _components(self, path: str, state, site: Site):
        """The components in columns (*stack, in, n), and what part of the variance each explains (*stack, n)."""
        rows, _, deviation, parts = state
        if rows < self._most(site):
            raise ValueError(
                f"{path}: expected at least {self._most(site)} rows to find as many components, got {int(rows)}; "
                "give calibrate more or larger batches"
            )
        deviation, parts = np.asarray(deviation), np.asarray(parts)
        if not np.all(np.isfinite(deviation) & (deviation > 0)):
            raise ValueError(f"{path}: expected inputs that are finite and differ; leave it out of the targets")
        s = np.linalg.norm(parts, axis=-1, keepdims=True)
        columns = parts / np.maximum(s, np.finfo(s.dtype).tiny)
        if self.whiten:
            columns = columns / np.sqrt(np.maximum(s, np.finfo(s.dtype).tiny))
        return np.swapaxes(columns, -1, -2), s[..., 0] ** 2 / deviation[..., None]


@partial(jax.jit, static_argnums=2)
def _with_batch(state, x, size: int):
    """The state of `observe` after the rows x (*stack, rows, in)."""
    rows, mean = jnp.float32(x.shape[-2]), jnp.mean(x, -2)
    x = x - mean[..., None, :]
    deviation = jnp.sum(x * x, (-2, -1))
    if state is not None:
        before, old_mean, old_deviation, parts = state
        shift = jnp.sqrt(before * rows / (before + rows)) * (old_mean - mean)
        x = jnp.concatenate([parts, x, shift[..., None, :]], -2)
        deviation = old_deviation + deviation + jnp.sum(shift * shift, -1)
        rows, mean = before + rows, (before * old_mean + rows * mean) / (before + rows)
    _, s, vt = randomized_svd(jax.random.key(0), x, size, iterations=4)
    parts = s[..., None] * vt
    missing = [(0, 0)] * (parts.ndim - 2) + [(0, size - parts.shape[-2]), (0, 0)]
    return rows, mean, deviation, jnp.pad(parts, missing)
