"""Merging into compressed weights: the merged leaf is compressed again, and what that loses is said."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jpeft.core.method import merge
from jpeft.core.tree import map_with_paths
from jpeft.core.weight import Weight
from jpeft.quant.packed import Packed
from jpeft.quant.pieces import Pieces

__all__ = ["requantize"]


def requantize(bound) -> tuple[Any, dict[str, float]]:
    """`(params, errors)`: the tree merged, leaves that lie on compressed ones compressed again as those were.

    `errors` has ‖Q(W) − W‖ / ‖W‖ for the merged W of each such leaf, Q(W) what was made of it. An adapter's update is
    often smaller than that, and may be lost: `jpeft.merge` keeps it, in full precision. A compressed leaf that nothing
    adapts stays as it is, exactly. Leaf by leaf: one dense leaf is in memory at a time.

    Raises:
        ValueError: as `jpeft.merge`.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from jpeft.quant import requantize
        >>> fn, params, x = (lambda p, x: x @ p["kernel"]), {"kernel": jnp.eye(64)}, jnp.ones((1, 64))
        >>> method = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=2))
        >>> halves = method.init(jax.random.key(0), params, jpeft.find_sites(fn, params, x))
        >>> packed, errors = requantize(method.bind(*halves))
        >>> type(packed["kernel"]).__name__, list(errors)
        ('NormalFloat4', ['kernel'])
    """
    errors: dict[str, float] = {}

    def again(path, leaf):
        inner = _innermost(leaf)
        if inner is leaf or not isinstance(inner, Packed | Pieces):
            return leaf if inner is leaf and isinstance(leaf, Packed | Pieces) else merge({path: leaf})[path]
        dense = merge({path: leaf})[path]
        packed = inner.standing_for(dense)
        norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
        errors[path] = float(norm(packed.dense() - dense) / jnp.maximum(norm(dense), jnp.finfo(jnp.float32).tiny))
        return packed

    return map_with_paths(again, bound), errors


def _innermost(leaf):
    """The Weight or array at the bottom, the last that is a Weight where there is one."""
    while isinstance(leaf, Weight) and isinstance(leaf.base, Weight):
        leaf = leaf.base
    return leaf
