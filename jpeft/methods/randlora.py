"""RandLoRA: full-rank updates from random bases (Albert et al. 2025, arXiv 2502.00987).

    ΔW = s · Σ_j B_j Λ_j A Γ_j,        j = 1 … n,   n = ⌈min(in, out) / rank⌉,   s = alpha / rank

with frozen random A (rank, min) and B_j (max, rank) and trained diagonals Λ_j (rank) and Γ_j (min): lambda_ (*stack,
*batch, n, rank) and gamma (*stack, *batch, n, min). As n·rank >= min(in, out), ΔW can have full rank. `min` and `max`
are the smaller and the larger of a matrix's two sizes; that is ΔW as torch has it, (out, in), or its transpose where
the inputs are the more.

One A and one B for the whole model, made for a matrix with the most inputs and the most outputs of any site; each uses
their first part. In the shared B (max, n, rank) the columns of a site are counted through (n, rank), and column i·n + j
is B_j's column i. The columns are random numbers, so any order is the paper's equation; this one, and these sizes, are
HF PEFT's, whose adapters mean the same here.

The entries have unit variance: uniform, or ±√t with probability 1 / 2t each and else 0, with t = 3 (`"sparse"`) or
√min (`"very_sparse"`). lambda_ starts at zero and gamma at 1 / max(n, min), as in HF PEFT (the authors' first code
starts the other one at zero; the paper does not say).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.tree import key_for_path
from jpeft.core.weight import matrix_sizes, static, weight

__all__ = ["RandLoRA"]


@weight
class RandomBases(Factored):
    """`base + scale · Σ_j B_j Λ_j A Γ_j`, as a product of two factors with n · rank columns and rows.

    Shapes: lambda_ (*stack, *batch, n, rank), gamma (*stack, *batch, n, min); shared a (rank, largest min), and b
    (largest max, largest n, rank).
    """

    base: Any
    lambda_: Any
    gamma: Any
    a: Any = None
    b: Any = None
    key: Any = None
    axes: str = static()
    scale: float = static(1.0)
    dropout: float = static(0.0)

    FIELDS = {"lambda_": "nr", "gamma": "nm", "a": "rm", "b": "knr", "key": ""}
    TRAINABLE = frozenset({"lambda_", "gamma"})
    UNSTACKED = frozenset({"a", "b"})
    SAVED = frozenset({"a", "b"})

    def tied(self):
        return {"a": "a", "b": "b"}

    def factors(self):
        lead, n_in, n_out = matrix_sizes(self.shape, self.labels)
        n, small = self.gamma.shape[-2:]
        scaled = jnp.einsum("...nr,rm,...nm->...rnm", self.lambda_, self.a[:, :small], self.gamma)
        scaled = scaled.reshape(*lead, -1, small)
        bases = self.b[: max(n_in, n_out), :n].reshape(max(n_in, n_out), -1)
        bases = jnp.broadcast_to(bases, (*lead, *bases.shape))
        return (scaled.mT, bases.mT) if n_in <= n_out else (bases, scaled)


@dataclass(frozen=True)
class RandLoRA(Method):
    """Trained diagonals between frozen random bases; the update has full rank. Mergeable; a no-op at the start.

    Trainable parameters: n · (rank + min(in, out)) for each matrix: a larger rank has *fewer*. The update is not
    formed, but its two factors have together more entries than the weight, and the products with them cost more than
    the base's own. The shared bases have as many entries as a square of the largest sizes; an adapter holds them.

    Fields:
        rank: of each basis.
        alpha: numerator of the update's scale, large: 20 times the rank.
        bases: `"uniform"`, `"sparse"` or `"very_sparse"`; sparse ones are stored densely too.
        dropout: rate on the input, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: a rank below 1, unknown bases, dropout outside [0, 1); from `init`: a rank
            above min(in, out) of a site.

    Example:
        >>> import jpeft
        >>> jpeft.RandLoRA(rank=32, targets=["q_proj", "v_proj"], bases="sparse").alpha
        640.0
    """

    rank: int = 32
    alpha: float = 640.0
    bases: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    dropout: float = 0.0

    ADDS_FROZEN = "one set of random bases for the whole model"
    SMALL = {"rank": 5, "alpha": 5.0}
    EXPORT = Export(
        "RANDLORA",
        tensors={
            "dense": {
                "randlora_lambda": ("lambda_", "rn"),
                "randlora_gamma": ("gamma", "nm"),
                "randlora_A": ("a", "r1m"),  # every layer of PEFT's has a copy of the shared ones
                "randlora_B": ("b", "knr"),
            }
        },
        config={
            "r": "rank",
            "randlora_alpha": "alpha",
            "randlora_dropout": "dropout",
            "sparse": ("bases", "sparse"),
            "very_sparse": ("bases", "very_sparse"),
        },
        fixed={"save_projection": True, "bias": "none"},
        neutral={"projection_prng_key": (), "init_weights": ()},
        shared={"base_model.randlora_A": ("a", "r1m"), "base_model.randlora_B": ("b", "knr")},
    )

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"expected a whole rank >= 1, got rank={self.rank}")
        if self.bases not in ("uniform", "sparse", "very_sparse"):
            raise ValueError(f"expected bases in ('uniform', 'sparse', 'very_sparse'), got {self.bases!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        if self.rank > min(n_in, n_out):
            return f"rank {self.rank} is above min(in, out) = min({n_in}, {n_out}); lower it or leave the site out"
        return None

    def shared(self, key, params, chosen: dict[str, Site]):
        sizes = [matrix_sizes(site.shape, site.axes)[1:] for site in chosen.values()]
        small, large = sorted(map(max, zip(*sizes, strict=True)))
        dtype = jnp.result_type(jnp.float32, *(site.dtype for site in chosen.values()))
        thinness = {"sparse": 3, "very_sparse": math.sqrt(small)}

        def draw(name, *shape):
            own = key_for_path(key, name)
            if self.bases == "uniform":
                return jax.random.uniform(own, shape, dtype, -math.sqrt(3), math.sqrt(3))
            t = thinness[self.bases]
            signs = jax.random.choice(own, jnp.array([-1, 0, 1]), shape, p=jnp.array([0.5 / t, 1 - 1 / t, 0.5 / t]))
            return math.sqrt(t) * signs.astype(dtype)

        n = math.ceil(small / self.rank)
        return {"a": draw("randlora_A", self.rank, small), "b": draw("randlora_B", large, n, self.rank)}

    def wrap(self, key, leaf, site: Site) -> RandomBases:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        small, dtype = min(n_in, n_out), jnp.promote_types(leaf.dtype, jnp.float32)
        n = math.ceil(small / self.rank)
        gamma = jnp.full((*lead, n, small), 1 / max(n, small), dtype)
        scale, axes = self.alpha / self.rank, site.axes.lstrip("s")
        return RandomBases(
            leaf, jnp.zeros((*lead, n, self.rank), dtype), gamma, axes=axes, scale=scale, dropout=self.dropout
        )
