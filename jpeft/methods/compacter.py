"""Compacter: adapters of hypercomplex layers with shared slow weights (Karimi Mahabadi et al. 2021, arXiv 2106.04647).

    y' = y + up(act(down(y)))        down, up: x ↦ x·W + b,        W = Σᵢ Aᵢ ⊗ (sᵢ·tᵢ)

with n = phm_dim matrices Aᵢ (n, n), the slow weights, one set of them for the whole model, and each layer's own
s (*stack, *batch, n, in/n, rank) and t (*stack, *batch, n, rank, out/n), of rank 1 in the paper. The Kronecker products
are never formed: x in n rows of in/n goes through s, then A, then t.

Compacter puts one after attention and one after feed-forward, as Houlsby adapters; Compacter++ has the second alone
(`targets="down"`). A starts from N(0, 1e-4²), s and t Glorot-uniform, as in the authors' code, so that the start is
the pretrained function but for some 1e-8 of what a layer puts out. (`adapters` 1.3 draws s and t Glorot-normal,
whatever its `hypercomplex_nonlinearity` says.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.core.tree import key_for_path
from jpeft.core.weight import matrix_sizes, static, weight
from jpeft.methods._bottleneck import TwoLayers, _AdapterMethod

__all__ = ["Compacter", "Hypercomplex"]


@weight
class Hypercomplex(TwoLayers):
    """An adapter of two layers whose kernels are sums of n Kronecker products.

    Shapes: shared slow (n, n, n); down_s (*stack, *batch, n, d/n, rank), down_t (*stack, *batch, n, rank, m/n), up_s
    (*stack, *batch, n, m/n, rank), up_t (*stack, *batch, n, rank, d/n), biases and norms as in a `Bottleneck`.
    """

    base: Any
    down_s: Any
    down_t: Any
    down_bias: Any
    up_s: Any
    up_t: Any
    up_bias: Any
    before: Any = None
    after: Any = None
    slow: Any = None
    axes: str = static()
    activation: str = static()
    scale: float = static(default=1.0)

    FIELDS = {"down_s": "nhr", "down_t": "nrm", "down_bias": "m", "up_s": "nmr", "up_t": "nro", "up_bias": "o"}
    FIELDS |= {"before": "nh", "after": "no", "slow": "npq"}
    TRAINABLE = frozenset(FIELDS)
    UNSTACKED = frozenset({"slow"})
    UP = frozenset({"up_s", "up_t"})

    def tied(self):
        return {"slow": "slow"}

    def down_from(self, op, h):
        return kronecker(op, h, self.slow, self.down_s, self.down_t, self.down_bias)

    def up_from(self, op, h):
        return kronecker(op, h, self.slow, self.up_s, self.up_t, self.up_bias)


def kronecker(op, x, a, s, t, bias):
    """x·Σᵢ aᵢ ⊗ (sᵢ·tᵢ) + bias for x (*batch, *free, in); the product of s and t is not formed either."""
    n = a.shape[0]
    side_by_side = lambda m: jnp.moveaxis(m, -3, -2).reshape(*m.shape[:-3], m.shape[-2], -1)  # (in/n, n·rank)
    same = lambda m: jnp.broadcast_to(m[..., None, :, :], (*m.shape[:-2], n, *m.shape[-2:]))  # for each of x's rows
    h = op.mix_blocks(x.reshape(*x.shape[:-1], n, -1), same(side_by_side(s)))
    h = jnp.einsum("...pir,ipq->...qir", h.reshape(*h.shape[:-1], n, -1), a.astype(h.dtype))
    below = t.reshape(*t.shape[:-3], -1, t.shape[-1])  # (n·rank, out/n)
    y = op.mix_blocks(h.reshape(*h.shape[:-2], -1), same(below))
    return y.reshape(*y.shape[:-2], -1) + op.spread(bias).astype(y.dtype)


@dataclass(frozen=True)
class Compacter(_AdapterMethod):
    """Two adapters of Kronecker products in every layer. Cannot merge: a nonlinearity stands between the projections.

    Trainable parameters: 2·rank·(d + m) + m + d for each adapter, and n³ once. The paper trains the norms as well,
    `chain(NormTuning(), Compacter())`, and puts no adapter after cross-attention: for T5
    `targets=("SelfAttention/o/", "down")`.

    Fields:
        targets: layers, by their kernels; by default attention outputs and feed-forward down projections by name.
        bottleneck, reduction, activation, ln_before, ln_after: as in `Houlsby`.
        phm_dim: the number n of products, which divides d and m.
        phm_rank: the rank of sᵢ·tᵢ.
        phm_init_range: standard deviation of the slow weights at the start.

    Raises:
        ValueError: as `Houlsby`; from the constructor: a phm_dim or phm_rank below 1, a phm_init_range not above zero;
            from `init`: a phm_dim that does not divide d and m, a phm_rank above m/n or d/n.

    Example:
        >>> import jpeft
        >>> jpeft.Compacter(reduction=16, phm_dim=4).phm_rank
        1
    """

    targets: Targets = field(default=("attention-output", "down"), kw_only=True)
    reduction: int = 32
    activation: str = "gelu"
    phm_dim: int = 4
    phm_rank: int = 1
    phm_init_range: float = 1e-4

    SMALL = {"targets": "(out|down)/kernel|^(out|back|expert)$", "bottleneck": 8}

    def __post_init__(self):
        super().__post_init__()
        self._at_least_one("phm_dim", "phm_rank")
        if self.phm_init_range <= 0:
            raise ValueError(f"expected phm_init_range > 0, got phm_init_range={self.phm_init_range}")

    @property
    def NO_OP_AT_START(self) -> bool:  # type: ignore[override]  # noqa: N802
        return self.phm_init_range <= 1e-4  # the update goes with its square

    def check(self, site: Site) -> str | None:
        if problem := super().check(site):
            return problem
        width, m = matrix_sizes(site.shape, site.axes)[2], self.width_of(site)
        if width % self.phm_dim or m % self.phm_dim:
            return f"phm_dim={self.phm_dim} does not divide both its {width} outputs and the bottleneck of {m}"
        if self.phm_rank > min(width, m) // self.phm_dim:
            return (
                f"phm_rank={self.phm_rank} is above {min(width, m) // self.phm_dim}, the least of {width}/n and {m}/n"
            )
        return None

    def shared(self, key, params, chosen):
        dtype = jnp.result_type(jnp.float32, *(site.dtype for site in chosen.values()))
        shape = (self.phm_dim,) * 3
        return {"slow": self.phm_init_range * jax.random.normal(key_for_path(key, "slow"), shape, dtype)}

    def wrap(self, key, leaf, site: Site) -> Hypercomplex:
        lead, _, width = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        n, rank, m = self.phm_dim, self.phm_rank, self.width_of(site)
        down_s, down_t, up_s, up_t = jax.random.split(key, 4)
        glorot = lambda key, *shape: glorot_uniform(key, (*lead, n, *shape), dtype)
        return Hypercomplex(
            leaf,
            down_s=glorot(down_s, width // n, rank),
            down_t=glorot(down_t, rank, m // n),
            down_bias=jnp.zeros((*lead, m), dtype),
            up_s=glorot(up_s, m // n, rank),
            up_t=glorot(up_t, rank, width // n),
            up_bias=jnp.zeros((*lead, width), dtype),
            **self.norms(lead, width, width, dtype),
            axes=site.axes.lstrip("s"),
            activation=self.activation,
        )


def glorot_uniform(key, shape, dtype):
    """Each matrix (*lead, in, out) from U(±√(6 / (in + out)))."""
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)
