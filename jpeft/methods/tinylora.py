"""TinyLoRA: a vector of a few numbers trains a matrix, or a model (Morris et al. 2026, arXiv 2602.04118).

    W' = W + A·R·B,        R = Σ_i v_i P_i,        W ≈ A·B the largest `rank` singular values of W

with A (in, rank) and B (rank, out) frozen, P (*stack, *batch, u, rank, rank) frozen random, entries N(0, 1 / rank), and
v (u) trained, zero at the start. The singular values stand in B, as in the paper's U Σ R Vᵀ (of Wᵀ here); `balanced`
gives both factors their square roots, as HF PEFT does. (The paper does not say how P is distributed; N(0, 1 / rank) is
HF's choice.)

Matrices may share v, `weight_tying` says how many: 0 none, 1 all of the model. The matrices are counted in the order of
their use, layer by layer, as in HF PEFT, and cut into round((1 - weight_tying) · count) groups, at least one, of
equally many neighbours; the last takes the rest. P is each matrix's own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.factored import Factored
from jpeft.core.method import Method, Saved, Tied
from jpeft.core.sites import Site
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import dense, matrix_sizes, static, to_matrix, weight
from jpeft.methods.lora import LoRA, LowRank

__all__ = ["TinyLoRA"]


@weight
class Projected(Factored):
    """`base + a · Σ_i v_i p_i · b`, with v its own, or `vectors[group]`.

    Shapes: a (*stack, *batch, in, rank), b (*stack, *batch, rank, out), p (*stack, *batch, u, rank, rank), v (*stack,
    *batch, u) or None; shared vectors (groups, u), and of this leaf group (*stack, *batch), both None where v is not.
    """

    base: Any
    a: Any
    b: Any
    p: Any
    v: Any = None
    vectors: Any = None
    group: Any = None
    key: Any = None
    axes: str = static()
    path: str = static("")
    dropout: float = static(0.0)
    scale = 1.0

    FIELDS = {"a": "ir", "b": "ro", "p": "uqr", "v": "u", "vectors": "gu", "group": "", "key": ""}
    SLICEABLE = "io"
    UNSTACKED = frozenset({"vectors"})
    SAVED = frozenset({"a", "b", "p"})

    def trainable_fields(self):
        return frozenset({"vectors"} if self.path else {"v"})

    def tied(self):
        return {"vectors": "vectors", "group": _group_of(self.path)} if self.path else {}

    def factors(self):
        v = self.vectors[self.group] if self.path else self.v
        return self.a @ jnp.einsum("...u,...uqr->...qr", v, self.p), self.b


def _group_of(path: str) -> str:
    """The name of the array that says which vector each matrix of a leaf has."""
    return f"group of {path}"


@dataclass(frozen=True)
class TinyLoRA(Method):
    """A few trained numbers choose a direction among each weight's largest singular vectors. Mergeable; a no-op at the
    start.

    Trainable parameters: u for each group of matrices; with `weight_tying=1` u for the whole model. An adapter holds
    its frozen arrays too, as another machine's decomposition may have other signs. HF PEFT gets the `LoRA` that it
    amounts to: its own TinyLoRA numbers the vectors of a model, whose layers it does not stack.

    Fields:
        rank: singular vectors kept; more of them are harder to train.
        u: numbers in a vector.
        weight_tying: the share of vectors that is saved by sharing: 0 (each matrix its own) to 1 (one for all).
        balanced: whether A and B both have √Σ; else B has Σ.
        dropout: rate on the input of A, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: a rank or u below 1, weight_tying outside [0, 1], dropout outside [0, 1); from
            `init`: a rank above min(in, out) of a site, a saved adapter without its frozen arrays.

    Example:
        >>> import jpeft
        >>> jpeft.TinyLoRA(u=13, weight_tying=1.0).rank
        2
    """

    rank: int = 2
    u: int = 64
    weight_tying: float = 0.0
    balanced: bool = False
    dropout: float = 0.0

    ADDS_FROZEN = "each weight's leading singular vectors, and random matrices of rank x rank"
    SMALL = {"u": 5}

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "u"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected a whole {name} >= 1, got {name}={value}")
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"expected 0 <= weight_tying <= 1, got weight_tying={self.weight_tying}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        if self.rank > min(n_in, n_out):
            return f"rank {self.rank} is above min(in, out) = min({n_in}, {n_out}); lower it or leave the site out"
        return None

    def shared(self, key, params, chosen: dict[str, Site]):
        if not self.weight_tying:
            return {}
        numbers = _numbers(chosen)
        count = sum(n.size for n in numbers.values())
        groups = max(1, round(count * (1 - self.weight_tying)))
        index = lambda n: jnp.asarray(np.minimum(n // (count // groups), groups - 1), jnp.int32)
        dtype = jnp.result_type(jnp.float32, *(site.dtype for site in chosen.values()))
        return {
            "vectors": jnp.zeros((groups, self.u), dtype),
            **{_group_of(path): index(n) for path, n in numbers.items()},
        }

    def wrap_calibrated(self, key, leaf, site: Site, given) -> Projected:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        if isinstance(given, Saved):
            if missing := [name for name in ("a", "b", "p") if name not in given]:
                raise ValueError(f"{site.path}: the saved adapter has lost its frozen arrays {', '.join(missing)}")
            a, b, p = given["a"], given["b"], given["p"]
        else:
            a, b = self._singular(to_matrix(dense(leaf), site.axes).astype(dtype))
            p = jax.random.normal(key, (*lead, self.u, self.rank, self.rank), dtype) / math.sqrt(self.rank)
        tied = bool(self.weight_tying)
        v = None if tied else jnp.zeros((*lead, self.u), dtype)
        options = {"axes": site.axes.lstrip("s"), "path": site.path if tied else "", "dropout": self.dropout}
        return Projected(leaf, a, b, p, v, **options)

    def _singular(self, matrix):
        """A and B of a leaf in matrix form, layer by layer: the whole decomposition of one at a time."""

        def leading(matrix):
            u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
            u, s, vt = u[:, : self.rank], s[: self.rank], vt[: self.rank]
            return (u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt) if self.balanced else (u, s[:, None] * vt)

        a, b = jax.lax.map(leading, matrix.reshape(-1, *matrix.shape[-2:]))
        lead = matrix.shape[:-2]
        return a.reshape(*lead, *a.shape[1:]), b.reshape(*lead, *b.shape[1:])

    def exported(self, trainable, frozen):
        """The `LoRA` with A·R and B, and its trainables."""
        bound = dict(leaves_with_paths(self.bind(trainable, frozen)))

        def low_rank(path, w):
            if not isinstance(w, Projected):
                return w
            return LowRank(None, *bound[path].factors(), axes=w.axes, dropout=w.dropout)

        plain = LoRA(
            rank=self.rank,
            alpha=float(self.rank),
            dropout=self.dropout,
            targets=self.targets,
            modules_to_save=self.modules_to_save,
        )
        return plain, map_with_paths(low_rank, trainable.tree if isinstance(trainable, Tied) else trainable)


def _numbers(chosen: dict[str, Site]) -> dict[str, np.ndarray]:
    """`{path: the number of each of its matrices}`: leaves of one stack after the other within a layer."""
    leads = {path: matrix_sizes(site.shape, site.axes)[0] for path, site in chosen.items()}
    layers = {path: leads[path][0] if site.axes.startswith("s") else 1 for path, site in chosen.items()}
    numbers = {path: np.zeros((layers[path], math.prod(leads[path]) // layers[path]), int) for path in chosen}
    count = 0
    for depth, stack in itertools.groupby(chosen, key=lambda path: layers[path]):
        for layer, path in itertools.product(range(depth), list(stack)):
            width = numbers[path].shape[1]
            numbers[path][layer] = range(count, count + width)
            count += width
    return {path: n.reshape(leads[path]) for path, n in numbers.items()}
