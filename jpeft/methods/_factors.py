"""What factors of a given rank have in common: how they start, and where they fit."""

from __future__ import annotations

import math

import jax

from jpeft.core.sites import Site
from jpeft.core.weight import matrix_sizes

__all__ = ["kaiming_uniform", "rank_problem"]


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype) -> jax.Array:
    """U(±1/√fan_in): He et al.'s start with a = √5, which PyTorch gives its layers, and LoRA its A."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def rank_problem(rank: int, site: Site) -> str | None:
    """What is wrong with a rank for a site; None where it fits."""
    _, n_in, n_out = matrix_sizes(site.shape, site.axes)
    if rank <= min(n_in, n_out):
        return None
    return f"rank {rank} is above min(in, out) = min({n_in}, {n_out}); write a smaller one, or leave the site out"


def window_of(site: Site) -> tuple[int, int]:
    """The input channels of a convolution's kernel and the size of its window; of other leaves the inputs and one."""
    _, n_in, _ = matrix_sizes(site.shape, site.axes)
    channels = n_in if site.channels is None else site.shape[site.channels]
    return channels, n_in // channels
