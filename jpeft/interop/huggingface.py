"""Hugging Face model folders: safetensors read straight into sharded arrays, and written back.

What a model's tensors are called is the model's own data, a table of `Tensor`. A leaf of ours is the tensor itself or,
where the name has a `{}`, the stack over layers; `transpose` turns `(out, in)` into our `(in, out)`.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp  # with it ml_dtypes, from which safetensors knows bfloat16
import numpy as np
import safetensors

from jpeft.interop import bitsandbytes, compressed, quantization_config
from jpeft.interop.files import (
    Stored,
    header,
    raise_together,
    read_json,
    renamed_when_complete,
    write_json,
    write_tensors,
)
from jpeft.quant.packed import Packed
from jpeft.quant.pieces import Pieces

__all__ = ["Tensor", "folder", "read", "write"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Tensor:
    """A row of a model's name table: our path, the Hugging Face name (`{}` stands for the layer), how the axes lie."""

    path: str
    name: str
    transpose: bool = False

    def names(self, shape: Sequence[int]) -> list[str]:
        """The tensors that make up a leaf of this shape."""
        return [self.name.format(k) for k in range(shape[0])] if "{}" in self.name else [self.name]

    @property
    def is_linear(self) -> bool:
        """Whether it is the kernel of a linear layer."""
        return self.path.split("/")[-1] == "kernel"

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of them."""
        one = tuple(shape[1:] if "{}" in self.name else shape)
        return one[::-1] if self.transpose else one


def folder(path: str | Path) -> Path:
    """The path of a model folder.

    Raises:
        FileNotFoundError: where there is no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        came = "a file" if path.exists() else "nothing"
        raise FileNotFoundError(
            f"expected a model folder (config.json, safetensors, tokenizer.json), found {came} at {path}"
        )
    return path


def read(
    path,
    table: Sequence[Tensor],
    shapes,
    *,
    ignored: Sequence[str] = (),
    renamed: Sequence[tuple[str, str]] = (),
    optional: Sequence[str] = (),
    dtype=None,
    shardings=None,
    quantization: Mapping[str, Any] | None = None,
    compute_dtype: str | None = None,
    leaf_dtype: Any = "float32",
    each: Callable[[str, Any], Any] | None = None,
):
    """The tree of `shapes` (nested dictionaries) from a folder's safetensors, each leaf read straight into its shards.

    What bitsandbytes compressed becomes packed Weights, which stay so: the tree goes through `lift`, or `merge`.

    Args:
        path: the folder.
        table: the model's names, for every path in `shapes`.
        shapes: the tree to fill; dtypes are not read from it.
        ignored: patterns of tensor names that may be there and are not read.
        renamed: patterns of names by which tensors of the table may go too, each with its replacement, one after the
            other as `re.sub` does it.
        optional: patterns of paths whose leaves stay shapes where the folder has no tensors of their names and shapes.
        dtype: of all dense leaves; each as stored where None.
        shardings: one sharding, or a tree of them; the first device where None.
        quantization: the config's `quantization_config`, which says what is compressed; None where it has none.
        compute_dtype, leaf_dtype: of compressed leaves, see `bitsandbytes.from_tensors`.
        each: `(path, leaf) -> what stands in the tree`, called as soon as a leaf is read, which is then let go.

    Raises:
        FileNotFoundError: where the folder or one of its files is absent.
        ValueError: on a truncated file, or tensors that are missing, left over, of another shape or kind, or that
            contradict their own description, all together.
    """
    path = folder(path)
    stored = _renamed(path, _headers(path), renamed)
    wanted = dict(_flat(shapes))
    rows = {row.path: row for row in table if row.path in wanted}
    left = {p for p in wanted if any(re.search(o, p) for o in optional) and not _has(stored, rows[p], wanted[p].shape)}
    leaves = {p: leaf.shape for p, leaf in wanted.items() if p not in left}
    ignored = (*ignored, *(re.escape(name) + "$" for p in left for name in rows[p].names(wanted[p].shape)))
    packed = compressed.find(stored)
    _check_tensors(path, rows, leaves, stored, ignored, packed, quantization)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    placed = dict(_flat(shardings))

    def leaf(leaf_path: str):
        if leaf_path in left:
            return jax.ShapeDtypeStruct(wanted[leaf_path].shape, dtype or wanted[leaf_path].dtype)
        row, shape = rows[leaf_path], leaves[leaf_path]
        names = row.names(shape)
        if any(name in packed for name in names):
            dense = lambda name: _dense_layer(row, shape, stored[name])
            layers = [packed[name] if name in packed else dense(name) for name in names]
            found = compressed.read(layers, names, "{}" in row.name, compute_dtype=compute_dtype, leaf_dtype=leaf_dtype)
            return compressed.placed(found, placed[leaf_path])
        sources = [stored[name] for name in names]
        target = dtype or jnp.result_type(*{DTYPES[source.dtype] for source in sources})

        def shard(index) -> np.ndarray:
            return _read_shard(row, shape, sources, index, np.dtype(target))

        return jax.make_array_from_callback(shape, placed[leaf_path], shard)

    return _unflat(shapes, leaf if each is None else lambda leaf_path: each(leaf_path, leaf(leaf_path)))


def _renamed(path, stored: dict[str, Stored], renamed: Sequence[tuple[str, str]]) -> dict[str, Stored]:
    """The tensors by the names that the table has for them."""
    found: dict[str, Stored] = {}
    twice = []
    for name, tensor in stored.items():
        for pattern, replacement in renamed:
            name = re.sub(pattern, replacement, name)
        if name in found:
            twice.append(f"{name}: {found[name].name} and {tensor.name}")
        found[name] = tensor
    raise_together(f"expected each tensor once in {path}", {"under two names": twice})
    return found


def _has(stored: dict[str, Stored], row: Tensor, shape) -> bool:
    """Whether a leaf's tensors are all there, in their shapes."""
    return all(name in stored and stored[name].shape == row.stored_shape(shape) for name in row.names(shape))


def _read_shard(row: Tensor, shape, sources: list[Stored], index, dtype) -> np.ndarray:
    """The slice `index` of a leaf, filled layer by layer so that only one tensor's slice is held beside it."""
    index = tuple(slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))
    stacked = "{}" in row.name
    layers = range(len(sources))[index[0]] if stacked else range(1)
    one = index[1:] if stacked else index
    inner = one[::-1] if row.transpose else one
    out = np.empty([len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True)], dtype)
    for k, layer in enumerate(layers):
        with safetensors.safe_open(sources[layer].file, framework="numpy") as file:
            block = file.get_slice(sources[layer].name)[inner]
        (out[k] if stacked else out)[...] = block.T if row.transpose else block
    return out


def _dense_layer(row: Tensor, shape, source: Stored) -> np.ndarray:
    """One layer of a stack, whole."""
    one = Tensor(row.path, source.name, row.transpose)
    whole = tuple(slice(0, n) for n in shape[1:])
    return _read_shard(one, shape[1:], [source], whole, np.dtype(DTYPES[source.dtype]))


def _headers(path: Path) -> dict[str, Stored]:
    """Every tensor of the folder, from the headers of its files."""
    if (path / SINGLE).exists():
        files = [path / SINGLE]
    elif (path / INDEX).exists():
        names = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
        files = [path / name for name in names]
        if absent := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(f"{path / INDEX} names {len(files)} files, of which these are absent: {absent}")
    else:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; found {others}: save the model again as safetensors" if others else ""
        raise FileNotFoundError(f"expected {SINGLE} or {INDEX} in {path}{hint}")
    return {name: tensor for file in files for name, tensor in header(file).items()}


def _check_tensors(path, rows, leaves, stored: dict[str, Stored], ignored, packed, quantization) -> None:
    if unnamed := sorted(set(leaves) - set(rows)):
        raise ValueError(f"expected a name for every parameter, the table has none for {unnamed}")
    expected = {name: rows[p].stored_shape(shape) for p, shape in leaves.items() for name in rows[p].names(shape)}
    kernels = {  # as linear layers have them, which is how they are compressed
        name: rows[p].stored_shape(shape)[:: 1 if rows[p].transpose else -1]
        for p, shape in leaves.items()
        for name in rows[p].names(shape)
    }
    parts = {part for name in expected if name in packed for part in packed[name]}
    spare = [
        name
        for name in stored
        if name not in expected and name not in parts and not any(re.search(p, name) for p in ignored)
    ]
    shared = [name for name in expected if name in stored and name not in packed]
    missing = [name for name in expected if name not in stored and name not in packed]
    groups = {
        "missing": [f"{name} {list(expected[name])}" for name in missing],
        "left over": [f"{name} {list(stored[name].shape)}" for name in spare],
        "of another shape": [
            f"{name}: expected {list(expected[name])}, got {list(stored[name].shape)}"
            for name in shared
            if stored[name].shape != expected[name]
        ],
        "of a dtype that is not a plain float": [
            f"{name}: {stored[name].dtype}" for name in shared if stored[name].dtype not in DTYPES
        ],
        "contradicting what is said of them": compressed.check(
            {name: entry for name, entry in packed.items() if name in expected}, kernels
        ),
        "not what its config.json says": quantization_config.format_problems(quantization, packed),
    }
    raise_together(f"the tensors in {path} are not those that its config.json describes", groups)


def write(
    path,
    table: Sequence[Tensor],
    params,
    shapes,
    *,
    config: dict,
    tokenizer_from: Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """A folder that `transformers` loads, written beside its place and renamed: it appears complete or not at all.

    Args:
        path: the folder to write.
        table: the model's names.
        params: nested dictionaries of arrays, and of compressed kernels, which are written as bitsandbytes has them.
        shapes: what they should be; dtypes are not read from it.
        config: the contents of `config.json`; its dtype and `quantization_config` are replaced by those of the
            parameters.
        tokenizer_from: the folder (or a file in it) whose tokenizer files are copied.
        overwrite: whether an existing folder may be replaced.
        max_shard_bytes: the largest file to write, one tensor at least.

    Raises:
        FileExistsError: where `path` exists and `overwrite` is false.
        ValueError: where `params` differ from `shapes`, all differences together; compressed kernels that bitsandbytes
            or transformers cannot have.
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or allow it with overwrite=True")
    leaves, wanted = dict(_flat(params)), dict(_flat(shapes))
    _check_params(leaves, wanted, {row.path for row in table if row.is_linear})
    pieces = [
        (name, row, *compressed.piece_of(leaves[row.path], k))
        for row in table
        if row.path in leaves
        for k, name in enumerate(row.names(leaves[row.path].shape))
    ]
    packed = {name: piece for name, _, piece, _ in pieces if isinstance(piece, Packed)}
    kernels = [name for name, row, *_ in pieces if row.is_linear]
    kernels += [row.name for row in table if row.is_linear and "{}" not in row.name]  # a tied head's too
    dense = {name.removesuffix(".weight") for name in kernels if name not in packed}
    config = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
    config |= {"quantization_config": quantization_config.described(packed, dense)} if packed else {}
    with renamed_when_complete(path, overwrite) as temporary:
        _write_tensors(temporary, pieces, max_shard_bytes)
        dtype = jnp.result_type(*{leaf.dtype for leaf in leaves.values()}).name
        write_json(temporary / "config.json", config | {"dtype": dtype})
        if tokenizer_from is not None:
            source = tokenizer_from if tokenizer_from.is_dir() else tokenizer_from.parent
            for name in TOKENIZER_FILES:
                if (source / name).exists():
                    shutil.copy2(source / name, temporary / name)


def _check_params(leaves: dict, wanted: dict, linear: set[str]) -> None:
    shape = lambda leaf: list(getattr(leaf, "shape", ()))
    is_packed = lambda leaf: isinstance(leaf, Packed | Pieces)
    groups = {
        "missing": [f"{p} {shape(wanted[p])}" for p in wanted if p not in leaves],
        "left over": [f"{p} {shape(leaves[p])}" for p in leaves if p not in wanted],
        "of another shape": [
            f"{p}: expected {shape(wanted[p])}, got {shape(leaves[p])}"
            for p in wanted
            if p in leaves and shape(wanted[p]) != shape(leaves[p])
        ],
        "not arrays or compressed kernels (merge adapters with jpeft.merge before saving)": [
            f"{p}: {type(leaf).__name__}"
            for p, leaf in leaves.items()
            if not isinstance(leaf, jax.Array | np.ndarray) and not is_packed(leaf)
        ],
        "compressed, and no kernel of a linear layer: transformers reads only those so": [
            p for p, leaf in leaves.items() if is_packed(leaf) and p not in linear
        ],
    }
    raise_together("the parameters are not those that the config describes", groups)


def _write_tensors(path: Path, pieces: list, max_shard_bytes: int) -> None:
    shards: list[list] = []
    size, total = math.inf, 0
    for piece in pieces:
        _, row, leaf, _ = piece
        layers = leaf.shape[0] if "{}" in row.name else 1
        nbytes = sum(x.size * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(leaf)) // layers
        if size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size, total = size + nbytes, total + nbytes
    many = len(shards) > 1
    files = [f"model-{k:05}-of-{len(shards):05}.safetensors" if many else SINGLE for k in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        tensors = {key: x for piece in shard for key, x in _stored(*piece).items()}
        write_tensors(path / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if many:
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _stored(name: str, row: Tensor, leaf, layer: int) -> dict[str, np.ndarray]:
    """One layer of a leaf as Hugging Face stores it."""
    one = jax.tree.map(lambda x: x[layer], leaf) if "{}" in row.name else leaf
    if isinstance(one, Packed):
        return bitsandbytes.to_tensors(one, name)
    one = np.asarray(one)
    return {name: np.ascontiguousarray(one.T if row.transpose else one)}


def _flat(tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of nested dictionaries; whatever is no dictionary is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _unflat(like, leaf, prefix: str = ""):
    """Nested dictionaries shaped as `like`, with `leaf(path)` in the leaves."""
    return {
        key: _unflat(value, leaf, f"{prefix}{key}/") if isinstance(value, dict) else leaf(f"{prefix}{key}")
        for key, value in like.items()
    }
