"""Fine-tuning in a random subspace (Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255).

    θ_i = θ_i,0 + λ_i·P_i·θ_d,        P = H·G·Π·H·B / √(D·‖G‖²)        (Fastfood, Le et al. 2013, arXiv 1408.3060)

One trainable vector θ_d moves every parameter. For each matrix or vector i (in a stacked leaf, for each layer's) D is
its size, B random signs, H the Walsh-Hadamard transform, Π a random permutation and G Gaussian; the division makes P_i
keep the norm, as in the authors' code. θ_d starts at zero and λ at one, which is the pretrained function. SAID, the
structure-aware form, trains the λ too and counts them: of d dimensions θ_d has d - m where there are m λ. DID has none.

P is never stored: it is made again from one random number each time that it is used, H in log2 passes over the vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.core.update import Update
from jpeft.core.weight import matrix_sizes, static, weight

__all__ = ["IntrinsicDimension", "Projected", "fastfood"]


@weight
class Projected(Update):
    """`base + scale · P(seed) @ theta`.

    Shapes: theta (dimension,), shared by all leaves; scale (*stack, *batch) or None; seed (*stack, *batch), 32 bits.
    """

    base: Any
    theta: Any = None
    scale: Any = None
    seed: Any = None
    axes: str = static()

    FIELDS = {"theta": "d", "scale": "", "seed": ""}
    TRAINABLE = frozenset({"theta", "scale"})
    UNSTACKED = frozenset({"theta"})

    def tied(self) -> dict[str, str]:
        return {"theta": "theta"}

    def matrix(self):
        lead, n_in, n_out = matrix_sizes(self.shape, self.labels)
        project = lambda seed: fastfood(self.theta.astype(self.wide), n_in * n_out, seed)
        rows = lax.map(project, self.seed.ravel()) if lead else project(self.seed)
        update = rows.reshape(*lead, n_in, n_out)
        return update if self.scale is None else update * self.scale[..., None, None].astype(self.wide)


def fastfood(theta: jax.Array, size: int, seed: jax.Array) -> jax.Array:
    """P·θ, (size,), where P has columns of norm one, nearly orthogonal, and follows from the seed alone.

    Π is made without a sort: rounds of shifts and odd multiplications, each of which is one-to-one modulo 2^n.
    """
    levels = (max(size, theta.size) - 1).bit_length()
    # The same numbers under any configuration of JAX's default generator: a saved adapter depends on them.
    draws_key, order_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    draws = jax.random.normal(draws_key, (theta.size + 2**levels,), theta.dtype)
    signs, gaussian = jnp.copysign(1, draws[: theta.size]), draws[theta.size :]
    mixed = _hadamard(jnp.pad(signs * theta, (0, 2**levels - theta.size)))
    permuted = mixed.at[_permutation(order_key, levels)].get(mode="promise_in_bounds", unique_indices=True)
    return _hadamard(gaussian * permuted)[:size] * lax.rsqrt(size * jnp.sum(gaussian * gaussian))


def _hadamard(x):
    """H·x, where H consists of ±1 and x has a power of two of entries.

    Each pass interleaves the sums and the differences of the two halves; after log2 of them all are in their places.
    """
    halves = lambda x, _: (jnp.stack([x[0] + x[1], x[0] - x[1]], -1).reshape(2, -1), None)
    levels = x.size.bit_length() - 1
    return lax.scan(halves, x.reshape(2, -1), None, length=levels)[0].ravel() if levels else x


def _permutation(key, levels: int):
    """All numbers below 2^levels in a random order, uint32."""
    order, mask = jnp.arange(2**levels, dtype=jnp.uint32), jnp.uint32(2**levels - 1)
    for factor, offset in jax.random.bits(key, (3, 2), jnp.uint32):
        order = (order * (factor | 1) + offset) & mask
        order = order ^ (order >> max(1, levels // 2))
    return order


@dataclass(frozen=True)
class IntrinsicDimension(Method):
    """Every parameter moves in one random subspace of a given dimension. Mergeable; starts at the pretrained function.

    `jpeft.intrinsic_dimension` searches for the least dimension that is enough.

    Fields:
        dimension: numbers that train in all.
        targets: by default every parameter that the function uses.
        structure: `"SAID"`, with a trainable λ for each matrix and vector (the authors' code; the paper says for each
            layer), or `"DID"`, without.

    Raises:
        ValueError: from the constructor: a dimension below 1, an unknown structure; from `init`: SAID with no more
            dimensions than it has λ.

    Example:
        >>> import jpeft
        >>> jpeft.IntrinsicDimension(dimension=200, structure="DID").dimension
        200
    """

    dimension: int = 1000
    structure: Literal["SAID", "DID"] = "SAID"
    targets: Targets = field(default="", kw_only=True)

    KINDS = ("dense", "experts", "embedding", "conv", "scale", "bias")
    FORMS_DENSE_UPDATE = "a random subspace has no smaller form than the whole parameter"
    ADDS_FROZEN = "one random number for each matrix and vector, from which its projection is made again"
    SMALL = {"dimension": 64, "targets": "embed|query|fused|conv|expert|torch_head|norm/scale|^scale|^bias"}

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.dimension, int) or self.dimension < 1:
            raise ValueError(f"expected a whole dimension >= 1, got dimension={self.dimension}")
        if self.structure not in ("SAID", "DID"):
            raise ValueError(f"expected structure 'SAID' or 'DID', got {self.structure!r}")

    def chosen(self, sites):
        chosen = super().chosen(sites)
        scales = self._scales(chosen)
        if self.dimension <= scales:
            raise ValueError(
                f"SAID spends one of the dimensions on each of {scales} matrices and vectors; expected dimension > "
                f"{scales}, got {self.dimension}; write a larger one, fewer targets, or structure='DID'"
            )
        return chosen

    def shared(self, key, params, chosen: dict[str, Site]):
        dtype = jnp.result_type(jnp.float32, *(site.dtype for site in chosen.values()))
        return {"theta": jnp.zeros(self.dimension - self._scales(chosen), dtype)}

    def wrap(self, key, leaf, site: Site) -> Projected:
        lead = matrix_sizes(site.shape, site.axes)[0]
        scale = jnp.ones(lead, jnp.promote_types(leaf.dtype, jnp.float32)) if self.structure == "SAID" else None
        seed = jax.random.bits(key, lead, jnp.uint32)
        return Projected(leaf, scale=scale, seed=seed, axes=site.axes.lstrip("s"))

    def _scales(self, chosen: dict[str, Site]) -> int:
        """How many λ there are."""
        if self.structure == "DID":
            return 0
        return sum(math.prod(matrix_sizes(site.shape, site.axes)[0]) for site in chosen.values())
