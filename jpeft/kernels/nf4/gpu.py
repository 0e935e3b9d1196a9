"""The product with a packed 4-bit weight on a GPU of the Hopper generation: few rows, codes decoded in registers.

    y = x @ W,    or  y = x @ Wᵀ where `transposed`,    W[i, o] = codebook[codes[i, o]] · scales[i // block_size, o]

A warpgroup takes STRIP inputs by ACROSS outputs of the codes at a time, which the copy engine brings to shared memory a
few steps ahead, decodes them in registers and multiplies from there: `yᵀ += A @ xᵀ` by WGMMA, where A is the decoded
tile (transposed product) or its transpose (forward). So no weight is written anywhere, and the few rows are the narrow
side of the product. The grid is (tiles of y's columns, pieces of the reduction, tiles of rows); the pieces' float32
sums are added by XLA, in the same order every time.

**Lookup.** A weight must be bfloat16(float32 table · float32 scale), to the bit, and the memory brings 8 weights in the
time of 30 to 40 instructions of a lane. Sixteen float32 entries lie in the lanes of a warp, one each, and a weight is
one shuffle whose source lane is its code (the shuffle reads four bits of a word of eight codes, so a shift is all the
unpacking), one multiplication by its scale and half a packing to bfloat16. A tree of fifteen selects, the same thing in
Pallas's own operations, takes four times the instructions; a gather Pallas does not have there.

**Layout.** WGMMA wants four values of the reduction and two of y's columns in a thread; codes come eight outputs to a
word. Instead of exchanging codes between threads, each thread calls the ones that it has by the names that WGMMA
expects: y's columns (forward) or the order of summation (transposed) are permuted, `renamed` is that permutation, and
the few rows of x or y are permuted outside to match.

**Many rows** are XLA's: it decodes in one fusion and multiplies with cuBLAS. `ROWS` says from where on.

Only compute capability 9.0 has these instructions: compiling the kernel for an A100 aborts the process, and Blackwell
has other ones. So it is made for the device kinds in `CHIPS` and refused for all others.

Shapes: x (rows, in), codes (in, out) uint4, scales (in / block_size, out) float32; y (rows, out), of `result`.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from jpeft.kernels.nf4 import reference

__all__ = ["CHIPS", "ROWS", "TILES", "Chip", "Tile", "chip_of", "matmul", "renamed", "tile_for", "unfit"]

STRIP = 64  # inputs of one step: a block has the same scales over all of them
ACROSS = 256  # outputs of one step: eight to a thread in a group of four, sixteen bytes at a time in shared memory
WIDTHS = (8, 16, 32, 64)  # rows of one tile, by what there are: more of them leave no registers


@dataclass(frozen=True)
class Chip:
    """What the kernel must know of a chip: how many multiprocessors there are to keep busy."""

    name: str
    cores: int


CHIPS = {  # by a word of `device_kind`, as in "NVIDIA H100 80GB HBM3"
    "H100": Chip("H100", 132),
    "H800": Chip("H100", 132),
    "H200": Chip("H200", 132),
    "GH200": Chip("H200", 132),
}
INTERPRETED = CHIPS["H100"]  # the chip to play where there is none


@dataclass(frozen=True)
class Tile:
    """Rows of a tile, pieces of the reduction, and steps of it that are copied ahead."""

    rows: int
    pieces: int
    ahead: int = 4


# The tile that was found best on a chip for (in, out, transposed), for any rows; others are computed by `tile_for`.
# None was measured yet: `scripts/bench/nf4.py tiles` fills this table on a GPU.
TILES: dict[tuple, Tile] = {}

# Rows up to which the kernel takes a product, by chip. **Derived, not yet measured**: a pass over the weights with 64
# rows takes four to five instructions a weight (docs/benchmarks.md), and XLA writes and reads each weight in bfloat16
# besides, about 4.6 bytes of traffic where a pass has 0.6; four passes are half of that. `scripts/bench/nf4.py gpu` on
# a GPU gives the crossover.
ROWS = {"H100": 256, "H200": 256}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device kind; None where the kernel must not be compiled.

    Example:
        >>> chip_of("NVIDIA H100 80GB HBM3").name, chip_of("NVIDIA A100-SXM4-80GB")
        ('H100', None)
    """
    return next((CHIPS[word] for word in device_kind.split() if word in CHIPS), None)


def tile_for(chip: Chip, rows: int, shape: tuple[int, ...], transposed: bool) -> Tile:
    """The tile in TILES, or one with as few pieces as give every multiprocessor its share, each of two steps or more:
    two tiles, which hide each other's waits, or one of many rows, whose sums would be more to move than the weights."""
    width = next(n for n in WIDTHS if n >= min(rows, WIDTHS[-1]))
    if found := TILES.get((chip.name, *shape, transposed)):
        return Tile(width, found.pieces, found.ahead)
    columns, steps = _steps(shape, transposed)
    share = 0.9 * chip.cores * (2 if width <= 16 else 1)
    whole = [n for n in range(1, max(steps // 2, 1) + 1) if steps % n == 0]
    pieces = next((n for n in whole if n * columns * -(-rows // width) >= share), whole[-1])
    return Tile(width, pieces)


def _steps(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """`(tiles of y's columns, steps of the reduction)`."""
    strips, across = shape[0] // STRIP, shape[1] // ACROSS
    return (strips, across) if transposed else (across, strips)


def unfit(rows: int, shape, block_size: int, dtype, rounded) -> str | None:
    """Why the kernel cannot take a product; None where it can."""
    n_in, n_out = shape
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"the kernel multiplies in bfloat16, and the product is in {jnp.dtype(dtype).name}"
    if jnp.dtype(rounded) not in (jnp.bfloat16, jnp.float32):
        return f"the kernel decodes weights of bfloat16 or float32, and these stand for {jnp.dtype(rounded).name}"
    if block_size % STRIP or n_in % block_size:
        return f"the kernel takes whole blocks of a multiple of {STRIP}, got blocks of {block_size} over {n_in} inputs"
    if n_out % ACROSS:
        return f"the kernel takes outputs in multiples of {ACROSS}, got {n_out}"
    if rows == 0:
        return "there are no rows"
    return None


@functools.partial(
    jax.jit, static_argnames=("chip", "codebook", "block_size", "transposed", "result", "tile", "interpret")
)
def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    chip: Chip,
    codebook: tuple[float, ...],
    block_size: int = 64,
    transposed: bool = False,
    result: Any = jnp.bfloat16,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x @ W` or `x @ Wᵀ`, x (rows, in or out) bfloat16, for shapes that `unfit` finds nothing against.

    Args:
        codebook: the 16 entries, in code order.
        tile: what one tile takes; `tile_for`'s where None.
        interpret: run as plain JAX, on any platform.
    """
    (n_in, n_out), rows = codes.shape, x.shape[0]
    tile = tile or tile_for(chip, rows, codes.shape, transposed)
    columns = n_in if transposed else n_out
    tiles, steps = _steps(codes.shape, transposed)
    assert steps % tile.pieces == 0, (tile, codes.shape)
    high = -(-rows // tile.rows)
    x = jnp.pad(x, ((0, high * tile.rows - rows), (0, 0)))
    if transposed:
        x = renamed(x, transposed)
    call = _Call(tuple(codebook), block_size, transposed, tile, steps // tile.pieces, interpret)
    sums = jax.ShapeDtypeStruct((tile.pieces, columns, high * tile.rows), jnp.float32)
    y = _run(call, sums, (tiles, tile.pieces, high), x, codes, scales).sum(0).T[:rows]
    return (y if transposed else _unrenamed(y)).astype(result)


def renamed(tile: Any, transposed: bool) -> Any:
    """The last axis of a decoded tile, its outputs, in the order in which the kernel calls them.

    Transposed: of each 32 outputs, the eight that a thread has stand for the 2t, 2t+1, 2t+8 and 2t+9 of two products
    along 16 of the reduction. Forward: of each 256, the eight that a thread has stand for two rows, 8 apart, of four
    products of 64 of y's columns.
    """
    *lead, outputs = tile.shape
    if transposed:
        by_thread = tile.reshape(*lead, -1, 4, 2, 2, 2)  # (thread, product, half of it, one of two)
        return by_thread.swapaxes(-4, -3).swapaxes(-3, -2).reshape(*lead, outputs)
    by_thread = tile.reshape(*lead, -1, 4, 8, 4, 2)  # (warp, thread, product, row of two)
    return by_thread.swapaxes(-3, -2).swapaxes(-4, -3).swapaxes(-2, -1).reshape(*lead, outputs)


def _unrenamed(tile):
    """The inverse of `renamed`, forward."""
    *lead, outputs = tile.shape
    by_product = tile.reshape(*lead, -1, 4, 4, 2, 8)
    return by_product.swapaxes(-2, -1).swapaxes(-4, -3).swapaxes(-3, -2).reshape(*lead, outputs)


@dataclass(frozen=True)
class _Call:
    """What the kernel's body must know besides its references."""

    codebook: tuple[float, ...]
    block_size: int
    transposed: bool
    tile: Tile
    steps: int  # of one piece of the reduction
    interpret: bool


def _run(call: _Call, sums, grid, *operands):
    """The kernel's float32 sums (pieces, y's columns, rows) of x, codes and scales."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    columns, along = (STRIP, ACROSS) if call.transposed else (ACROSS, STRIP)
    swizzled = _swizzled(32, min(4 * call.tile.rows, 128))
    scratch = [plgpu.SMEM((columns, call.tile.rows), jnp.float32, transforms=swizzled)]
    if call.interpret:
        scratch += [plgpu.SMEM(shape, jnp.bfloat16) for shape in ((columns, along), (along, call.tile.rows))]
    kernel = functools.partial(
        plgpu.kernel,
        functools.partial(_body, call),
        out_type=sums,
        scratch_types=scratch,
        grid=grid,
        grid_names=("columns", "piece", "rows"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="nf4_matmul_transposed" if call.transposed else "nf4_matmul",
    )
    if not call.interpret:
        return kernel()(*operands)
    played = AbstractDevice(device_kind=f"NVIDIA {INTERPRETED.name}", num_cores=INTERPRETED.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=played)):
        return kernel(interpret=_interpreter())(*operands)


def _swizzled(bits: int, swizzle: int):
    """How arrays lie in shared memory, such that neither WGMMA nor a thread's own loads meet bank conflicts."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _body(call: _Call, x_ref, codes_ref, scales_ref, sums_ref, out_ref, *played_ref) -> None:
    """One piece of the reduction, for one tile of y's columns and one of rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    column, piece, row = (lax.axis_index(name) for name in ("columns", "piece", "rows"))
    columns, along = (STRIP, ACROSS) if call.transposed else (ACROSS, STRIP)
    here = lambda n: piece * call.steps + n
    at = (lambda n: (column, here(n))) if call.transposed else (lambda n: (here(n), column))

    def block(n):  # of scales
        strip, across = at(n)
        return lax.div(strip, jnp.int32(call.block_size // STRIP)), across

    @functools.partial(pl.run_scoped, acc_ref=plgpu.WGMMAAccumulatorRef(out_ref.shape, jnp.float32))
    def _(acc_ref):
        def step(_, x_tile, codes_tile, scales_tile):
            weights = _decode(call, codes_tile, scales_tile)
            if call.interpret:  # which multiplies what is in shared memory, as it lies there
                played_ref[0][...], played_ref[1][...] = weights, x_tile[...].T
                plgpu.wgmma(acc_ref, *played_ref)
            else:
                plgpu.wgmma(acc_ref, weights, x_tile.transpose((1, 0)))
            plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            step,
            grid=(call.steps,),
            in_specs=[
                plgpu.BlockSpec((call.tile.rows, along), lambda n: (row, here(n)), transforms=_swizzled(16, 128)),
                plgpu.BlockSpec((STRIP, ACROSS), at, transforms=_swizzled(4, 128)),
                plgpu.BlockSpec((1, ACROSS), block),
            ],
            max_concurrent_steps=min(call.tile.ahead, call.steps),
        )(x_ref, codes_ref, scales_ref)
        out_ref[...] = acc_ref[...]
        plgpu.commit_smem()
        to = sums_ref.at[piece, pl.ds(column * columns, columns), pl.ds(row * call.tile.rows, call.tile.rows)]
        plgpu.copy_smem_to_gmem(out_ref, to)
        plgpu.wait_smem_to_gmem(0)


def _decode(call: _Call, codes_tile, scales_tile):
    """WGMMA's first operand, bfloat16: the tile (STRIP, ACROSS), or its transpose forward, with outputs `renamed`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    table = np.array(call.codebook, np.float32)
    if call.interpret:
        weights = reference.lookup(codes_tile[...], table) * scales_tile[...]
        weights = renamed(weights.astype(jnp.bfloat16), call.transposed)
        return weights if call.transposed else weights.T
    held, scaled = layouts(call.transposed)
    shape = (STRIP, ACROSS) if call.transposed else (ACROSS, STRIP)
    decode = plgpu.inline_mgpu(
        arg_types=(held, scaled),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )(functools.partial(_decode_registers, table, call.transposed))
    codes = _load(codes_tile, (slice(None), slice(None)), layout=held)
    return decode(codes, _load(scales_tile, (0, slice(None)), layout=scaled))


def layouts(transposed: bool):
    """Which codes (STRIP, ACROSS) and which of their scales (ACROSS,) a thread has: eight neighbouring outputs, spread
    over the warps by inputs where WGMMA's rows are inputs, and by outputs where they are outputs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, replicated = plgpu.Layout.TILED, plgpu.Replicated
    if transposed:  # (thread of four, half of its neighbours, neighbour), the same for all eight fours of all warps
        scaled = plgpu.Tiling(((32,), (8,), (4,)))
        by_thread = layout(scaled, warp_dims=(replicated(4),), lane_dims=(replicated(8), -3), vector_dim=-1)
        return plgpu.Layout.WGMMA_UPCAST_4X, by_thread
    held = plgpu.Tiling(((16, ACROSS), (8, 64), (2, 8)))  # (half, warp, thread of four, four, one of two, neighbour)
    scaled = plgpu.Tiling(((ACROSS,), (64,), (8,), (4,)))  # (warp, four, half of its neighbours, neighbour)
    by_four = layout(scaled, warp_dims=(-4,), lane_dims=(-3, replicated(4)), vector_dim=-1)
    return layout(held, warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1), by_four


def _decode_registers(table: np.ndarray, transposed: bool, _, codes, scales):
    """`_decode` on the registers of a thread, as Mosaic keeps them."""
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    pair = ir.VectorType.get((2,), f32)
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

    shape = codes.shape if transposed else codes.shape[::-1]
    registers = np.empty(mosaic.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    for n, both in sources(transposed, codes.layout, scales.layout, mosaic.WGMMA_LAYOUT).items():
        weights = llvm.mlir_undef(pair)
        for one, source in enumerate(both):
            weights = vector.insert(weight(*source), weights, **position(one))
        registers[n] = arith.truncf(ir.VectorType.get((2,), ir.BF16Type.get()), weights)
    return mosaic.FragmentedArray(_registers=registers, _layout=mosaic.WGMMA_LAYOUT, _is_signed=None)


def sources(transposed: bool, held, scaled, operand) -> dict[tuple, list[tuple]]:
    """What a thread makes each of WGMMA's registers from: for both of its weights (register of codes, which of the
    eight in it, register of scales, which of the four in it), the same for every thread."""
    words = {at: n for n, at in _places(held, (STRIP, ACROSS))}
    scales = {at: n for n, at in _places(scaled, (ACROSS,))}
    named = renamed(np.arange(STRIP * ACROSS).reshape(STRIP, ACROSS), transposed)
    named = named if transposed else named.T

    def source(name):
        strip, output = divmod(int(name), ACROSS)
        return words[strip, output // 8 * 8], output % 8, scales[output // 4 * 4,], output % 4

    return {n: [source(named[m, k + one]) for one in range(2)] for n, (m, k) in _places(operand, named.shape)}


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


def _interpreter():
    """Pallas's simulation of a GPU. JAX 0.10 has it, and does not export it."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
