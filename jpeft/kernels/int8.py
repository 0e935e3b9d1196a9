"""Weights in 8 bits with one scale for each output, as bitsandbytes has them. Plain JAX.

    absmax[o] = max |W[i, o]|,    codes[i, o] = round(W[i, o]·127 / absmax[o])
    W[i, o]   = codes[i, o]·absmax[o] / 127

Shapes: W and codes (*lead, in, out), int8; absmax (*lead, out), float32.
Source: LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339), its weights without the outliers of the activations.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["decode", "dequantize", "quantize"]


@jax.jit
def quantize(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(codes, absmax)`. Values that are not finite make an absmax that is not finite; halfway goes to even codes."""
    matrix = matrix.astype(jnp.float32)
    absmax = jnp.abs(matrix).max(-2)
    factor = np.float32(1) / jnp.maximum(absmax, np.finfo(np.float32).tiny) * np.float32(127)
    return jnp.round(matrix * factor[..., None, :]).astype(jnp.int8), absmax


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(codes: jax.Array, absmax: jax.Array, dtype=jnp.float32) -> jax.Array:
    """The matrix, computed in float32 and rounded once to `dtype`."""
    return decode(codes, absmax).astype(dtype)


def decode(codes: jax.Array, absmax: jax.Array) -> jax.Array:
    """As `dequantize` in float32, to be fused into what uses it."""
    return codes.astype(jnp.float32) * absmax[..., None, :] * np.float32(1 / 127)
