"""LoftQ: LoRA-fine-tuning-aware quantization (Li et al. 2023, arXiv 2310.08659).

    Q_t = q(W − s·A_{t−1}·B_{t−1}),        U·S·Vᵀ = W − Q_t,        A_t = U_r·√(S_r/s),        B_t = √(S_r/s)·V_rᵀ

for t = 1 … iterations from A₀·B₀ = 0; then W' = Q_T + s·A·B with A (*stack, *batch, in, rank) and B (*stack, *batch,
rank, out) trainable: it starts near the pretrained function, where LoRA on compressed weights starts at the compressed.
Where an earlier method of the chain compressed the leaf, q is its own: `chain(NF4(), LoftQ())`. A dense leaf is rounded
to `num_bits` and stays dense, which shows what compressing would do (HF PEFT's `loftq_init`).

The paper has s = 1; HF PEFT does not divide by s, and starts at Q + s·A·B with A·B what Q lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Saved
from jpeft.core.sites import Site
from jpeft.core.weight import Weight, dense, from_matrix, to_matrix
from jpeft.methods.lora import LowRank, _LowRankMethod

__all__ = ["LoftQ", "normal_float", "rounded"]


@dataclass(frozen=True)
class LoftQ(_LowRankMethod):
    """LoRA that starts at what compressing lost. Mergeable; nearer to the pretrained function with a higher rank.

    It needs the weights as they were before they were compressed: a chain shows it its own params; for a model that
    came compressed give `calibration={path: array}`. Its adapters belong to the base that it makes, and to no other.

    Fields:
        rank, alpha, scaling, dropout, rank_pattern, alpha_pattern, dtype: as `LoRA`; alpha is positive.
        iterations: of rounding and decomposing. With one, the base is what QLoRA has; the paper takes five.
        num_bits: of the NormalFloat that leaves are rounded to that no method of the chain compressed.
        block_size: inputs that share a scale in that rounding.

    Raises:
        ValueError: as `LoRA`; from the constructor: no iterations, bits outside 2 ... 8, a block size below 2, alpha
            not positive; from `init`: weights that are known only compressed, a base that an earlier method adapts.

    Example:
        >>> import jpeft
        >>> jpeft.chain(jpeft.NF4(), jpeft.LoftQ(rank=16, alpha=16, iterations=5)).methods[1].scale_of("any/path")
        1.0
    """

    iterations: int = 1
    num_bits: int = 4
    block_size: int = 64

    NO_OP_AT_START = False  # compressing loses more than an update of low rank can give back
    CALIBRATION = "the weights as they were before they were compressed"
    OBSERVES = "weights"
    SMALL = {"rank": 4, "block_size": 8, "num_bits": 3, "iterations": 2}

    def __post_init__(self):
        super().__post_init__()
        for name, low, high in (("iterations", 1, None), ("num_bits", 2, 8), ("block_size", 2, None)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low or (high is not None and value > high):
                raise ValueError(f"expected a whole {name} >= {low}{f' and <= {high}' if high else ''}, got {value!r}")
        for alpha in (self.alpha, *(value for _, value in self.alpha_pattern)):
            if not alpha > 0:
                raise ValueError(f"expected alpha > 0, as the start is divided by it, got {alpha=}")

    def wrap_calibrated(self, key, leaf, site: Site, given) -> LowRank:
        given = given.weights if isinstance(given, Saved) else given
        if isinstance(given, Weight):
            raise ValueError(
                f"{site.path} came compressed; expected the weights as they were: "
                f"init(..., calibration={{{site.path!r}: array, ...}}), in a chain as this method's entry"
            )
        matrix = to_matrix(given, site.axes)
        matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        scale, rank = self.scale_of(site.path), self.rank_of(site.path)
        update = jnp.zeros_like(matrix)
        for _ in range(self.iterations):
            base = self._compressed(leaf, matrix - update, site)
            u, s, vt = jnp.linalg.svd(matrix - to_matrix(dense(base), site.axes), full_matrices=False)
            root = jnp.sqrt(s[..., :rank] / scale)
            a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
            update = scale * jnp.matmul(a, b, precision="highest")
        a, b = (factor.astype(self._dtype(leaf)) for factor in (a, b))
        return LowRank(base, a, b, axes=site.axes.lstrip("s"), scale=scale, dropout=self.dropout)

    def _compressed(self, leaf, matrix, site: Site):
        if isinstance(leaf, Weight):
            return leaf.standing_for(from_matrix(matrix, site.axes, leaf.shape))
        matrix = rounded(matrix, self.num_bits, self.block_size)
        return from_matrix(matrix, site.axes, leaf.shape).astype(leaf.dtype)


def normal_float(bits: int) -> np.ndarray:
    """The 2^bits entries of NormalFloat, ascending: quantiles of N(0, 1), one more above zero than below, and zero.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314), with the outermost quantile that bitsandbytes chose.
    """
    half, outermost = 2 ** (bits - 1), 0.9677083
    side = lambda n: [NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, n)[:-1]]
    values = np.sort([*side(half + 1), 0.0, *(-v for v in side(half))])
    return (values / values.max()).astype(np.float32)


def rounded(matrix: jax.Array, bits: int, block_size: int) -> jax.Array:
    """A matrix (*lead, in, out), each block of inputs rounded to NormalFloat times the block's largest magnitude."""
    *lead, n_in, n_out = matrix.shape
    blocks = -(-n_in // block_size)
    filled = jnp.pad(matrix, [*[(0, 0)] * len(lead), (0, blocks * block_size - n_in), (0, 0)])
    filled = filled.reshape(*lead, blocks, block_size, n_out)
    scales = jnp.abs(filled).max(-2, keepdims=True)
    table = normal_float(bits)
    bounds = jnp.asarray((table[:-1] + table[1:]) / 2)
    scaled = filled / jnp.where(scales > 0, scales, jnp.ones_like(scales))
    values = jnp.asarray(table, matrix.dtype)[jnp.searchsorted(bounds, scaled.astype(bounds.dtype))] * scales
    return values.reshape(*lead, blocks * block_size, n_out)[..., :n_in, :]
