"""Leaves of a Hugging Face folder that bitsandbytes compressed, read into packed Weights layer by layer.

A leaf whose tensors are all compressed alike becomes one Weight with the stack in front; one of which single layers are
dense, or compressed in another way, becomes `Pieces`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jpeft.core.shards import field_specs
from jpeft.interop import bitsandbytes
from jpeft.interop.files import Stored
from jpeft.quant.packed import Packed
from jpeft.quant.pieces import Pieces, stacked

__all__ = ["check", "find", "piece_of", "placed", "read"]

Entry = dict[str, Stored]  # the tensors of one compressed weight, by name
_KINDS = {"U8": "uint8", "I8": "int8", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find(stored: Mapping[str, Stored]) -> dict[str, Entry]:
    """`{weight: its tensors}` of the compressed weights among a folder's tensors."""
    return {name: {part: stored[part] for part in parts} for name, parts in bitsandbytes.entries(stored).items()}


def check(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the compressed weights, as the headers and their own descriptions say it.

    `shapes` (out, in) are what the weights should have.
    """

    def seen(part: Stored) -> Any:
        small = ".quant_state." in part.name or part.name.endswith("weight_format")
        dtype = jnp.dtype(_KINDS.get(part.dtype, "complex64"))  # any that no part has
        return _array(part) if small else jax.ShapeDtypeStruct(part.shape, dtype)

    found = []
    for name, entry in entries.items():
        shape = shapes.get(name)
        if shape is not None and len(shape) != 2:
            found.append(f"{name}: expected a plain tensor of shape {list(shape)}, got a compressed weight")
        elif shape is not None:
            found += bitsandbytes.problems({part: seen(x) for part, x in entry.items()}, name, (shape[0], shape[1]))
    return found


def read(sources: Sequence[Entry | np.ndarray], names: Sequence[str], is_stack: bool, **dtypes) -> Any:
    """The leaf of these layers, or of the one, each (in, out); an array is a dense layer. In memory are the layers so
    far, one layer's tensors, and at the end the stack of them.

    `dtypes` as in `bitsandbytes.from_tensors`.

    Raises:
        ValueError: as there; a dense layer of another dtype than the compressed ones stand for.
    """
    layers = []
    for name, source in zip(names, sources, strict=True):
        if isinstance(source, np.ndarray):
            layers.append(jnp.asarray(source))
        else:
            layers.append(bitsandbytes.from_tensors({part: _array(x) for part, x in source.items()}, name, **dtypes))
    if len({layer.dtype for layer in layers}) > 1:
        said = ", ".join(f"{name} {layer.dtype.name}" for name, layer in zip(names, layers, strict=True))
        raise ValueError(f"expected layers of one dtype, got {said}")
    return stacked(layers, "io") if is_stack else layers[0]


def placed(leaf: Any, sharding) -> Any:
    """The leaf on its devices: codes as the dense leaf would lie, each part beside the codes it belongs to.

    A part that cannot be cut as the leaf is cut, as 8-bit scales along the outputs, is whole on every device.
    """
    if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(leaf, Packed):
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(leaf, sharding)
    split = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    try:
        specs = field_specs(leaf, split)
    except ValueError:
        only_lead = [names if c in "sb" else None for names, c in zip(split, leaf.labels, strict=True)]
        specs = field_specs(leaf, only_lead).replace(base=jax.sharding.PartitionSpec(*split))
    on = lambda spec: jax.sharding.NamedSharding(sharding.mesh, spec)
    return jax.tree.map(lambda x, spec: jax.device_put(x, on(spec)), leaf, specs)


def piece_of(leaf: Any, layer: int) -> tuple[Any, int]:
    """`(piece, number in it)` of a layer, for a leaf in pieces; of another the leaf itself."""
    if isinstance(leaf, Pieces):
        for piece in leaf.base:
            if layer < piece.shape[0]:
                return piece, layer
            layer -= piece.shape[0]
    return leaf, layer


def _array(part: Stored) -> np.ndarray:
    with safetensors.safe_open(part.file, framework="numpy") as file:
        return file.get_tensor(part.name)
