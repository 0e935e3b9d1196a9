"""DeLoRA: decoupled low-rank adaptation, of angle and strength (Bini et al. 2025, arXiv 2503.18225).

    ΔW = ‖W‖ ∘ (λ / rank) · (A·Ξ·B - A₀·Ξ₀·B₀),        Ξ = diag(1 / (‖A_r‖·‖B_r‖))

with A (*stack, *batch, in, rank), B (*stack, *batch, rank, out), one trainable λ (*stack, *batch) for each matrix, and
‖W‖ (*stack, *batch, in) the norms over the outputs, taken once. Each of the rank's terms has norm λ / rank, so the
Frobenius norm of A·Ξ·B's part is bounded by λ, whatever A and B are.

A and B start Kaiming-uniform, and A₀, B₀ are they, kept frozen: the start is the pretrained function, and the direction
has a gradient from the first step. λ scales both terms, as in the authors' code. HF PEFT has no second term and starts
B at zero instead (`init_b="zero"`); it bounds both norms from below by 1e-4, and so does this for both starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import dense, matrix_sizes, static, to_matrix, weight
from jpeft.methods._factors import kaiming_uniform, rank_problem
from jpeft.methods.lora import LoRA, LowRank

__all__ = ["DeLoRA", "Bounded"]


@weight
class Bounded(Factored):
    """`base + norm ∘ (boundary / rank) · (unit terms of a · b, less those of first_a · first_b)`.

    One product of rank `rank`, or of twice as much with the second term. Shapes: a, first_a (*stack, *batch, in, rank),
    b, first_b (*stack, *batch, rank, out), boundary, key (*stack, *batch), norm (*stack, *batch, in); first_a, first_b
    and key may be None.
    """

    base: Any
    a: Any
    b: Any
    boundary: Any
    norm: Any
    first_a: Any = None
    first_b: Any = None
    key: Any = None
    axes: str = static()
    scale: float = static(default=1.0)
    dropout: float = static(0.0)

    FIELDS = {"a": "ir", "b": "ro", "boundary": "", "norm": "i", "first_a": "ir", "first_b": "ro", "key": ""}
    TRAINABLE = frozenset({"a", "b", "boundary"})
    UP = frozenset({"b"})

    def factors(self):
        strength = self.boundary[..., None, None] / self.a.shape[-1]
        a, b = self.a, _unit_terms(self.a, self.b) * strength
        if self.first_a is not None:
            a = jnp.concatenate([a, self.first_a], -1)
            b = jnp.concatenate([b, -_unit_terms(self.first_a, self.first_b) * strength], -2)
        return a * self.norm[..., None], b


def _unit_terms(a, b):
    """B with its rows scaled so that each term A_r·B_r has norm one, or less where a norm is below 1e-4."""
    squared = lambda x, axis: jnp.maximum(jnp.sum(x * x, axis), 1e-8)
    return b / jnp.sqrt(squared(a, -2) * squared(b, -1))[..., None]


@dataclass(frozen=True)
class DeLoRA(Method):
    """A low-rank update of bounded, trainable norm. Mergeable; the pretrained function at the start.

    Fields:
        rank: of the update.
        boundary: λ at the start, the update's largest norm relative to the weights'. HF PEFT's default; the paper
            chooses it by task, from 1 on.
        init_b: B's start: `"kaiming"` (the first update is subtracted) or `"zero"` (HF PEFT's).
        dropout: rate on the input of A, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: a rank below 1, a boundary that is not positive, an unknown init_b, dropout
            outside [0, 1); from `init`: a rank above min(in, out) of a site.

    Example:
        >>> import jpeft
        >>> jpeft.DeLoRA(rank=16, boundary=4.0).boundary
        4.0
    """

    rank: int = 8
    boundary: float = 15.0
    init_b: Literal["kaiming", "zero"] = "kaiming"
    dropout: float = 0.0

    ADDS_FROZEN = "the norms of the weights, and the first A and B"
    EXPORT = Export(
        "DELORA",
        tensors={
            "dense": {
                "delora_A": ("a", "ri"),
                "delora_B": ("b", "or"),
                "delora_lambda": ("boundary", "l"),
                "delora_w_norm": ("norm", "i"),
            }
        },
        config={"r": "rank", "delora_lambda": "boundary", "module_dropout": "dropout"},
        fixed={"init_weights": True, "bias": "none"},
        neutral={"init_weights": (False,)},
        required={"init_b": "zero"},
    )
    SMALL = {"rank": 3, "boundary": 0.5}

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1 or self.boundary <= 0:
            raise ValueError(f"expected rank >= 1 and boundary > 0, got rank={self.rank}, boundary={self.boundary}")
        if self.init_b not in ("kaiming", "zero"):
            raise ValueError(f"expected init_b in ('kaiming', 'zero'), got {self.init_b!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def check(self, site: Site) -> str | None:
        return rank_problem(self.rank, site)

    def wrap(self, key, leaf, site: Site) -> Bounded:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        a_key, b_key = jax.random.split(key)
        a = kaiming_uniform(a_key, (*lead, n_in, self.rank), n_in, dtype)
        b = kaiming_uniform(b_key, (*lead, self.rank, n_out), self.rank, dtype)
        norm = jnp.linalg.norm(to_matrix(dense(leaf), site.axes).astype(dtype), axis=-1)
        boundary = jnp.full(lead, self.boundary, dtype)
        first = (jnp.copy(a), jnp.copy(b))
        if self.init_b == "zero":
            b, first = jnp.zeros_like(b), (None, None)
        return Bounded(leaf, a, b, boundary, norm, *first, axes=site.axes.lstrip("s"), dropout=self.dropout)

    def exported(self, trainable, frozen) -> tuple[Method, Any]:
        """HF PEFT's DeLoRA has no second term: with one, a LoRA of twice the rank computes the same."""
        if self.init_b == "zero":
            return self, trainable
        bound = dict(leaves_with_paths(self.bind(trainable, frozen)))

        def plain(path, leaf):
            if not isinstance(leaf, Bounded):
                return leaf
            return LowRank(leaf.base, *bound[path].factors(), axes=leaf.axes, dropout=leaf.dropout)

        fields = {"targets": self.targets, "modules_to_save": self.modules_to_save, "dropout": self.dropout}
        return LoRA(rank=2 * self.rank, alpha=2.0 * self.rank, **fields), map_with_paths(plain, trainable)
