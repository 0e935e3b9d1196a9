"""Blockwise 4-bit weights in plain JAX: the CPU path, the fallback and the oracle. Equal to bitsandbytes to the bit.

    scales[b, o] = max |W[i, o]| over the rows i of block b,       codes[i, o] = nearest entry to W[i, o] / scales[b, o]
    W[i, o]      = codebook[codes[i, o]] · scales[i // block_size, o]

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4 has the quantiles of a normal distribution for entries; double
quantization stores the scales in 8 bits, in groups of 256 around their mean:

    scales[b, o] = dynamic[codes[b, o]] · nested[(o·blocks + b) // 256] + offset

Shapes: W and codes (*lead, in, out), uint4; scales (*lead, blocks, out), float32, or uint8 where they are codes
themselves; nested (*lead, groups), offset (*lead,). Blocks run along the inputs and the last may be shorter; the groups
of scales run output by output. So where the block size divides the inputs, blocks and groups are those of bitsandbytes,
which run along a flattened torch weight (out, in); a flattened weight is here the matrix (n, 1).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "CODEBOOKS",
    "DYNAMIC",
    "decode",
    "dequantize",
    "dequantize_scales",
    "from_bitsandbytes",
    "lookup",
    "pack",
    "quantize",
    "quantize_scales",
    "spread",
    "to_bitsandbytes",
    "unpack",
]

GROUP = 256  # scales that share a nested scale

_NF4 = """-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1"""
_FP4 = "0 0.0052083334885537624 0.6666666865348816 1 0.3333333432674408 0.5 0.1666666716337204 0.25"

CODEBOOKS = {"nf4": np.array(_NF4.split(), np.float32), "fp4": np.array(_FP4.split(), np.float32)}
CODEBOOKS["fp4"] = np.concatenate([CODEBOOKS["fp4"], -CODEBOOKS["fp4"]]) + np.float32(0)  # its sign is the high bit


def _dynamic_map() -> np.ndarray:
    """The signed 8-bit map: for each of seven decades as many linear steps as fit, both signs, and 0 and 1.

    The steps are computed as torch's vectorised `linspace` does, from both ends with one rounding.
    """
    f32 = np.float32
    values = [f32(0), f32(1)]
    for decade in range(7):
        last = 2**decade
        step = float(f32((f32(1) - f32(0.1)) / f32(last)))
        n = np.arange(last + 1)
        ends = np.where(n < (last + 1) // 2, float(f32(0.1)) + step * n, 1 - step * (last - n)).astype(f32)
        means = f32(10.0 ** (decade - 6)) * ((ends[:-1] + ends[1:]) / f32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, f32))


DYNAMIC = _dynamic_map()


@functools.partial(jax.jit, static_argnames=("block_size", "codebook"))
def quantize(matrix: jax.Array, *, block_size: int = 64, codebook: str = "nf4") -> tuple[jax.Array, jax.Array]:
    """`(codes, scales)` of a matrix. Values that are not finite make scales that are not finite."""
    scaled, scales = _scaled(matrix.astype(jnp.float32), block_size)
    return _nearest(scaled, CODEBOOKS[codebook]).astype(jnp.uint4), scales


@functools.partial(jax.jit, static_argnames=("block_size", "codebook", "dtype"))
def dequantize(
    codes, scales, nested=None, offset=None, *, block_size: int = 64, codebook: str = "nf4", dtype=jnp.float32
) -> jax.Array:
    """The matrix: a float32 product, rounded once to `dtype`."""
    return decode(codes, scales, nested, offset, block_size=block_size, codebook=codebook).astype(dtype)


@jax.jit
def quantize_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(codes, nested, offset)`: float32 scales (*lead, blocks, out) in 8 bits."""
    flat = scales.mT.reshape(*scales.shape[:-2], -1)
    offset = flat.mean(-1)
    scaled, nested = _scaled((flat - offset[..., None])[..., None], GROUP)
    bounds = (DYNAMIC[:-1] + DYNAMIC[1:]) / np.float32(2)
    codes = jnp.searchsorted(jnp.asarray(bounds), scaled[..., 0], side="left").astype(jnp.uint8)
    return codes.reshape(scales.mT.shape).mT, nested[..., 0], offset


def dequantize_scales(codes: jax.Array, nested: jax.Array, offset: jax.Array, table: np.ndarray = DYNAMIC) -> jax.Array:
    """The inverse of `quantize_scales`, float32. `table` is the 8-bit codebook."""
    each = spread(nested[..., None], GROUP, codes.shape[-2] * codes.shape[-1])
    gathered = lambda codes: jnp.asarray(table)[codes]
    if table is DYNAMIC:  # a TPU gathers 4 KiB for each code
        scaled = lax.platform_dependent(codes, tpu=_dynamic, default=gathered)
    else:
        scaled = gathered(codes)
    return scaled * each.reshape(codes.mT.shape).mT + offset[..., None, None]


def decode(codes, scales, nested=None, offset=None, *, block_size: int = 64, codebook: str = "nf4") -> jax.Array:
    """As `dequantize` in float32, to be fused into what uses it: two-dimensional throughout, no table in memory."""
    if nested is not None and offset is not None:
        scales = dequantize_scales(scales, nested, offset)
    return lookup(codes, CODEBOOKS[codebook]) * spread(scales, block_size, codes.shape[-2])


def lookup(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` as a tree of selects on the bits: it fuses, where a lookup does not. A table of 2ⁿ entries; of the
    codes the lowest n bits count."""
    wide = codes.astype(jnp.int32)
    # The entries hang on the codes, or the gradient of a scan would hoist dense constants out of the loop.
    zero = (wide & jnp.int32(0)).astype(table.dtype)
    level = [zero + entry for entry in table]
    for bit in range(len(table).bit_length() - 1):
        is_set = (wide & jnp.int32(1 << bit)) != 0
        level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _dynamic(codes: jax.Array) -> jax.Array:
    """`DYNAMIC[codes]` of half the selects: but for the 1 at its end, the map is odd about the zero in its middle."""
    middle = len(DYNAMIC) // 2 - 1
    place = codes.astype(jnp.int32) - middle
    size = lookup(jnp.abs(place), DYNAMIC[middle:-1])
    return jnp.where(place > middle, np.float32(1), jnp.where(place < 0, -size, size))


def spread(scales: jax.Array, block_size: int, rows: int) -> jax.Array:
    """Scales (*lead, blocks, out), one for each row of their blocks: (*lead, rows, out)."""
    *lead, blocks, out = scales.shape
    each = jnp.broadcast_to(scales[..., :, None, :], (*lead, blocks, block_size, out))
    return each.reshape(*lead, blocks * block_size, out)[..., :rows, :]


def _scaled(matrix, block_size: int):
    """`(matrix / scales, scales)`: each block of rows within [-1, 1], float32. The zeros that fill the last block up
    do not show. Full blocks are multiplied with a reciprocal and a last shorter one is divided, as in bitsandbytes."""
    *lead, rows, out = matrix.shape
    blocks = -(-rows // block_size)
    filled = jnp.pad(matrix, [*[(0, 0)] * len(lead), (0, blocks * block_size - rows), (0, 0)])
    filled = filled.reshape(*lead, blocks, block_size, out)
    scales = jnp.abs(filled).max(-2)
    divisor = jnp.maximum(scales, np.finfo(np.float32).tiny)[..., None, :]
    scaled = filled * (np.float32(1) / divisor)
    if rows % block_size:
        is_last = (jnp.arange(blocks) == blocks - 1)[:, None, None]
        scaled = jnp.where(is_last, filled / divisor, scaled)
    scaled = jnp.clip(scaled, np.float32(-1), np.float32(1))
    return scaled.reshape(*lead, blocks * block_size, out)[..., :rows, :], scales


def _nearest(scaled, table: np.ndarray):
    """Codes of the nearest entries; halfway goes to the lower value."""
    order = np.argsort(table, kind="stable")
    bounds = (table[order][:-1] + table[order][1:]) / np.float32(2)
    place = sum((scaled > bound).astype(jnp.int32) for bound in bounds)
    return place if (order == np.arange(16)).all() else jnp.asarray(order, jnp.int32)[place]


def pack(codes: jax.Array, fill: int = 7) -> jax.Array:
    """Codes (n,) as bytes (ceil(n / 2),), the first of each two in the high half; `fill` makes an even number."""
    codes = jnp.pad(codes.astype(jnp.uint8), (0, codes.size % 2), constant_values=fill)
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: jax.Array, n: int) -> jax.Array:
    """The inverse of `pack`: n codes."""
    return jnp.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n].astype(jnp.uint4)


def to_bitsandbytes(codes: jax.Array, scales: jax.Array, block_size: int = 64) -> tuple[jax.Array, jax.Array]:
    """`(packed, absmax)` of bitsandbytes, for the transposed weight (out, in), from codes (in, out) and scales of
    any dtype: packed (n / 2, 1), absmax (n / block_size,).

    Raises:
        ValueError: blocks that would run from one output into the next.
    """
    _refuse_crossing(codes.shape[0], block_size)
    return pack(codes.T.reshape(-1))[:, None], scales.T.reshape(-1)


def from_bitsandbytes(packed: jax.Array, absmax: jax.Array, shape, block_size: int = 64) -> tuple[jax.Array, jax.Array]:
    """The inverse of `to_bitsandbytes`, for a torch weight of shape (out, in).

    Raises:
        ValueError: blocks that run from one output into the next.
    """
    rows, columns = shape
    _refuse_crossing(columns, block_size)
    return unpack(packed.reshape(-1), rows * columns).reshape(shape).T, absmax.reshape(rows, -1).T


def _refuse_crossing(inputs: int, block_size: int) -> None:
    if inputs % block_size:
        raise ValueError(
            f"blocks of {block_size} over {inputs} inputs run from one output into the next in bitsandbytes' flattened "
            f"weight and have no like along the inputs; expected a block size that divides {inputs}"
        )
