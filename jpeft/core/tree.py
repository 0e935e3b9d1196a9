"""Parameter trees: paths, splitting in two halves and joining them again."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax

from jpeft.core.weight import Weight

__all__ = ["path_string", "leaves_with_paths", "map_with_paths", "partition", "combine", "key_for_path"]


def _is_leaf(x) -> bool:
    return isinstance(x, Weight)


def path_string(path) -> str:
    """A key path as `a/b/kernel`: dictionary keys, attribute names and indices joined by slashes."""
    names = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
        else:
            names.append(str(entry))
    return "/".join(names)


def leaves_with_paths(tree) -> list[tuple[str, Any]]:
    """`[(path, leaf)]`, a Weight counting as one leaf."""
    return [(path_string(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)]


def map_with_paths(fn: Callable[[str, Any], Any], tree) -> Any:
    """`fn(path, leaf)` over the tree, a Weight counting as one leaf."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: fn(path_string(p), leaf), tree, is_leaf=_is_leaf)


def key_for_path(key, path: str):
    """A random key of the path's own, so that adding or dropping a target never reshuffles the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def partition(tree, mask) -> tuple[Any, Any]:
    """Split a tree by a tree of booleans: `(where true, where false)`, `None` standing in each for what the other has.

    `combine` is the inverse: `combine(*partition(tree, mask))` equals `tree`.
    """
    true = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    false = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return true, false


def combine(first, second) -> Any:
    """Join two halves made by `partition`.

    Raises:
        ValueError: where both halves hold a value, or where their structures disagree.
    """

    def choose(path, a, b):
        if a is not None and b is not None:
            raise ValueError(f"expected each leaf in one half only, but both hold {path_string(path)!r}")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(choose, first, second, is_leaf=lambda x: x is None)
