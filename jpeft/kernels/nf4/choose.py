"""Which implementation takes a product with a packed weight, decided while it is traced, and why.

    "xla"    plain JAX, everywhere: the CPU path, the fallback, the oracle
    "tpu"    `tpu.matmul`, a Pallas kernel
    "gpu"    `gpu.matmul`, a Pallas kernel for few rows; for many, if asked for, one that decodes, and cuBLAS

The platform is that of the mesh in context (`jax.set_mesh`, `shard_map`), else that of the default backend. So a
program that is compiled on a CPU host for a TPU is traced under `jax.set_mesh` with a mesh of that TPU. XLA cannot
partition a kernel: it is chosen where a single device, or under `shard_map` every device for its own shards, runs the
product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType

from jpeft.kernels.nf4 import gpu, tpu

__all__ = ["IMPLEMENTATIONS", "Choice", "Product", "Target", "choose", "target", "why"]

IMPLEMENTATIONS = ("xla", "tpu", "gpu")
PLATFORMS = {"tpu": "TPU", "gpu": "GPU"}  # that have a kernel, which goes by their name
INTERPRETED = {"tpu": tpu.INTERPRETED, "gpu": gpu.INTERPRETED}  # the chip to play where there is none


@dataclass(frozen=True)
class Target:
    """What a product will run on; `devices`: over how many of them the compiler is to partition it."""

    platform: str
    device_kind: str
    devices: int = 1


@dataclass(frozen=True)
class Product:
    """A product of `rows` rows with a weight of `shape` (in, out), or with its transpose.

    Fields:
        dtype: of both operands.
        rounded: the dtype of the weight that the codes stand for.
    """

    rows: int
    shape: tuple[int, int]
    block_size: int = 64
    transposed: bool = False
    dtype: Any = "bfloat16"
    rounded: Any = "bfloat16"


@dataclass(frozen=True)
class Choice:
    """An implementation, and what it was chosen for."""

    implementation: str
    why: str
    chip: tpu.Chip | gpu.Chip | None = None


def target() -> Target:
    """What the program that is being traced will run on."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None:
        first = jax.devices()[0]
        platform, kind = first.platform, first.device_kind
    else:
        platform, kind = device.platform, device.device_kind
    if mesh.empty:  # or described by a device alone
        return Target(platform, kind, jax.device_count() if device is None else 1)
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return Target(platform, kind, math.prod(size for size, kind in sizes if kind != AxisType.Manual))


def choose(
    product: Product, where: Target | None = None, implementation: str | None = None, interpret: bool = False
) -> Choice:
    """The implementation for a product.

    Args:
        where: what it will run on; `target()` where None.
        implementation: the one that is asked for; the best that can take the product where None.
        interpret: run the kernel as plain JAX, on any platform: the one that is asked for, or the TPU's.

    Raises:
        ValueError: an unknown implementation, or one that is asked for and cannot take the product.

    Example:
        >>> choose(Product(2048, (4096, 4096)), Target("tpu", "TPU v6 lite")).implementation
        'tpu'
        >>> choose(Product(2048, (4096, 4096)), Target("cpu", "cpu")).why
        'the product runs on cpu, and the kernels on a TPU or GPU'
        >>> choose(Product(2048, (4096, 4096)), Target("gpu", "NVIDIA H200")).why
        "the kernel was not measured on a H200 yet; to run it, ask for implementation='gpu'"
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"expected implementation among {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "xla":
        if interpret:
            raise ValueError("interpret=True runs a kernel as plain JAX, and implementation='xla' has none")
        return Choice("xla", "it was asked for")
    where = where or target()
    kernel = implementation or (where.platform if where.platform in PLATFORMS and not interpret else "tpu")
    asked = implementation is not None or interpret
    chip = _chip(kernel, where.device_kind) or (INTERPRETED[kernel] if interpret else None)
    against = None if interpret else _against_kernels(where, kernel, chip)
    if against is None and chip is not None:
        against = _against_product(product, chip) or (None if asked else _against_rows(product, chip))
    if against is None:
        place = "VMEM" if kernel == "tpu" else "registers"
        return Choice(kernel, f"the kernel decodes in {place} of {where.device_kind}", chip)
    if asked:
        raise ValueError(
            f"implementation={kernel!r} cannot take this product: {against}; leave it out to fall back to XLA"
        )
    return Choice("xla", against)


def why(product: Product, where: Target | None = None) -> str:
    """What is chosen for a product, and the reason, in a line.

    Example:
        >>> why(Product(16, (4096, 1000)), Target("tpu", "TPU v5 lite"))
        'xla: the kernel takes inputs in multiples of 64 and outputs of 128, got 4096 and 1000'
    """
    choice = choose(product, where)
    return f"{choice.implementation}: {choice.why}"


def _chip(kernel: str, device_kind: str) -> tpu.Chip | gpu.Chip | None:
    return tpu.CHIPS.get(device_kind) if kernel == "tpu" else gpu.chip_of(device_kind)


def _against_kernels(where: Target, kernel: str, chip: tpu.Chip | gpu.Chip | None) -> str | None:
    """Why the kernel cannot run there; None where it can."""
    if where.platform not in PLATFORMS:
        return f"the product runs on {where.platform}, and the kernels on a {' or '.join(PLATFORMS.values())}"
    if where.platform != kernel:
        return f"the product runs on {where.platform}, and the kernel on a {PLATFORMS[kernel]}"
    if chip is None:
        chips = ", ".join(tpu.CHIPS if kernel == "tpu" else gpu.CHIPS)
        return f"the kernel is made for {chips}, and the product runs on {where.device_kind}"
    if where.devices > 1:
        return (
            f"the compiler may partition the product over {where.devices} devices, and cannot partition a kernel; "
            "use shard_map, or jax.set_mesh with a mesh of one device"
        )
    return None


def _against_product(p: Product, chip: tpu.Chip | gpu.Chip) -> str | None:
    """Why the kernel cannot take the product; None where it can."""
    if isinstance(chip, gpu.Chip):
        return gpu.unfit(p.rows, p.shape, p.block_size, p.dtype, p.rounded)
    return tpu.unfit(chip, p.rows, p.shape, p.block_size, p.transposed, p.dtype, p.rounded)


def _against_rows(product: Product, chip: tpu.Chip | gpu.Chip) -> str | None:
    """Why XLA takes what the kernel could; None where it does not: on a TPU, whatever the rows (docs/benchmarks.md)."""
    if not isinstance(chip, gpu.Chip):
        return None
    if chip.name not in gpu.MEASURED:
        return f"the kernel was not measured on a {chip.name} yet; to run it, ask for implementation='gpu'"
    if product.rows <= gpu.ROWS[chip.name]:
        return None
    return f"beyond {gpu.ROWS[chip.name]} rows, decoding once and multiplying with cuBLAS is taken to be faster"
