"""Trainable tokens: some rows of the embedding train, the others stay. HF PEFT's method of this name; of the rows that
prompt tuning (Lester et al. 2021, arXiv 2104.08691) adds, these are the ones with a place in the vocabulary.

    W'[t] = rows[n]  where t = token_indices[n],        W'[t] = W[t]  elsewhere

rows (*stack, n, out) start at the embedding's own. Used as an update of rank n, `1_t · (rows − W[t])`, so that neither
the lookup nor a tied head, which sees the same rows, forms a second table. Of a head apart, a matrix with the tokens as
its outputs, the columns train instead: rows (*stack, n, in).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes, static, to_matrix, weight

__all__ = ["TrainableTokens", "Rows", "Columns"]


@weight
class Rows(Weight):
    """`base` with `rows` (*stack, n, out) in place of the rows of its inputs `indices`."""

    base: Any
    rows: Any
    axes: str = static()
    indices: tuple[int, ...] = static(())

    FIELDS = {"rows": "no"}
    TRAINABLE = frozenset({"rows"})

    def apply(self, op, x):
        y = apply(op, x, self.base)
        a, b = self.factors()
        down, up = (b.mT, a.mT) if op.transposed else (a, b)
        return y + op.restore(op.mix(op.contract(x, down), up)).astype(y.dtype)

    def dense(self):
        table = self.table()
        table = table.at[..., jnp.asarray(self.indices), :].set(self.rows.astype(table.dtype))
        return from_matrix(self.oriented(table), self.labels, self.shape)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A (*stack, in, n) and B (*stack, n, out) of the update."""
        table = self.table()
        change = self.rows - table[..., jnp.asarray(self.indices), :].astype(self.rows.dtype)
        places = jax.nn.one_hot(jnp.asarray(self.indices), table.shape[-2], axis=0, dtype=change.dtype)
        return jnp.broadcast_to(places, (*change.shape[:-2], *places.shape)), change

    def table(self) -> jax.Array:
        """The base with the tokens as its rows."""
        return self.oriented(to_matrix(dense(self.base), self.labels))

    def oriented(self, matrix: jax.Array) -> jax.Array:
        """Between the matrix form and the table."""
        return matrix


@weight
class Columns(Rows):
    """As `Rows` where the tokens are the outputs: rows (*stack, n, in)."""

    axes: str = static()

    FIELDS = {"rows": "ni"}

    def factors(self):
        places, change = super().factors()
        return change.mT, places.mT

    def oriented(self, matrix):
        return matrix.mT


@dataclass(frozen=True)
class TrainableTokens(Method):
    """The embeddings of chosen tokens train: new special tokens, or known ones with a new meaning. Mergeable.

    Fields:
        token_indices: their row numbers in the embedding.
        targets: the embedding; a head apart is adapted too where it is named: `targets=["embedding", "lm_head"]`.

    Raises:
        ValueError: from the constructor: a negative or repeated token; from `init`: no tokens, or one that a target
            does not have.

    Example:
        >>> import jpeft
        >>> jpeft.TrainableTokens(token_indices=[128000, 128001]).token_indices
        (128000, 128001)
    """

    token_indices: Any = ()
    targets: Targets = field(default="embedding", kw_only=True)

    KINDS = ("embedding", "dense")
    EXPORT = Export(
        "TRAINABLE_TOKENS",
        {
            "embedding": {"trainable_tokens_delta": ("rows", "no")},
            "dense": {"trainable_tokens_delta": ("rows", "ni")},
        },
        config={"token_indices": "token_indices"},
        neutral={"init_weights": ()},
        tied=True,
    )
    SMALL = {"token_indices": (9, 4, 11), "targets": ("embedding", "all-linear")}

    def __post_init__(self):
        super().__post_init__()
        if min(self.token_indices, default=0) < 0 or len(set(self.token_indices)) < len(self.token_indices):
            raise ValueError(f"expected token_indices >= 0, each once, got token_indices={self.token_indices}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        size = n_in if site.kind == "embedding" else n_out
        if not self.token_indices:
            return "no tokens to train; write token_indices=[...]"
        if max(self.token_indices) >= size:
            return f"token {max(self.token_indices)} is not among its {size}; add rows to the embedding first"
        return None

    def wrap(self, key, leaf, site: Site) -> Rows:
        kind = Rows if site.kind == "embedding" else Columns
        new = kind(leaf, None, axes=site.axes.lstrip("s"), indices=tuple(self.token_indices))
        rows = new.table()[..., jnp.asarray(self.token_indices), :]
        return new.replace(rows=rows.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
