"""Slices of TPUs by name, for compiling without one (`NAME-CHIPS`, as `v5e-16`).

libtpu compiles for any topology on any machine. What a chip's compiler may use of its HBM is from its own message when
a program needs more (libtpu 0.0.42: jax 0.10.2).
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

__all__ = ["GENERATIONS", "Generation", "Slice", "parse_topology"]


@dataclass(frozen=True)
class Generation:
    """A kind of TPU.

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


GENERATIONS = {
    "v4": Generation("v4", 15.25, 2, 3, (16, 16, 16)),
    "v5e": Generation("v5e", 15.75, 1, 2, (16, 16)),
    "v5p": Generation("v5p", 95.74, 1, 3, (16, 16, 24)),
    "v6e": Generation("v6e", 31.25, 1, 2, (16, 16)),
    "v7x": Generation("tpu7x", 94.75, 2, 3, (16, 16, 24)),
}
LEAST = {2: (2, 2), 3: (2, 2, 1)}
"""Chips of one host, the smallest topology that libtpu takes; a slice of fewer chips uses some of them."""


@dataclass(frozen=True)
class Slice:
    """So many chips of a generation."""

    generation: str
    chips: int

    def __str__(self) -> str:
        return f"{self.generation}-{self.chips}"

    @property
    def hbm_gib(self) -> float:
        """What a program may use on one device."""
        return GENERATIONS[self.generation].hbm_gib

    @property
    def size(self) -> int:
        """JAX devices."""
        return self.chips * GENERATIONS[self.generation].devices_per_chip

    def devices(self) -> list[Any]:
        """The slice's devices, to compile for; none of them runs anything.

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

        generation = GENERATIONS[self.generation]
        shape = "x".join(map(str, _shape(generation, max(self.chips, math.prod(LEAST[generation.dimensions])))))
        found = topologies.get_topology_desc(f"{generation.name}:{shape}", platform="tpu").devices
        return list(found[: self.size])


def sizes_of(generation: str) -> list[int]:
    """The numbers of chips that a slice may have: one, and the powers of two from a host to all."""
    kind = GENERATIONS[generation]
    least, most = math.prod(LEAST[kind.dimensions]), math.prod(kind.largest)
    return [1, *(2**k for k in range(least.bit_length() - 1, most.bit_length()) if least <= 2**k <= most)]


def parse_topology(text: str) -> Slice:
    """The slice that `NAME-CHIPS` names.

    Raises:
        ValueError: an unknown name or number of chips; all that there are are listed.

    >>> parse_topology("v5e-16")
    Slice(generation='v5e', chips=16)
    """
    name, _, chips = text.partition("-")
    known = name in GENERATIONS and chips.isdecimal() and int(chips) in sizes_of(name)
    if not known:
        listed = "\n".join(f"  {n}-{{{','.join(map(str, sizes_of(n)))}}}" for n in GENERATIONS)
        raise ValueError(f"expected a topology as NAME-CHIPS, got {text!r}; there are\n{listed}")
    return Slice(name, int(chips))


def _shape(generation: Generation, chips: int) -> list[int]:
    """The most cubic torus of so many chips, short axes first, except that a host's own come first of all."""
    shape = list(LEAST[generation.dimensions])
    while math.prod(shape) < chips:
        growing = min(range(len(shape)), key=lambda k: (shape[k], -k))
        shape[growing] *= 2
    return sorted(shape) if math.prod(shape) > math.prod(LEAST[generation.dimensions]) else shape
