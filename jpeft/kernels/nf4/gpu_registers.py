"""A tile of 4-bit codes decoded in the registers of a warpgroup (128 threads), exactly as `reference` decodes it.

**Lookup.** A weight is bfloat16(float32 table · float32 scale), to the bit. Sixteen float32 entries lie in the lanes of
a warp, one each, twice; a weight is one shuffle whose source lane is its code (the shuffle reads four bits of a word of
eight codes, so a shift is all the unpacking), one multiplication by its scale and half a packing to bfloat16. A tree of
fifteen selects, the same thing in Pallas's own operations, takes five times the instructions; a gather Pallas does not
have there. The simulation knows no shuffle, so there it is the tree that runs.

**Order.** WGMMA wants four neighbours along the reduction and two rows of its first operand in a thread; codes come
eight outputs to a word. Instead of exchanging codes between threads, each thread calls the ones that it has by the
names that WGMMA expects: its rows, or the order of its summation, are permuted, `renamed` is that permutation, and what
is multiplied with it is permuted to match.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.kernels.nf4 import reference

__all__ = ["ACROSS", "STRIP", "Order", "decoded", "layouts", "renamed", "restored", "sources"]

STRIP = 64  # inputs of a tile: a block of any multiple has one scale for all of them
ACROSS = 256  # outputs of a tile: 128 bytes of codes, what shared memory takes in one turn


class Order(enum.Enum):
    """What a decoded tile is for.

    Fields:
        LYING: the tile (STRIP, ACROSS) as it lies.
        ROWS: the first operand of WGMMA (ACROSS, STRIP): outputs are its rows, inputs are summed over.
        SUMS: the first operand of WGMMA (STRIP, ACROSS): inputs are its rows, outputs are summed over.
    """

    LYING = enum.auto()
    ROWS = enum.auto()
    SUMS = enum.auto()


def renamed(tile: Any, order: Order) -> Any:
    """The last axis of a tile (*lead, a multiple of ACROSS), its outputs, in the order in which they are called.

    SUMS: of each 32 outputs, the eight that a thread has stand for the 2t, 2t+1, 2t+8 and 2t+9 of two products along 16
    of the reduction. ROWS: of each 256, the eight that a thread has stand for two rows, 8 apart, of four products of
    64 rows.
    """
    *lead, outputs = tile.shape
    if order is Order.SUMS:
        by_thread = tile.reshape(*lead, -1, 4, 2, 2, 2)  # (thread, product, half of it, one of two)
        tile = by_thread.swapaxes(-4, -3).swapaxes(-3, -2)
    elif order is Order.ROWS:
        by_thread = tile.reshape(*lead, -1, 4, 8, 4, 2)  # (warp, thread, product, row of two)
        tile = by_thread.swapaxes(-3, -2).swapaxes(-4, -3).swapaxes(-2, -1)
    return tile.reshape(*lead, outputs)


def restored(tile: Any) -> Any:
    """The inverse of `renamed` for ROWS."""
    *lead, outputs = tile.shape
    by_product = tile.reshape(*lead, -1, 4, 4, 2, 8)
    return by_product.swapaxes(-2, -1).swapaxes(-4, -3).swapaxes(-3, -2).reshape(*lead, outputs)


def decoded(codes, scales, codebook: tuple[float, ...], order: Order, interpret: bool):
    """Weights, bfloat16, of the shape and in the order of `order`, from references to codes (STRIP, ACROSS) and scales
    (1, ACROSS). To be called in the body of a kernel."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    table = np.array(codebook, np.float32)
    if interpret:
        weights = (reference.lookup(codes[...], table) * scales[...]).astype(jnp.bfloat16)
        return _turned(renamed(weights, order), order)
    held, scaled, wanted = layouts(order)
    shape = _turned(np.empty((STRIP, ACROSS)), order).shape
    decode = plgpu.inline_mgpu(
        arg_types=(held, scaled), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=wanted)
    )(functools.partial(_decode, table, order, wanted))
    codes = _load(codes, (slice(None), slice(None)), layout=held)
    return decode(codes, _load(scales, (0, slice(None)), layout=scaled))


def _turned(tile, order: Order):
    return tile.T if order is Order.ROWS else tile


def layouts(order: Order) -> tuple[Any, Any, Any]:
    """Which codes (STRIP, ACROSS) and which of their scales (ACROSS,) a thread has, eight neighbouring outputs each,
    and which weights it hands over: the warps share inputs where those are rows, and outputs where those are."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, replicated = plgpu.Layout.TILED, plgpu.Replicated
    if order is Order.ROWS:
        held = plgpu.Tiling(
            ((16, ACROSS), (8, 64), (2, 8))
        )  # (half, warp, thread, four threads, one of two, neighbour)
        scaled = plgpu.Tiling(((ACROSS,), (64,), (8,), (4,)))  # (warp, four threads, half of its neighbours, neighbour)
        by_four = layout(scaled, warp_dims=(-4,), lane_dims=(-3, replicated(4)), vector_dim=-1)
        return layout(held, warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1), by_four, plgpu.Layout.WGMMA
    held = plgpu.Layout.WGMMA_UPCAST_4X
    scaled = plgpu.Tiling(((32,), (8,), (4,)))  # (thread, half of its neighbours, neighbour)
    by_thread = layout(scaled, warp_dims=(replicated(4),), lane_dims=(replicated(8), -3), vector_dim=-1)
    return held, by_thread, plgpu.Layout.WGMMA if order is Order.SUMS else held


def _decode(table: np.ndarray, order: Order, wanted, _, codes, scales):
    """`decoded` on the registers of a thread, as Mosaic keeps them."""
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda n: arith.constant(i32, ir.IntegerAttr.get(i32, n))
    position = lambda n: {"dynamic_position": [], "static_position": ir.DenseI64ArrayAttr.get([n])}

    lane = utils.thread_idx()
    entries = [arith.constant(f32, ir.FloatAttr.get(f32, float(entry))) for entry in table]
    for bit in range(4):  # the lane's own entry
        is_set = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, constant(1 << bit)), constant(0))
        entries = [arith.select(is_set, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    [entry] = entries
    words = {n: utils.bitcast(word, i32) for n, word in np.ndenumerate(codes.registers)}

    def weight(word, neighbour, scale, element):
        code = arith.shrui(words[word], constant(4 * neighbour)) if neighbour else words[word]
        return arith.mulf(_shuffle(entry, code), vector.extract(scales.registers[scale], **position(element)))

    layout, shape = wanted.to_mgpu(), _turned(np.empty((STRIP, ACROSS)), order).shape
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    for n, each in sources(order, codes.layout, scales.layout, layout).items():
        weights = llvm.mlir_undef(ir.VectorType.get((len(each),), f32))
        for one, source in enumerate(each):
            weights = vector.insert(weight(*source), weights, **position(one))
        registers[n] = arith.truncf(ir.VectorType.get((len(each),), ir.BF16Type.get()), weights)
    return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def sources(order: Order, held, scaled, wanted) -> dict[tuple, list[tuple]]:
    """What a thread makes each of the wanted registers from: for each of its weights (register of codes, which of the
    eight in it, register of scales, which of the four in it), the same for every thread."""
    words = {at: n for n, at in _places(held, (STRIP, ACROSS))}
    scales = {at: n for n, at in _places(scaled, (ACROSS,))}
    named = _turned(renamed(np.arange(STRIP * ACROSS).reshape(STRIP, ACROSS), order), order)

    def source(name):
        strip, output = divmod(int(name), ACROSS)
        return words[strip, output // 8 * 8], output % 8, scales[output // 4 * 4,], output % 4

    each = range(wanted.vector_length)
    return {n: [source(named[m, k + one]) for one in each] for n, (m, k) in _places(wanted, named.shape)}


def _places(layout, shape):
    """`(register, coordinates of its first element)` for the first thread of a warpgroup."""
    strides = layout.tiling.tile_strides(tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
    for n in np.ndindex(*layout.registers_shape(shape)):
        at = np.unravel_index(sum(i * stride for i, stride in zip(n, strides, strict=True)), shape)
        yield n, tuple(int(i) for i in at)


def _shuffle(value, lane):
    """The value of the lane of this half of a warp that the lowest four bits of `lane` say: the operand after it holds
    the lanes that a shuffle stays among (bits 8 to 12) and the last of them."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, nvvm

    i32 = ir.IntegerType.get_signless(32)
    everyone, half = (arith.constant(i32, ir.IntegerAttr.get(i32, n)) for n in (-1, 0x101F))
    operands = everyone, value, lane, half, nvvm.ShflKind.idx
    if typed := getattr(utils, "nvvm_shfl_sync", None):  # JAX 0.10: the type of the result comes first
        return typed(value.type, *operands)
    return nvvm.shfl_sync(*operands)


def _load(tile, index, layout):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load
    if "idx" in inspect.signature(load).parameters:  # JAX 0.10
        return load(tile, index, layout=layout)
    return load(tile.at[index], layout=layout)
