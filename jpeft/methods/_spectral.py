"""What FourierFT and WaveFT have in common: a few coefficients of each matrix train, at places that a seed chooses."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.targets import first_match, refuse_unmatched
from jpeft.core.weight import matrix_sizes

__all__ = ["torch_positions"]


@dataclass(frozen=True)
class _SpectralMethod(Method):
    """
    Fields:
        n_frequency: coefficients that train, for each matrix.
        scale: of the update.
        n_frequency_pattern: `{regex: n_frequency}` on paths, first match wins; each must match an adapted site.
        seed: chooses the coefficients, for all matrices of one shape alike.
        start: of the coefficients, `"normal"` or `"zeros"`.
    """

    n_frequency: int = 1000
    scale: float = 1.0
    n_frequency_pattern: Any = ()
    seed: int = 777

    def __post_init__(self):
        super().__post_init__()
        for n in (self.n_frequency, *(value for _, value in self.n_frequency_pattern)):
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"expected a whole n_frequency >= 1, got {n} in {self}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected 0 <= seed < 2**32, got seed={self.seed}")

    def chosen(self, sites):
        chosen = super().chosen(sites)
        refuse_unmatched("n_frequency_pattern", self.n_frequency_pattern, list(chosen))
        return chosen

    def n_frequency_of(self, path: str) -> int:
        """The number of coefficients at a path, by `n_frequency_pattern`."""
        return first_match(self.n_frequency_pattern, path, self.n_frequency)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        n = self.n_frequency_of(site.path)
        if n > n_in * n_out:
            return (
                f"n_frequency {n} is above its {n_in} × {n_out} entries; "
                f"write n_frequency_pattern={{{site.path!r}: ...}}"
            )
        return None

    def _coefficients(self, key, leaf, site: Site, normal: float) -> jax.Array:
        """Where they start, (*stack, *batch, n): at N(0, normal²)."""
        lead, _, _ = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        shape = (*lead, self.n_frequency_of(site.path))
        return normal * jax.random.normal(key, shape, dtype) if normal else jnp.zeros(shape, dtype)


@functools.lru_cache(maxsize=64)
def torch_positions(seed: int, n_in: int, n_out: int, count: int) -> np.ndarray:
    """The positions (2, count), outputs first, that torch's shuffle of an [out, in] weight's entries begins with.

    Equals `torch.randperm(out * in, generator=torch.Generator().manual_seed(seed))[:count]`, without torch.
    """
    total = n_in * n_out
    twister = np.random.RandomState(seed)
    shuffle = _swapped_forward if total < (2**32 - 1) // 20 else _inserted
    flat = np.asarray(shuffle(twister, total, count), np.int64)
    return np.stack(np.divmod(flat, n_in)).astype(np.int32)


def _swapped_forward(twister, total: int, count: int) -> list[int]:
    """The start of torch's shuffle of few numbers: each place in turn is swapped with one not before it."""
    moved: dict[int, int] = {}
    shuffled = []
    for step, draw in enumerate(twister.randint(0, 2**32, size=count, dtype=np.uint32).tolist()):
        other = step + draw % (total - step)
        shuffled.append(moved.get(other, other))
        moved[other] = moved.get(step, step)
    return shuffled


def _inserted(twister, total: int, count: int) -> list[int]:
    """The start of torch's shuffle of many numbers: each in turn is put at a place so far, whose number makes room.

    The last number may still be put first, so all of them are drawn: seconds, for a matrix of that size.
    """
    shuffled = list(range(count))
    for start in range(0, total, 2**22):
        numbers = np.arange(start, min(start + 2**22, total), dtype=np.uint64)
        upper, lower = twister.randint(0, 2**32, size=(numbers.size, 2), dtype=np.uint32).astype(np.uint64).T
        places = (upper << np.uint64(32) | lower) % (numbers + np.uint64(1))
        for n in np.flatnonzero(places < count).tolist():
            place = int(places[n])
            if start + n < count:
                shuffled[start + n] = shuffled[place]
            shuffled[place] = start + n
    return shuffled
