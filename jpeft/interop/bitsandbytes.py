"""bitsandbytes' 4-bit tensors, as Hugging Face checkpoints hold them, and Weights that stand for Flax kernels.

A torch weight `name` (out, in) is kept as the tensors

    name                                        packed codes (out·in / 2, 1), uint8 or a wider type viewed as its bytes
    name.absmax                                 the scales, float32, or their 8-bit codes
    name.quant_map                              the codebook, float32 (16,)
    name.nested_absmax, name.nested_quant_map   of 8-bit scales: a scale for each 256 of them, and their codebook (256,)
    name.quant_state.bitsandbytes__nf4          JSON as uint8: format, block size, dtype, shape, the 8-bit scales' mean

Where the block size divides the inputs, as in every linear layer of a language model, a Weight for the kernel (in, out)
holds the same codes and scales: reading and writing lose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.quant.blockwise import Blockwise
from jpeft.quant.fp4 import Float4
from jpeft.quant.nf4 import NormalFloat4

__all__ = ["from_tensors", "quantize", "tensor_names", "to_tensors"]

_WEIGHTS: dict[str, type[Blockwise]] = {w.CODEBOOK: w for w in (NormalFloat4, Float4)}
_STATE = ".quant_state.bitsandbytes__"


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


def tensor_names(weight: Blockwise, name: str) -> list[str]:
    """The names of the tensors that `to_tensors` gives."""
    nested = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
    parts = nested if weight.double_quant else nested[:2]
    return [name, *(f"{name}.{part}" for part in parts), f"{name}{_STATE}{weight.CODEBOOK}"]


def to_tensors(weight: Blockwise, name: str) -> dict[str, np.ndarray]:
    """The tensors of a Weight that stands for a kernel (in, out), under the names of the torch weight `name`.

    Raises:
        ValueError: a Weight of another kind, of a stack of layers, or whose blocks bitsandbytes cannot have.
    """
    if not isinstance(weight, Blockwise) or weight.axes != "io" or weight.ndim != 2:
        what = f"{type(weight).__name__} of shape {tuple(weight.shape)}"
        raise ValueError(f"{name}: expected a 4-bit Weight that stands for one kernel (in, out), got a {what}")
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


def from_tensors(tensors: Mapping[str, Any], name: str, compute_dtype: str | None = None) -> Blockwise:
    """The Weight that stands for the Flax kernel (in, out) of the torch weight `name`.

    Scales in 8 bits stay so where their codebook is ours; of another codebook they become float32, with its values.

    Raises:
        ValueError: tensors that are missing or disagree with their own description, another format, blocks that run
            from one output into the next.
    """
    state = _state(tensors, name)
    kind, shape, block_size = _WEIGHTS[state["quant_type"]], tuple(state["shape"]), state["blocksize"]
    blocks, codes = shape[0] * shape[1] // block_size, shape[0] * shape[1]
    nested = "nested_offset" in state
    parts = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    found = {part: _tensor(tensors, f"{name}.{part}") for part in parts}
    packed = np.ascontiguousarray(_tensor(tensors, name)).view(np.uint8).reshape(-1)
    expected = {
        "absmax": ((blocks,), np.uint8 if nested else np.float32),
        "quant_map": ((16,), np.float32),
        "nested_absmax": ((-(-blocks // kind.GROUP),), np.float32),
        "nested_quant_map": ((256,), np.float32),
    }
    problems = [_unlike(name, packed, ((codes + 1) // 2,), np.uint8)]
    problems += [_unlike(f"{name}.{part}", found[part], *expected[part]) for part in parts]
    if not np.array_equal(found["quant_map"], kind.codebook()):
        problems.append(f"{name}.quant_map: it is not the codebook of {kind.CODEBOOK}")
    if nested and (state.get("nested_blocksize"), type(state["nested_offset"])) != (kind.GROUP, float):
        problems.append(f"{name}: expected 8-bit scales in groups of {kind.GROUP} with their mean, got {state}")
    if wrong := [p for p in problems if p]:
        raise ValueError("these tensors of bitsandbytes do not agree\n" + "\n".join(wrong))
    outer = (found["nested_absmax"], np.float32(state["nested_offset"])) if nested else ()
    return kind.from_flat(
        *map(jnp.asarray, (packed, found["absmax"], *outer)),
        shape=shape,
        scale_table=found.get("nested_quant_map", kind.scale_codebook()),
        leaf_dtype=jnp.dtype(state["dtype"]),
        compute_dtype=compute_dtype,
        block_size=block_size,
    )


def _state(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the checkpoint says of a weight."""
    names = [key for key in tensors if key.startswith(name + _STATE)]
    if len(names) != 1:
        raise ValueError(f"expected one tensor {name}{_STATE}nf4 or ...fp4, got {names or 'none'}")
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


def _tensor(tensors: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the checkpoint lacks {name}")
    return np.asarray(tensors[name])


def _unlike(name: str, array: np.ndarray, shape: tuple[int, ...], dtype) -> str | None:
    if array.shape == shape and array.dtype == dtype:
        return None
    return f"{name}: expected {np.dtype(dtype).name}{list(shape)}, got {array.dtype.name}{list(array.shape)}"
