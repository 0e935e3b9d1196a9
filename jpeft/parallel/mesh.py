"""Meshes with named axes: what each axis means is the same everywhere in jpeft.

data      the batch is split; parameters are whole on each of its devices
fsdp      the batch is split, and so is every large array at rest; a layer's arrays are gathered where they are used
tensor    heads and feed-forward columns are split, and the work on them (Shoeybi et al. 2019, arXiv:1909.08053)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

__all__ = ["AXES", "BATCH_AXES", "make_mesh", "parse_mesh"]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=8,tensor=2"` as `{"fsdp": 8, "tensor": 2}`.

    Raises:
        ValueError: an unknown or repeated axis, or a size that is no positive number.

    >>> parse_mesh("fsdp=8,tensor=2")
    {'fsdp': 8, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name in sizes or not size.isdecimal():
            raise ValueError(f"expected a mesh as 'fsdp=8,tensor=2', each axis once, got {text!r}")
        sizes[name] = int(size)
    return _checked(sizes)


def make_mesh(
    shape: str | Mapping[str, int] | None = None,
    *,
    devices: Sequence[Any] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh with all of `AXES`, those not named of size one.

    Args:
        shape: sizes by axis, as a mapping or as `"fsdp=8,tensor=2"`; all devices along `fsdp` where None.
        devices: as many as the sizes' product; those of the process's backend where None. Neighbours on a TPU are put
            along the last axes.
        axis_type: of all axes; `Explicit` is `jax.make_mesh`'s own.

    Raises:
        ValueError: an unknown axis, or another number of devices.

    >>> make_mesh().axis_names
    ('data', 'fsdp', 'tensor')
    """
    devices = jax.devices() if devices is None else devices
    given = parse_mesh(shape) if isinstance(shape, str) else dict(shape or {"fsdp": len(devices)})
    sizes = dict.fromkeys(AXES, 1) | _checked(given)
    count = math.prod(sizes.values())
    if count != len(devices):
        raise ValueError(
            f"expected a mesh of {len(devices)} devices, got {describe(sizes)}, which has {count}; "
            f"write for example 'fsdp={len(devices)}'"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices, axis_types=(axis_type,) * len(AXES))


def describe(sizes: Mapping[str, int]) -> str:
    """A mesh's sizes as they are written: `'fsdp=8,tensor=2'`."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "fsdp=1"


def _checked(sizes: dict[str, int]) -> dict[str, int]:
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"expected mesh axes among {', '.join(AXES)}, got {', '.join(map(repr, unknown))}")
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise ValueError(f"expected a positive size for each mesh axis, got {small[0]}={sizes[small[0]]}")
    return sizes
