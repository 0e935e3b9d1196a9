"""The `quantization_config` of a Hugging Face folder: what bitsandbytes' says of the tensors, and how to write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jpeft.quant.blockwise import Blockwise
from jpeft.quant.packed import Packed

__all__ = ["compute_dtype", "described", "format_problems", "problems"]


def problems(config: Mapping[str, Any] | None) -> list[str]:
    """What of a `quantization_config` is not bitsandbytes' and cannot be read."""
    if not config:
        return []
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if config.get(name)]
    method = config.get("quant_method", "bitsandbytes" if bits else None)
    if method != "bitsandbytes":
        return [
            "expected unquantized weights (quantize them with a jpeft method after loading), or bitsandbytes' format, "
            f"got quant_method={method!r}"
        ]
    if len(bits) != 1:
        return [f"expected load_in_4bit or load_in_8bit in the quantization_config, got {bits or 'neither'}"]
    return []


def compute_dtype(config: Mapping[str, Any] | None) -> str | None:
    """The dtype of products with the compressed weights, where the config says one."""
    said = (config or {}).get("bnb_4bit_compute_dtype") if (config or {}).get("load_in_4bit") else None
    return None if said is None else jnp.dtype(said).name


def format_problems(config: Mapping[str, Any] | None, found: Mapping[str, Iterable[str]]) -> list[str]:
    """Which weights (`entries`) are not in the format that a `quantization_config` says; without one, any will do."""
    if not config:
        return []
    said = "int8" if config.get("load_in_8bit") else config.get("bnb_4bit_quant_type", "fp4")
    if not found:
        return [f"the quantization_config says {said}, and no tensor is compressed"]
    lines = []
    for name, tensors in found.items():
        states = [key.rpartition("__")[2] for key in tensors if ".quant_state." in key]
        of = states[0] if states else "int8"
        if of != said:
            lines.append(f"{name}: the quantization_config says {said}, the tensors are {of}")
    return lines


def described(weights: Mapping[str, Packed], dense: Iterable[str]) -> dict[str, Any]:
    """What transformers reads to load compressed weights, `{name: Weight}`, beside the modules left `dense`.

    Raises:
        ValueError: weights of several formats, which transformers does not load.
    """
    kinds = {w.CODEBOOK if isinstance(w, Blockwise) else "int8" for w in weights.values()}
    if len(kinds) != 1:
        raise ValueError(f"expected compressed weights of one format, got {', '.join(sorted(kinds))}")
    [kind] = kinds
    first = next(iter(weights.values()))
    four = {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": isinstance(first, Blockwise) and first.double_quant,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": jnp.dtype(first.compute_dtype or first.dtype).name,
    }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "llm_int8_skip_modules": sorted(dense),
        **({} if kind == "int8" else four),
    }
