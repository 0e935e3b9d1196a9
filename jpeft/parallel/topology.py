"""Slices of TPUs and groups of GPUs by name, for compiling without one (`NAME-CHIPS`, as `v5e-16` or `h100-8`).

libtpu compiles for any topology on any machine, and JAX's CUDA plugin for any GPU that it has a description of
(`targets`). Memory is what one program may use on one device: of a TPU by its compiler's own message when a program
needs more (libtpu 0.0.42: jax 0.10.2); of a GPU what JAX takes at its start.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["GPU", "KINDS", "TPU", "Slice", "parse_topology", "slices_of"]


@dataclass(frozen=True)
class TPU:
    """A generation of TPUs.

    Fields:
        name: as libtpu has it.
        hbm_gib: that a program may use on one device.
        devices_per_chip: JAX devices.
        dimensions: of the torus.
        largest: chips along each of its axes.
    """

    name: str
    hbm_gib: float
    devices_per_chip: int
    dimensions: int
    largest: tuple[int, ...]

    @property
    def host(self) -> tuple[int, ...]:
        """Chips of one host, the smallest topology that libtpu takes; a slice of fewer chips uses some of them."""
        return (2, 2) if self.dimensions == 2 else (2, 2, 1)

    @property
    def sizes(self) -> list[int]:
        """The numbers of chips that a slice may have: one, and the powers of two from a host to all."""
        least, most = math.prod(self.host), math.prod(self.largest)
        return [1, *(2**k for k in range(least.bit_length() - 1, most.bit_length()) if least <= 2**k <= most)]

    def devices(self, chips: int) -> list[Any]:
        """So many chips' devices, to compile for.

        Raises:
            ModuleNotFoundError: without libtpu.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ModuleNotFoundError('compiling for TPUs takes libtpu; install it with: pip install "jpeft[tpu]"')
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # read, then overruled by the topology
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may plan at once
        from jax.experimental import topologies

        shape = "x".join(map(str, self._shape(chips)))
        found = topologies.get_topology_desc(f"{self.name}:{shape}", platform="tpu").devices
        return list(found[: chips * self.devices_per_chip])

    def _shape(self, chips: int) -> list[int]:
        """The most cubic torus of so many chips, short axes first, except that a host's own come first of all."""
        shape = list(self.host)
        while math.prod(shape) < chips:
            growing = min(range(len(shape)), key=lambda k: (shape[k], -k))
            shape[growing] *= 2
        return sorted(shape) if math.prod(shape) > math.prod(self.host) else shape


@dataclass(frozen=True)
class GPU:
    """A model of GPU, in nodes whose GPUs reach each other directly.

    Fields:
        target: the file in `targets` that describes it to the compiler.
        node: GPUs of one host.
        nodes: at most.
    """

    target: str
    node: int = 8
    nodes: int = 32
    devices_per_chip: int = 1

    @property
    def hbm_gib(self) -> float:
        """What JAX takes of the memory that the driver shows: the part `XLA_CLIENT_MEM_FRACTION`, three quarters where
        that is not set (as when the program runs, `jaxlib.xla_client`)."""
        found = re.search(r"device_memory_size: (\d+)", self.description())
        assert found is not None
        return float(os.environ.get("XLA_CLIENT_MEM_FRACTION") or 0.75) * int(found[1]) / 2**30

    @property
    def sizes(self) -> list[int]:
        """The powers of two from one GPU to all nodes."""
        return [2**k for k in range((self.node * self.nodes).bit_length())]

    def description(self) -> str:
        """The GPU, as the compiler reads it."""
        return (Path(__file__).parent / "targets" / self.target).read_text(encoding="utf-8")

    def devices(self, chips: int) -> list[Any]:
        """So many GPUs, to compile for; those of a node are neighbours.

        Raises:
            ModuleNotFoundError: without JAX's CUDA plugin.
            RuntimeError: where JAX has started without it.
        """
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise ModuleNotFoundError(
                'compiling for GPUs takes JAX\'s CUDA plugin; install it with: pip install "jax[cuda13]"'
            )
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks the driver, and there need be none
        from jax.experimental import topologies

        each = min(chips, self.node)
        shape = f"1x{chips // each}x{each}"  # of partitions, hosts, GPUs
        try:
            described = topologies.get_topology_desc(platform="cuda", target_config=self.description(), topology=shape)
        except RuntimeError as error:
            raise RuntimeError(
                f"JAX describes no such GPUs ({error}); if it started without its CUDA plugin, which found no driver: "
                "ask for a GPU's devices before anything runs, or set JAX_PLATFORMS=cpu"
            ) from error
        return list(described.devices)


KINDS = {
    "v4": TPU("v4", 15.25, 2, 3, (16, 16, 16)),
    "v5e": TPU("v5e", 15.75, 1, 2, (16, 16)),
    "v5p": TPU("v5p", 95.74, 1, 3, (16, 16, 24)),
    "v6e": TPU("v6e", 31.25, 1, 2, (16, 16)),
    "v7x": TPU("tpu7x", 94.75, 2, 3, (16, 16, 24)),
    "a100": GPU("a100.txtpb"),
    "h100": GPU("h100.txtpb"),
    "b200": GPU("b200.txtpb"),
}


@dataclass(frozen=True)
class Slice:
    """So many chips of a kind."""

    kind: str
    chips: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.chips}"

    @property
    def hbm_gib(self) -> float:
        """What a program may use on one device."""
        return KINDS[self.kind].hbm_gib

    @property
    def size(self) -> int:
        """JAX devices."""
        return self.chips * KINDS[self.kind].devices_per_chip

    def devices(self) -> list[Any]:
        """The slice's devices, to compile for; none of them runs anything.

        Raises:
            ModuleNotFoundError: without what compiles for them.
        """
        return KINDS[self.kind].devices(self.chips)


def slices_of(kind: str) -> list[Slice]:
    """All slices of a kind, the smallest first."""
    return [Slice(kind, chips) for chips in KINDS[kind].sizes]


def parse_topology(text: str) -> Slice:
    """The slice that `NAME-CHIPS` names.

    Raises:
        ValueError: an unknown name or number of chips; all that there are are listed.

    >>> parse_topology("v5e-16")
    Slice(kind='v5e', chips=16)
    >>> parse_topology("h100-8").hbm_gib < 80
    True
    """
    name, _, chips = text.partition("-")
    if name not in KINDS or not chips.isdecimal() or int(chips) not in KINDS[name].sizes:
        listed = "\n".join(f"  {n}-{{{','.join(map(str, kind.sizes))}}}" for n, kind in KINDS.items())
        raise ValueError(f"expected a topology as NAME-CHIPS, got {text!r}; there are\n{listed}")
    return Slice(name, int(chips))
