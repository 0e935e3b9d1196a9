"""bitsandbytes' 4-bit and 8-bit tensors, as Hugging Face checkpoints have them, and Weights that stand for kernels.

A torch weight `name` (out, in) in 4 bits is kept as the tensors

    name                                        packed codes (out·in / 2, 1), uint8 or a wider type viewed as its bytes
    name.absmax                                 the scales, float32, or their 8-bit codes
    name.quant_map                              the codebook, float32 (16,)
    name.nested_absmax, name.nested_quant_map   of 8-bit scales: a scale for each 256 of them, and their codebook (256,)
    name.quant_state.bitsandbytes__nf4          JSON as uint8: format, block size, dtype, shape, the 8-bit scales' mean

and in 8 bits, for a name that ends in `weight`, which stands here for that ending too:

    weight                                      codes (out, in), int8
    SCB                                         the largest magnitude of each output, float32 (out,)
    weight_format                               0, row-major, uint8 (); absent in older checkpoints

Where the block size divides the inputs, as in every linear layer of a language model, a Weight for the kernel (in, out)
holds the same codes and scales: reading and writing lose nothing. The weights of transformers' `Conv1D` (in, out) are
kept transposed, as those of a linear layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.quant.blockwise import Blockwise
from jpeft.quant.fp4 import Float4
from jpeft.quant.int8 import Rowwise8
from jpeft.quant.nf4 import NormalFloat4
from jpeft.quant.packed import Packed

__all__ = ["entries", "from_tensors", "problems", "quantize", "tensor_names", "to_tensors"]

_WEIGHTS: dict[str, type[Blockwise]] = {w.CODEBOOK: w for w in (NormalFloat4, Float4)}
_STATE = ".quant_state.bitsandbytes__"
_PART = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")
_PART8 = re.compile(r"(?<=\.)(SCB|weight_format)$")


def quantize(kernel: jax.Array, block_size: int = 64, double_quant: bool = False, quant_type: str = "nf4") -> Blockwise:
    """The Weight that bitsandbytes makes of a kernel (in, out), that is of the torch weight `kernel.T`.

    Raises:
        ValueError: no matrix, an unknown format, or a block size that does not divide the inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> quantize(jnp.ones((128, 8)), double_quant=True).scales.shape
        (2, 8)
    """
    if kernel.ndim != 2 or quant_type not in _WEIGHTS:
        raise ValueError(
            f"expected a kernel (in, out) and a format of {list(_WEIGHTS)}, got {kernel.shape}, {quant_type!r}"
        )
    if kernel.shape[0] % block_size:
        raise ValueError(
            f"expected a block size that divides the inputs, got {block_size=} for {kernel.shape[0]} inputs"
        )
    return _WEIGHTS[quant_type].encode(
        kernel, axes="io", leaf_dtype=jnp.dtype(kernel.dtype), block_size=block_size, double_quant=double_quant
    )


def entries(names: Iterable[str]) -> dict[str, list[str]]:
    """`{weight: all its tensors}` of the compressed weights among tensor names.

    Example:
        >>> entries(["a.weight", "a.SCB", "b.weight", "c.weight", "c.weight.absmax"])
        {'a.weight': ['a.weight', 'a.SCB'], 'c.weight': ['c.weight', 'c.weight.absmax']}
    """
    names = list(names)
    whole = lambda name: _PART8.sub("weight", _PART.sub("", name))
    found: dict[str, list[str]] = {whole(name): [] for name in names if whole(name) != name}
    for name in names:
        if whole(name) in found:
            found[whole(name)].append(name)
    return found


def tensor_names(weight: Packed, name: str) -> list[str]:
    """The names of the tensors that `to_tensors` gives."""
    if isinstance(weight, Rowwise8):
        return [name, *_names8(name)]
    assert isinstance(weight, Blockwise)
    nested = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
    parts = nested if weight.double_quant else nested[:2]
    return [name, *(f"{name}.{part}" for part in parts), f"{name}{_STATE}{weight.CODEBOOK}"]


def _names8(name: str) -> list[str]:
    module = name.removesuffix("weight")
    return [f"{module}SCB", f"{module}weight_format"]


def to_tensors(weight: Packed, name: str) -> dict[str, np.ndarray]:
    """The tensors of a Weight that stands for a kernel (in, out), under the names of the torch weight `name`.

    Raises:
        ValueError: a Weight of another kind, of a stack of layers, or whose blocks bitsandbytes cannot have; a name in
            8 bits that does not end in "weight".
    """
    if not isinstance(weight, Blockwise | Rowwise8) or weight.axes != "io" or weight.ndim != 2:
        what = f"{type(weight).__name__} of shape {tuple(weight.shape)}"
        raise ValueError(f"{name}: expected a compressed Weight that stands for one kernel (in, out), got a {what}")
    if isinstance(weight, Rowwise8):
        if not re.search(r"(^|\.)weight$", name):
            raise ValueError(f"expected the name of a weight in 8 bits to end in '.weight', got {name!r}")
        parts = [np.ascontiguousarray(np.asarray(weight.base).T), weight.absmax, np.uint8(0)]
        return dict(zip(tensor_names(weight, name), map(np.asarray, parts), strict=True))
    packed, absmax = weight.flat()
    state: dict[str, Any] = {
        "quant_type": weight.CODEBOOK,
        "blocksize": weight.block_size,
        "dtype": jnp.dtype(weight.dtype).name,
        "shape": list(weight.shape[::-1]),
    }
    tensors = [packed, absmax, weight.codebook()]
    if weight.double_quant:
        tensors += [weight.nested, weight.scale_codebook()]
        state |= {"nested_blocksize": weight.GROUP, "nested_dtype": "float32", "nested_offset": float(weight.offset)}
    tensors.append(np.frombuffer(json.dumps(state).encode(), np.uint8))
    return dict(zip(tensor_names(weight, name), map(np.asarray, tensors), strict=True))


def from_tensors(
    tensors: Mapping[str, Any], name: str, compute_dtype: str | None = None, leaf_dtype: Any = "float32"
) -> Packed:
    """The Weight that stands for the Flax kernel (in, out) of the torch weight `name`.

    Scales in 8 bits stay so where their codebook is ours; of another codebook they become float32, with its values.
    `leaf_dtype` is that of weights in 8 bits, whose tensors do not say it.

    Raises:
        ValueError: tensors that are missing or disagree with their own description, another format, blocks that run
            from one output into the next, scales that are not finite.
    """
    wrong = problems(tensors, name)
    if not wrong:
        scales = [key for key in entries(tensors)[name] if re.search(r"absmax$|SCB$", key)]
        wrong += [f"{key}: a scale is not finite" for key in scales if not np.isfinite(np.asarray(tensors[key])).all()]
    if not wrong and (state := _state(tensors, name)):
        kind, found = _WEIGHTS[state["quant_type"]], np.asarray(tensors[f"{name}.quant_map"])
        if not np.array_equal(found, kind.codebook()):
            wrong.append(f"{name}.quant_map: it is not the codebook of {kind.CODEBOOK}")
    if wrong:
        raise ValueError("these tensors of bitsandbytes do not agree\n" + "\n".join(wrong))
    part = lambda suffix: np.asarray(tensors[f"{name}{suffix}"])
    if (state := _state(tensors, name)) is None:
        codes, absmax = part("").T, np.asarray(tensors[_names8(name)[0]])
        dtypes = {"leaf_dtype": jnp.dtype(leaf_dtype), "compute_dtype": compute_dtype}
        return Rowwise8(jnp.asarray(codes), jnp.asarray(absmax), axes="io", **dtypes)
    nested = "nested_offset" in state
    outer = (part(".nested_absmax"), np.float32(state["nested_offset"])) if nested else ()
    kind = _WEIGHTS[state["quant_type"]]
    packed = np.ascontiguousarray(part("")).view(np.uint8).reshape(-1)
    return kind.from_flat(
        *map(jnp.asarray, (packed, part(".absmax"), *outer)),
        shape=tuple(state["shape"]),
        scale_table=part(".nested_quant_map") if nested else kind.scale_codebook(),
        leaf_dtype=jnp.dtype(state["dtype"]),
        compute_dtype=compute_dtype,
        block_size=state["blocksize"],
    )


def problems(tensors: Mapping[str, Any], name: str, shape: tuple[int, int] | None = None) -> list[str]:
    """What is wrong with a weight's tensors by their dtypes, shapes and description; arrays or, but for the
    description, `ShapeDtypeStruct`s. `shape` (out, in) is what the weight should have."""
    eight = [key for key in _names8(name) if key in tensors]
    if eight and not any(key.startswith(name + ".") for key in tensors):
        return _problems8(tensors, name, shape)
    try:
        state = _state(tensors, name)
    except ValueError as error:
        return [str(error)]
    if state is None:
        return [f"expected one tensor {name}{_STATE}nf4 or ...fp4, got none"]
    rows, columns, nested = *state["shape"], "nested_offset" in state
    blocks = rows * columns // state["blocksize"]
    expected = {
        ".absmax": ((blocks,), np.uint8 if nested else np.float32),
        ".quant_map": ((16,), np.float32),
    }
    if nested:
        expected[".nested_absmax"] = ((-(-blocks // Blockwise.GROUP),), np.float32)
        expected[".nested_quant_map"] = ((256,), np.float32)
    found = [_unlike(tensors, name + suffix, *like) for suffix, like in expected.items()]
    found.append(_unlike_bytes(tensors, name, (rows * columns + 1) // 2))
    if nested and (state.get("nested_blocksize"), type(state["nested_offset"])) != (Blockwise.GROUP, float):
        found.append(f"{name}: expected 8-bit scales in groups of {Blockwise.GROUP} with their mean, got {state}")
    if nested and not np.isfinite(state["nested_offset"] or 0.0):
        found.append(f"{name}: expected a finite mean of the scales, got {state['nested_offset']}")
    if shape is not None and (rows, columns) != shape:
        found.append(f"{name}: expected a weight of shape {list(shape)}, got one of {state['shape']}")
    return [line for line in found if line]


def _problems8(tensors, name: str, shape) -> list[str]:
    scales, form = _names8(name)
    if name not in tensors:
        return [f"the checkpoint lacks {name}"]
    rows, columns = shape or (*tensors[name].shape, 0, 0)[:2]
    found = [_unlike(tensors, name, (rows, columns), np.int8), _unlike(tensors, scales, (rows,), np.float32)]
    if form in tensors:
        found.append(_unlike(tensors, form, (), np.uint8))
        value = tensors[form]
        if not found[-1] and not isinstance(value, jax.ShapeDtypeStruct) and (number := int(np.asarray(value))):
            found.append(
                f"{form}: expected 0, row-major codes, got {number}; save the model again with bitsandbytes 0.45"
            )
    return [line for line in found if line]


def _state(tensors: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What the checkpoint says of a weight in 4 bits; None where it says nothing."""
    names = [key for key in tensors if key.startswith(name + _STATE)]
    if len(names) > 1:
        raise ValueError(f"expected one tensor {name}{_STATE}nf4 or ...fp4, got {names}")
    if not names:
        return None
    try:
        state = json.loads(np.asarray(tensors[names[0]], np.uint8).tobytes())
        rows, columns = map(int, state["shape"])
        known = state["quant_type"] in _WEIGHTS and names[0].endswith(_STATE + state["quant_type"])
        sized = min(rows, columns, int(state["blocksize"])) > 0 and jnp.issubdtype(
            jnp.dtype(state["dtype"]), jnp.floating
        )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{names[0]} is not a description by bitsandbytes: {error!r}") from error
    if not (known and sized):
        raise ValueError(f"{names[0]}: expected a matrix in {' or '.join(_WEIGHTS)}, got {state}")
    if columns % state["blocksize"]:
        raise ValueError(
            f"{name}: its blocks of {state['blocksize']} run from one output of {columns} inputs into the next, "
            "which no Weight has; load the weight dense, and compress it again"
        )
    return state


def _unlike(tensors, name: str, shape: tuple[int, ...], dtype) -> str | None:
    if name not in tensors:
        return f"the checkpoint lacks {name}"
    x = tensors[name]
    if tuple(x.shape) == shape and x.dtype == dtype:
        return None
    return f"{name}: expected {np.dtype(dtype).name}{list(shape)}, got {np.dtype(x.dtype).name}{list(x.shape)}"


def _unlike_bytes(tensors, name: str, count: int) -> str | None:
    """The packed codes, whatever type they are viewed as."""
    if name not in tensors:
        return f"the checkpoint lacks {name}"
    x = tensors[name]
    size = int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
    return None if size == count else f"{name}: expected uint8[{count}], got uint8[{size}]"
