"""Which implementation takes a product with a packed weight, decided while it is traced, and why.

    "xla"    plain JAX, everywhere: the CPU path, the fallback, the oracle
    "tpu"    `tpu.matmul`, a Pallas kernel

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

from jpeft.kernels.nf4 import tpu

__all__ = ["IMPLEMENTATIONS", "Choice", "Product", "Target", "choose", "target", "why"]

IMPLEMENTATIONS = ("xla", "tpu")


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
    chip: tpu.Chip | None = None


def target() -> Target:
    """What the program that is being traced will run on."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        first = jax.devices()[0]
        platform, kind = first.platform, first.device_kind
    else:
        platform, kind = device.platform, device.device_kind
    if mesh.empty:
        return Target(platform, kind, jax.device_count())
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return Target(platform, kind, math.prod(size for size, kind in sizes if kind != AxisType.Manual))


def choose(
    product: Product, where: Target | None = None, implementation: str | None = None, interpret: bool = False
) -> Choice:
    """The implementation for a product.

    Args:
        where: what it will run on; `target()` where None.
        implementation: the one that is asked for; the best that can take the product where None.
        interpret: run the kernel as plain JAX, on any platform.

    Raises:
        ValueError: an unknown implementation, or one that is asked for and cannot take the product.

    Example:
        >>> choose(Product(2048, (4096, 4096)), Target("tpu", "TPU v6 lite")).implementation
        'tpu'
        >>> choose(Product(2048, (4096, 4096)), Target("cpu", "cpu")).why
        'the product runs on cpu, and the kernel on a TPU'
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"expected implementation among {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "xla":
        if interpret:
            raise ValueError("interpret=True runs a kernel as plain JAX, and implementation='xla' has none")
        return Choice("xla", "it was asked for")
    where = where or target()
    chip = tpu.CHIPS.get(where.device_kind, tpu.INTERPRETED if interpret else None)
    against = None if interpret else _against_kernels(where, chip)
    if against is None and chip is not None:
        p = product
        against = tpu.unfit(chip, p.rows, p.shape, p.block_size, p.transposed, p.dtype, p.rounded)
    if against is None:
        return Choice("tpu", f"the kernel decodes in VMEM of {where.device_kind}", chip)
    if implementation == "tpu" or interpret:
        raise ValueError(f"implementation='tpu' cannot take this product: {against}; leave it out to fall back to XLA")
    return Choice("xla", against)


def why(product: Product, where: Target | None = None) -> str:
    """What is chosen for a product, and the reason, in a line.

    Example:
        >>> why(Product(16, (4096, 1000)), Target("tpu", "TPU v5 lite"))
        'xla: the kernel takes inputs in multiples of 64 and outputs of 128, got 4096 and 1000'
    """
    choice = choose(product, where)
    return f"{choice.implementation}: {choice.why}"


def _against_kernels(where: Target, chip: tpu.Chip | None) -> str | None:
    """Why no kernel can run there; None where one can."""
    if where.platform != "tpu":
        return f"the product runs on {where.platform}, and the kernel on a TPU"
    if chip is None:
        return f"the kernel is made for {', '.join(tpu.CHIPS)}, and the product runs on {where.device_kind}"
    if where.devices > 1:
        return (
            f"the compiler may partition the product over {where.devices} devices, and cannot partition a kernel; "
            "use shard_map, or jax.set_mesh with a mesh of one device"
        )
    return None
