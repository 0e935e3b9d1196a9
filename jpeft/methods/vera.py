"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv 2310.11454).

    W' = W + A·Λ_d·B·Λ_b        Λ_d = diag(lambda_d), Λ_b = diag(lambda_b)

with one frozen random pair for the whole model, A (max in, rank) and B (rank, max out), of which every site uses the
first `in` rows and `out` columns; lambda_d (*stack, *batch, rank) and lambda_b (*stack, *batch, out) train. (The paper
multiplies from the left: Λ_b B Λ_d A with its A and B transposed.) A and B are Kaiming-uniform, U(±√(6/max in)) and
U(±√(6/rank)); lambda_b starts at zero. There is no alpha.

The paper has equal shapes everywhere; one pair that is sliced is HF PEFT's way with others. A and B follow from the
key, but are saved with the adapter: an adapter of HF PEFT brings its own, and another random generator other numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.tree import key_for_path
from jpeft.core.weight import matrix_sizes, static, weight

__all__ = ["VeRA"]


@weight
class VectorScaled(Factored):
    """`base + a · diag(lambda_d) · b · diag(lambda_b)`.

    Shapes: lambda_d (*stack, *batch, rank), lambda_b (*stack, *batch, out); shared a (max in, rank), b (rank, max out).
    """

    base: Any
    lambda_d: Any
    lambda_b: Any
    a: Any = None
    b: Any = None
    key: Any = None
    axes: str = static()
    dropout: float = static(0.0)
    scale = 1.0

    FIELDS = {"lambda_d": "r", "lambda_b": "o", "a": "ir", "b": "ro", "key": ""}
    TRAINABLE = frozenset({"lambda_d", "lambda_b"})
    SLICEABLE = "io"
    UNSTACKED = frozenset({"a", "b"})
    SAVED = frozenset({"a", "b"})

    def tied(self):
        return {"a": "a", "b": "b"}

    def fitted(self):
        _, n_in, n_out = matrix_sizes(self.shape, self.labels)
        return super().fitted().replace(a=self.a[:n_in], b=self.b[:, :n_out])

    def factors(self):
        fitted = self.fitted()
        # Both vectors scale B, the factor behind the rank: the backward pass needs no activation but A's output.
        b = self.lambda_d[..., :, None] * fitted.b * self.lambda_b[..., None, :]
        return jnp.broadcast_to(fitted.a, (*b.shape[:-2], *fitted.a.shape)), b


@dataclass(frozen=True)
class VeRA(Method):
    """Two trained vectors for each matrix between random matrices that all share. Mergeable; a no-op at the start.

    Trainable parameters: rank + out for each matrix. Learns with rates some ten times LoRA's.

    Fields:
        rank: of the shared pair; it costs one parameter for each matrix, so hundreds are usual.
        d_initial: where lambda_d starts; 0.1 or less.
        dropout: rate on the input of A, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: a rank below 1, a d_initial of zero, dropout outside [0, 1).

    Example:
        >>> import jpeft
        >>> jpeft.VeRA(rank=1024, targets=["q_proj", "v_proj"]).d_initial
        0.1
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0

    ADDS_FROZEN = "one random pair of matrices for the whole model"
    SMALL = {"rank": 5}
    EXPORT = Export(
        "VERA",
        tensors={"dense": {"vera_lambda_b": ("lambda_b", "o"), "vera_lambda_d": ("lambda_d", "r")}},
        config={"r": "rank", "d_initial": "d_initial", "vera_dropout": "dropout"},
        fixed={"save_projection": True, "bias": "none"},
        neutral={"projection_prng_key": (), "init_weights": ()},
        shared={"base_model.vera_A": ("a", "ri"), "base_model.vera_B": ("b", "or")},
    )

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"expected a whole rank >= 1, got rank={self.rank}")
        if not self.d_initial:
            raise ValueError("expected d_initial != 0, got d_initial=0; with lambda_b at zero too nothing would learn")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def shared(self, key, params, chosen: dict[str, Site]):
        sizes = [matrix_sizes(site.shape, site.axes) for site in chosen.values()]
        n_in, n_out = (max(size[k] for size in sizes) for k in (1, 2))
        dtype = jnp.result_type(jnp.float32, *(site.dtype for site in chosen.values()))

        def kaiming(name, rows, columns, fan_in):
            bound = math.sqrt(6 / fan_in)
            return jax.random.uniform(key_for_path(key, name), (rows, columns), dtype, -bound, bound)

        return {"a": kaiming("vera_A", n_in, self.rank, n_in), "b": kaiming("vera_B", self.rank, n_out, self.rank)}

    def wrap(self, key, leaf, site: Site) -> VectorScaled:
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        d = jnp.full((*lead, self.rank), self.d_initial, dtype)
        return VectorScaled(leaf, d, jnp.zeros((*lead, n_out), dtype), axes=site.axes.lstrip("s"), dropout=self.dropout)
