"""The product with a packed 4-bit weight on a TPU: codes are decoded in VMEM, beside the matrix unit that uses them.

    y = x @ W,    or  y = x @ Wᵀ where `transposed`,    W[i, o] = codebook[codes[i, o]] · scales[i // block_size, o]

The grid is (blocks of outputs, blocks of rows). The first block of rows decodes the weights of its outputs, over the
whole reduction, into a bfloat16 scratch that the following ones use again: a weight is decoded once however many rows
there are, and nothing of it goes to HBM. Few rows (generating text) are one block.

A TPU looks a table up along sublanes, with a table of its own in every lane. Outputs lie along lanes and a block along
sublanes, so the table can carry the scale: 16 products for each block and output, rounded to bfloat16 where the
reference rounds, then one lookup a weight. From v6 on, 16-bit lookups reach all 16 entries; before, 32-bit ones reach
8, and a select on the code's high bit chooses between two.

The codes may be a layer of a stack, which is read in place: as an operand of its own it would first be copied out.

Shapes: x (rows, in), codes (in, out) uint4, scales (in / block_size, out) float32; y (rows, out), of `result`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["CHIPS", "TILES", "Chip", "Tile", "matmul", "tile_for", "unfit"]

LANES = 128
STRIP = 64  # rows that are decoded together: a native tile of uint4
GROUP = 8  # rows of scales that are loaded together: a native tile of float32
UNROLL = 4  # turns of the decoding loop, which the compiler overlaps
DEPTH = 4096  # of one unrolled product: longer reductions are a loop of these


@dataclass(frozen=True)
class Chip:
    """What the kernel must know of a chip: its VMEM, and the width of lookups along sublanes."""

    name: str
    vmem: int
    lookup_bits: int


CHIPS = {  # by `device_kind`
    "TPU v5 lite": Chip("v5e", 128 << 20, 32),
    "TPU v5": Chip("v5p", 64 << 20, 32),
    "TPU v6 lite": Chip("v6e", 128 << 20, 16),
}
INTERPRETED = CHIPS["TPU v6 lite"]  # the chip to play where there is none


@dataclass(frozen=True)
class Tile:
    """Rows and outputs of one step of the grid. With one buffer for codes instead of two, a step waits for them."""

    rows: int
    outputs: int
    buffers: int = 2


# The step that was found best on a chip, or on a chip for (in, out, transposed): fewest bundles for what the memory can
# stream beside them, then the shorter compile. v6e's matrix units outrun its memory unless x is used for 1024 outputs.
TILES: dict[tuple, Tile] = {
    ("v5e",): Tile(512, 512),
    ("v5p",): Tile(512, 512),
    ("v6e",): Tile(512, 1024),
}


def vmem_bytes(tile: Tile, reduction: int, block_size: int) -> int:
    """What a step holds: buffers of codes and scales, two each of x and y, the weights, the float32 sums."""
    weights, sums = tile.outputs * reduction, tile.outputs * tile.rows
    packed = weights // 2 + 4 * weights // block_size
    return tile.buffers * packed + 4 * tile.rows * reduction + 2 * weights + 12 * sums


def vmem_limit(tile: Tile, chip: Chip, reduction: int, block_size: int) -> int:
    """What a step may take, with the compiler's own scratch. In the rest XLA keeps activations between the calls."""
    return min(vmem_bytes(tile, reduction, block_size) * 5 // 4 + (4 << 20), chip.vmem * 9 // 10)


def tile_for(chip: Chip, rows: int, shape: tuple[int, ...], block_size: int, transposed: bool) -> Tile | None:
    """The tile for a weight of `shape` (in, out): the one in TILES, or the next smaller that the chip's VMEM has room
    for. None where there is none."""
    reduction, outputs = shape[::-1] if transposed else shape
    unit = GROUP * block_size if transposed else LANES  # outputs of a whole tile of scales, or of codes
    best = TILES.get((chip.name, *shape, transposed), TILES[(chip.name,)])
    halves = lambda n: [n >> k for k in range(n.bit_length()) if n >> k >= LANES]
    sizes = [Tile(r, o, buffers) for buffers in (2, 1) for o in halves(best.outputs) for r in halves(best.rows)]
    for size in sizes:
        whole = size.outputs >= outputs or (transposed and unit > size.outputs)
        across = outputs if whole else size.outputs // unit * unit
        tile = replace(size, rows=min(size.rows, rows), outputs=across)
        if vmem_bytes(tile, reduction, block_size) <= 0.85 * chip.vmem:
            return tile
    return None


def unfit(chip: Chip, rows: int, shape, block_size: int, transposed: bool, dtype, rounded) -> str | None:
    """Why the kernel cannot take a product; None where it can."""
    n_in, n_out = shape
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"the kernel multiplies in bfloat16, and the product is in {jnp.dtype(dtype).name}"
    if jnp.dtype(rounded) not in (jnp.bfloat16, jnp.float32):
        return f"the kernel decodes weights of bfloat16 or float32, and these stand for {jnp.dtype(rounded).name}"
    if block_size % 16 or n_in % block_size:
        return f"the kernel takes whole blocks of a multiple of 16, got blocks of {block_size} over {n_in} inputs"
    if n_in % STRIP or n_out % LANES:
        return f"the kernel takes inputs in multiples of {STRIP} and outputs of {LANES}, got {n_in} and {n_out}"
    if rows == 0:
        return "there are no rows"
    if tile_for(chip, max(rows, LANES), shape, block_size, transposed) is None:  # vmap may add rows
        return f"no tile of a weight of {n_in} x {n_out} fits in the {chip.vmem >> 20} MiB of {chip.name}'s VMEM"
    return None


@functools.partial(
    jax.jit, static_argnames=("chip", "codebook", "block_size", "transposed", "result", "tile", "interpret")
)
def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    layer: jax.Array | None = None,
    *,
    chip: Chip,
    codebook: tuple[float, ...],
    block_size: int = 64,
    transposed: bool = False,
    result: Any = jnp.bfloat16,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x @ W` or `x @ Wᵀ`, x (rows, in or out) bfloat16, W for what `unfit` finds nothing against.

    Args:
        layer: which layer's codes these are, where `codes` is a stack (layers, in, out); () int32.
        codebook: the 16 entries, in code order.
        tile: what one step takes; `tile_for`'s where None.
        interpret: run as plain JAX, on any platform.
    """
    stack, number = (codes[None], jnp.zeros(1, jnp.int32)) if layer is None else (codes, layer.reshape(1))
    (n_in, n_out), rows = stack.shape[1:], x.shape[0]
    tile = tile or tile_for(chip, rows, (n_in, n_out), block_size, transposed)
    assert tile is not None
    reduction, outputs = (n_out, n_in) if transposed else (n_in, n_out)
    if transposed:
        packed, of_weight = (tile.outputs, n_out), lambda o, r, layer: (o, 0)
    else:
        packed, of_weight = (n_in, tile.outputs), lambda o, r, layer: (0, o)
    of_layer = lambda o, r, layer: (layer[0], *of_weight(o, r, layer))
    table = np.tile(np.array(codebook, np.float32)[:, None], LANES)
    buffers = None if tile.buffers == 2 else pl.Buffered(tile.buffers)
    sums = [] if reduction <= DEPTH else [pltpu.VMEM((tile.rows, tile.outputs), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_step, chip.lookup_bits, block_size, transposed),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), result),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(outputs, tile.outputs), pl.cdiv(rows, tile.rows)),
            in_specs=[
                pl.BlockSpec((tile.rows, reduction), lambda o, r, layer: (r, 0)),
                pl.BlockSpec((None, *packed), of_layer, pipeline_mode=buffers),
                pl.BlockSpec((packed[0] // block_size, packed[1]), of_weight, pipeline_mode=buffers),
                pl.BlockSpec(table.shape, lambda o, r, layer: (0, 0)),
            ],
            out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda o, r, layer: (r, o)),
            scratch_shapes=[pltpu.VMEM(packed, jnp.bfloat16), *sums],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(tile, chip, reduction, block_size),
        ),
        interpret=interpret,
        name="nf4_matmul_transposed" if transposed else "nf4_matmul",
    )(number, x, stack, scales, table)


def _step(
    bits, block_size, transposed, layer_ref, x_ref, codes_ref, scales_ref, table_ref, y_ref, weights_ref, *sums_ref
):
    """One block of outputs and one of rows."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        _decode(bits, block_size, codes_ref, scales_ref, table_ref[...], weights_ref)

    def product(start, depth):
        along = pl.ds(start, depth)
        w = weights_ref[:, along] if transposed else weights_ref[along, :]
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        return lax.dot_general(x_ref[:, along], w, dims, preferred_element_type=jnp.float32)

    reduction = x_ref.shape[1]
    if not sums_ref:
        y_ref[...] = product(0, reduction).astype(y_ref.dtype)
        return
    [sums] = sums_ref
    whole = reduction // DEPTH
    sums[...] = jnp.zeros_like(sums)

    @pl.loop(0, whole)
    def _(n):
        sums[...] += product(pl.multiple_of(n * DEPTH, DEPTH), DEPTH)

    if rest := reduction - whole * DEPTH:
        sums[...] += product(whole * DEPTH, rest)
    y_ref[...] = sums[...].astype(y_ref.dtype)


def _decode(bits: int, block_size: int, codes_ref, scales_ref, table, weights_ref) -> None:
    """All of a step's weights, in loops: 128 columns by the rows of one tile of scales each time."""
    rows, columns = codes_ref.shape
    group = GROUP * block_size
    whole, across = rows // group, columns // LANES

    def decode(column, start, size, blocks):
        lanes = pl.ds(pl.multiple_of(column * LANES, LANES), LANES)
        scales = scales_ref[blocks, lanes]
        for row in range(0, size, STRIP):
            at = (pl.ds(start + row, STRIP), lanes)
            weights_ref[at] = _decode_strip(bits, block_size, codes_ref[at], scales, row, table)

    if whole:

        @pl.loop(0, across * whole, unroll=UNROLL if across * whole % UNROLL == 0 else 1)
        def _(n):
            column, g = lax.div(n, whole), lax.rem(n, whole)
            start = pl.multiple_of(g * group, STRIP)
            decode(column, start, group, pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP))

    if rest := rows - whole * group:
        blocks = pl.ds(whole * GROUP, rest // block_size)
        pl.loop(0, across)(lambda column: decode(column, whole * group, rest, blocks))


def _decode_strip(bits: int, block_size: int, codes, scales, row: int, table):
    """Weights (STRIP, LANES), bfloat16, which begin at `row` of the rows that `scales` (blocks, LANES) are for."""
    codes = codes.astype(jnp.int16 if bits == 16 else jnp.int32)
    each = 16 if bits == 16 else 8  # rows of one lookup, and entries of one table
    weights, tables = [], {}
    for start in range(0, STRIP, each):
        block = (row + start) // block_size
        if block not in tables:
            scaled = table * scales[block : block + 1]
            tables[block] = scaled.astype(jnp.bfloat16) if bits == 16 else (scaled[:8], scaled[8:])
        here, entries = codes[start : start + each], tables[block]
        if bits == 16:
            weights.append(_along_sublanes(entries, here))
        else:
            low, high = (_along_sublanes(half, here & 7) for half in entries)
            weights.append(jnp.where(here >= 8, high, low))
    return jnp.concatenate(weights).astype(jnp.bfloat16)


def _along_sublanes(table, index):
    """`take_along_axis(table, index, 0)`, which would widen a 16-bit index that must be as wide as the table."""
    dims = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, index[..., None], dims, slice_sizes=(1, 1), mode=mode)
