"""Sparse updates: some entries of each matrix train, at positions that stay.

    W' = W + scale · S(values, index),        S(v, p)[p_1, p_0] = v,  zero elsewhere

values (*stack, *batch, k); index (*stack, *batch, 2, k), the outputs first and then the inputs, as in a torch weight. A
position outside the matrix counts for nothing, so that matrices of one stack may have different numbers of entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.sites import Site
from jpeft.core.update import Update
from jpeft.core.weight import matrix_sizes, static, weight

__all__ = [
    "Entries",
    "FoundEntries",
    "DENSE",
    "INDEX",
    "scatter",
    "random_index",
    "largest_index",
    "too_many_entries",
]

DENSE = "a product with gathered entries costs more than one with the dense matrix that they are put in"
INDEX = "the positions of the entries that train are integers beside the base"


@weight
class Entries(Update):
    """`base + scale · scatter(values, index)`. Shapes: values (*stack, *batch, k), index (*stack, *batch, 2, k)."""

    base: Any
    values: Any
    index: Any
    axes: str = static()
    scale: float = static(default=1.0)

    FIELDS = {"values": "k", "index": "pk"}
    TRAINABLE = frozenset({"values"})

    def matrix(self):
        _, n_in, n_out = matrix_sizes(self.shape, self.labels)
        return self.scale * scatter(self.values.astype(self.wide), self.index, n_in, n_out)


@weight
class FoundEntries(Entries):
    """`Entries` whose positions were found from data, and are saved."""

    axes: str = static()

    SAVED = frozenset({"index"})


def scatter(values: jax.Array, index: jax.Array, n_in: int, n_out: int) -> jax.Array:
    """The matrices (*lead, in, out) with `values` (*lead, k) at `index` (*lead, 2, k) and zero elsewhere.

    The gradient with respect to the values is a gather.
    """
    one = lambda v, p: jnp.zeros((n_in, n_out), v.dtype).at[p[1], p[0]].add(v, mode="drop")
    return jnp.vectorize(one, signature="(k),(p,k)->(i,o)")(values, index)


def random_index(key: jax.Array, lead: Sequence[int], n_in: int, n_out: int, count: int) -> jax.Array:
    """`count` distinct positions for each matrix, (*lead, 2, count), all equally likely."""
    keys = jax.random.split(key, math.prod(lead))
    choose = lambda key: jax.random.choice(key, n_in * n_out, (count,), replace=False)
    flat = jax.lax.map(choose, keys).reshape(*lead, count)  # one by one: a draw needs room for all positions
    return _index(flat, n_out)


def largest_index(score: jax.Array, count: int) -> jax.Array:
    """The positions of the `count` largest entries of each matrix (*lead, in, out): (*lead, 2, count)."""
    lead, (n_in, n_out) = score.shape[:-2], score.shape[-2:]
    largest = lambda one: jax.lax.top_k(one, count)[1]
    return _index(jax.lax.map(largest, score.reshape(-1, n_in * n_out)).reshape(*lead, count), n_out)


def _index(flat, n_out: int):
    return jnp.stack([flat % n_out, flat // n_out], axis=-2).astype(jnp.int32)


def too_many_entries(site: Site) -> str | None:
    """What is wrong with choosing entries of this site's matrices; None where nothing is."""
    _, n_in, n_out = matrix_sizes(site.shape, site.axes)
    if n_in * n_out >= 2**31:
        return f"{n_in} × {n_out} entries are more than 32 bits can number; leave it out of `targets`"
    return None
