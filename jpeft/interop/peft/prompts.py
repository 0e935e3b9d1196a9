"""Prompts and prefixes in PEFT's files: a few tensors for the whole model, without names of modules.

A prompt's tensor is its field. A prefix's, `(tokens, layers · fields · heads · head_dim)`, has the keys and values of
all layers side by side: `Export.whole`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jpeft.core.export import Export
from jpeft.core.method import Method, Tied
from jpeft.core.sites import Sites
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import Weight
from jpeft.interop.files import header, raise_together

__all__ = ["read", "sizes_of", "tensors_of"]

Place = tuple[str, str, int | None]
"""A leaf's path, a field, a layer of the stack."""


def tensors_of(bound, export: Export, sites: Sites | None) -> dict[str, np.ndarray]:
    """Every tensor of the file.

    Raises:
        ValueError: several leaves without `sites`, which say in what order they are used; a field that is frozen and
            not given.
    """
    leaves = _leaves(bound, export)
    return {name: _joined(leaves, list(_places(leaves, fields, sites))) for name, fields in export.whole.items()}


def sizes_of(tensors: Mapping[str, np.ndarray], bound, export: Export) -> dict[str, Any]:
    """PEFT's options that say how a tensor is taken apart."""
    name, fields = next(iter(export.whole.items()))
    sizes: dict[str, Any] = {"token_dim": tensors[name].shape[-1], "num_transformer_submodules": 1}
    if len(fields) > 1:
        heads, size = next(getattr(w, fields[0]).shape[-2:] for w in _leaves(bound, export).values())
        layers = tensors[name].shape[-1] // (len(fields) * heads * size)
        sizes |= {"token_dim": heads * size, "num_attention_heads": heads, "num_layers": layers}
    return sizes


def read(file: Path, method: Method, export: Export, params, sites: Sites) -> tuple[Any, Any]:
    """`(trainable, frozen)` with the file's arrays in their places.

    Raises:
        ValueError: tensors that are missing, left over or of another shape, all together.
    """
    start = lambda p: method.init(jax.random.key(0), p, sites)
    shapes = _leaves(jax.eval_shape(lambda p: method.bind(*start(p)), params), export)
    stored = header(file)
    places = {name: list(_places(shapes, fields, sites)) for name, fields in export.whole.items()}
    wanted = {name: _shape(shapes, found) for name, found in places.items()}
    groups = {
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in stored],
        "left over": [f"{key} {list(stored[key].shape)}" for key in stored if key not in wanted],
        "of another shape": [
            f"{name}: expected {shape}, got {list(stored[name].shape)}"
            for name, shape in wanted.items()
            if name in stored and list(stored[name].shape) != shape
        ],
    }
    raise_together(f"the tensors in {file} are not those of a {export.peft_type} adapter for these params", groups)
    values: dict[str, dict[str, Any]] = {}
    with safetensors.safe_open(file, framework="numpy") as opened:
        for name, found in places.items():
            pieces = _pieces(opened.get_tensor(name), shapes, found)
            layers: dict[tuple[str, str], list] = {}
            for (path, field, _), piece in zip(found, pieces, strict=True):
                layers.setdefault((path, field), []).append(piece)
            for (path, field), parts in layers.items():
                like = getattr(shapes[path], field)
                whole = np.stack(parts) if like.ndim > parts[0].ndim else parts[0]
                values.setdefault(path, {})[field] = jnp.asarray(whole, like.dtype)
    trainable, frozen = start(params)
    return _put(trainable, values), frozen


def _leaves(bound, export: Export) -> dict[str, Weight]:
    names = {field for fields in export.whole.values() for field in fields}
    return {path: w for path, w in leaves_with_paths(bound) if isinstance(w, Weight) and names <= w.FIELDS.keys()}


def _places(leaves: Mapping[str, Weight], fields: tuple[str, ...], sites: Sites | None) -> Iterator[Place]:
    """Where the parts of a tensor are: leaf after leaf in the order of their use, layer after layer."""
    if len(leaves) > 1 and sites is None:
        raise ValueError("the order of the layers follows from how the model uses them; write sites=sites")
    order = [path for path in dict.fromkeys(sites.paths) if path in leaves] if sites is not None else list(leaves)
    for path in order:
        w = leaves[path]
        if any(getattr(w, field) is None for field in fields):
            raise ValueError(f"{path} is of the frozen half; write save(..., frozen=frozen)")
        like = getattr(w, fields[0])
        stacked = like.ndim > len(w.FIELDS[fields[0]])
        for layer in range(like.shape[0]) if stacked else [None]:
            for field in fields:
                yield path, field, layer


def _shapes(leaves: Mapping[str, Weight], places: list[Place]) -> list[tuple[int, ...]]:
    """Of each part, without the axis of the layers."""
    return [getattr(leaves[path], field).shape[layer is not None :] for path, field, layer in places]


def _shape(leaves: Mapping[str, Weight], places: list[Place]) -> list[int]:
    first, *rest = _shapes(leaves, places)
    return [first[0], sum(math.prod(shape[1:]) for shape in (first, *rest))] if rest else list(first)


def _joined(leaves: Mapping[str, Weight], places: list[Place]) -> np.ndarray:
    values = [(np.asarray(getattr(leaves[path], field)), layer) for path, field, layer in places]
    parts = [x if layer is None else x[layer] for x, layer in values]
    return parts[0] if len(parts) == 1 else np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)


def _pieces(tensor: np.ndarray, leaves: Mapping[str, Weight], places: list[Place]) -> list[np.ndarray]:
    """The inverse of `_joined`."""
    shapes = _shapes(leaves, places)
    if len(places) == 1:
        return [tensor]
    ends = np.cumsum([math.prod(shape[1:]) for shape in shapes])[:-1]
    return [x.reshape(shape) for x, shape in zip(np.split(tensor, ends, axis=1), shapes, strict=True)]


def _put(half, values: Mapping[str, Mapping[str, Any]]):
    if isinstance(half, Tied):
        return Tied(_put(half.tree, values), half.arrays)
    placed = lambda path, leaf: leaf.replace(**values[path]) if path in values and isinstance(leaf, Weight) else leaf
    return map_with_paths(placed, half)
