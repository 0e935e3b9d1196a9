"""The product with a packed 4-bit weight on a GPU of the Hopper generation: few rows, codes decoded in registers.

    y = x @ W,    or  y = x @ Wᵀ where `transposed`,    W[i, o] = codebook[codes[i, o]] · scales[i // block_size, o]

A warpgroup takes STRIP inputs by ACROSS outputs of the codes at a time, which the copy engine brings to shared memory a
few steps ahead, decodes them in registers and multiplies from there: `yᵀ += A @ xᵀ` by WGMMA, where A is the decoded
tile (transposed product) or its transpose (forward). So no weight is written anywhere, and the few rows are the narrow
side of the product. The grid is (tiles of y's columns, pieces of the reduction, tiles of rows); the pieces' float32
sums are added by XLA, in the same order every time.

How they are decoded: `gpu_registers`, in four instructions a weight, where the memory of an H200 brings a weight in the
time of three to four. With many rows (beyond `ROWS`) the weight is decoded once, by a kernel of its own, and multiplied
by cuBLAS; XLA does that alone too, in one fusion of 28 instructions a weight, and is taken for it unasked.

Only compute capability 9.0 has these instructions: compiling the kernel for an A100 aborts the process, and Blackwell
has other ones. So it is made for the device kinds in `CHIPS` and refused for all others.

Shapes: x (rows, in), codes (in, out) uint4, scales (in / block_size, out) float32; y (rows, out), of `result`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from jpeft.kernels.nf4.gpu_registers import ACROSS, STRIP, Order, decoded, renamed, restored

__all__ = ["CHIPS", "MEASURED", "ROWS", "TILES", "Chip", "Tile", "chip_of", "decode", "matmul", "tile_for", "unfit"]

AXES = ("columns", "piece", "rows")  # of the grid
DECODED = 4  # tiles that one piece of the grid decodes, where no weight is multiplied
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
# None was measured yet: `scripts/bench/nf4.py gpu tiles` prints the entries.
TILES: dict[tuple, Tile] = {}

# Rows up to which a product is decoded in registers, by chip. **Derived, not yet measured**: each 64 rows are a pass
# over the weights, at 4.5 instructions a weight (docs/benchmarks.md; an H100 has 30e12 a second): 256 rows are 0.6 ps
# a weight. Decoded once, a weight is read packed, written and read in bfloat16: 4.6 bytes, at 3.35 TB/s 1.4 ps, before
# it is multiplied. `scripts/bench/nf4.py gpu products` measures both, and where they cross.
ROWS = {"H100": 256, "H200": 256}

# The chips on which that was measured. On the others XLA takes every product, unless the kernel is asked for.
MEASURED: frozenset[str] = frozenset()


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
        tile: what one tile takes, however many rows there are; where None, `tile_for`'s up to `ROWS`, and beyond it the
            weight is decoded once.
        interpret: run as plain JAX, on any platform.

    Raises:
        ValueError: `interpret` on a JAX that does not export its simulation of a GPU.
    """
    rows = x.shape[0]
    if tile is None and rows > ROWS[chip.name]:
        w = decode(codes, scales, codebook=codebook, block_size=block_size, interpret=interpret)
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        return lax.dot_general(x, w, dims, preferred_element_type=result)
    tile = tile or tile_for(chip, rows, codes.shape, transposed)
    tiles, steps = _steps(codes.shape, transposed)
    assert steps % tile.pieces == 0, (tile, codes.shape)
    high = -(-rows // tile.rows)
    x = jnp.pad(x, ((0, high * tile.rows - rows), (0, 0)))
    order = Order.SUMS if transposed else Order.ROWS
    call = _Call(codebook, block_size, order, tile.rows, steps // tile.pieces, min(tile.ahead, steps), interpret)
    sums = jax.ShapeDtypeStruct((tile.pieces, tiles * call.columns, high * tile.rows), jnp.float32)
    scratch: dict[str, _Shared] = {"out": ((call.columns, tile.rows), jnp.float32, min(4 * tile.rows, 128))}
    if interpret:
        scratch["played"] = (call.columns, call.along), jnp.bfloat16, None
        scratch["played_x"] = (call.along, tile.rows), jnp.bfloat16, None
    operands = renamed(x, order) if transposed else x, codes, scales
    pieces = _run(_multiply, call, sums, scratch, (tiles, tile.pieces, high), *operands)
    if not transposed:  # by index, which is fused with what follows
        pieces = pieces.at[:, restored(np.arange(codes.shape[1]))].get(mode="promise_in_bounds", unique_indices=True)
    return pieces.sum(0).T[:rows].astype(result)


@functools.partial(jax.jit, static_argnames=("codebook", "block_size", "interpret"))
def decode(
    codes: jax.Array, scales: jax.Array, *, codebook: tuple[float, ...], block_size: int = 64, interpret: bool = False
) -> jax.Array:
    """W (in, out), bfloat16, for shapes that `unfit` finds nothing against."""
    strips, across = _steps(codes.shape, transposed=True)
    pieces = next(n for n in range(-(-across // DECODED), across + 1) if across % n == 0)
    call = _Call(codebook, block_size, Order.LYING, STRIP, across // pieces, 4, interpret)
    w = jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)
    scratch: dict[str, _Shared] = {"out": ((2, STRIP, ACROSS), jnp.bfloat16, 128)}
    return _run(_write, call, w, scratch, (strips, pieces, 1), codes, scales)


_Shared = tuple[tuple[int, ...], Any, int | None]  # shape, dtype and swizzle of an array in shared memory


@dataclass(frozen=True)
class _Call:
    """What a kernel's body must know besides its references."""

    codebook: tuple[float, ...]
    block_size: int
    order: Order
    rows: int
    steps: int  # of one piece
    ahead: int
    interpret: bool

    @property
    def columns(self) -> int:
        """Of y, in a tile."""
        return ACROSS if self.order is Order.ROWS else STRIP

    @property
    def along(self) -> int:
        """The reduction, in a tile."""
        return STRIP if self.order is Order.ROWS else ACROSS

    def tile(self, n):
        """Where the n-th step's codes are, in tiles."""
        column, step = lax.axis_index("columns"), lax.axis_index("piece") * self.steps + n
        return (step, column) if self.order is Order.ROWS else (column, step)

    def block(self, n):
        """Where their scales are."""
        strip, across = self.tile(n)
        return lax.div(strip, jnp.int32(self.block_size // STRIP)), across


def _multiply(call: _Call, x_ref, codes_ref, scales_ref, sums_ref, out, played=None, played_x=None) -> None:
    """One piece of the reduction, for one tile of y's columns and one of rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    column, piece, row = (lax.axis_index(name) for name in AXES)

    @functools.partial(pl.run_scoped, sums=plgpu.WGMMAAccumulatorRef(out.shape, jnp.float32))
    def _(sums):
        def step(_, x, codes, scales):
            weights = decoded(codes, scales, call.codebook, call.order, call.interpret)
            if played is None or played_x is None:
                plgpu.wgmma(sums, weights, x.transpose((1, 0)))
            else:  # the simulation multiplies what is in shared memory, as it lies there
                played[...], played_x[...] = weights, x[...].T
                plgpu.wgmma(sums, played, played_x)
            plgpu.wgmma_wait(0)

        of_x = plgpu.BlockSpec(
            (call.rows, call.along), lambda n: (row, piece * call.steps + n), transforms=_swizzled(jnp.bfloat16)
        )
        _pipeline(call, step, [of_x])(x_ref, codes_ref, scales_ref)
        out[...] = sums[...]
        plgpu.commit_smem()
        columns, rows = pl.ds(column * call.columns, call.columns), pl.ds(row * call.rows, call.rows)
        plgpu.copy_smem_to_gmem(out, sums_ref.at[piece, columns, rows])
        plgpu.wait_smem_to_gmem(0)


def _write(call: _Call, codes_ref, scales_ref, w_ref, out) -> None:
    """One piece of a strip of the weight. One tile is decoded while the other of two is copied out."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def step(index, codes, scales):
        [n] = index
        here = out.at[lax.rem(n, 2)]
        weights = decoded(codes, scales, call.codebook, call.order, call.interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        here[...] = weights
        plgpu.commit_smem()
        strip, across = call.tile(n)
        plgpu.copy_smem_to_gmem(here, w_ref.at[pl.ds(strip * STRIP, STRIP), pl.ds(across * ACROSS, ACROSS)])

    _pipeline(call, step, [])(codes_ref, scales_ref)
    plgpu.wait_smem_to_gmem(0)


def _pipeline(call: _Call, step, before: list):
    """The steps of a piece, each over what the copy engine has brought: `before`, a tile of codes and its scales."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.emit_pipeline(
        step,
        grid=(call.steps,),
        in_specs=[
            *before,
            plgpu.BlockSpec((STRIP, ACROSS), call.tile, transforms=_swizzled(jnp.uint4)),
            plgpu.BlockSpec((1, ACROSS), call.block),
        ],
        max_concurrent_steps=min(call.ahead, call.steps),
    )


def _swizzled(dtype, swizzle: int = 128):
    """How arrays lie in shared memory, such that neither WGMMA nor a thread's own loads meet bank conflicts."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    bits = jax.dtypes.itemsize_bits(dtype)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _run(body, call: _Call, out, scratch: dict[str, _Shared], grid, *operands):
    """What the kernel writes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    name = {Order.LYING: "nf4_decode", Order.ROWS: "nf4_matmul", Order.SUMS: "nf4_matmul_transposed"}[call.order]
    kernel = functools.partial(
        plgpu.kernel,
        functools.partial(body, call),
        out_type=out,
        scratch_types={
            name: plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype, swizzle) if swizzle else ())
            for name, (shape, dtype, swizzle) in scratch.items()
        },
        grid=grid,
        grid_names=AXES,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
    )
    if not call.interpret:
        return kernel()(*operands)
    played = AbstractDevice(device_kind=f"NVIDIA {INTERPRETED.name}", num_cores=INTERPRETED.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=played)):
        return kernel(interpret=_interpreter())(*operands)


def _interpreter():
    """Pallas's simulation of a GPU."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        raise ValueError(
            f"interpret=True runs the GPU kernel in Pallas's simulation of a GPU, which jax {jax.__version__} does not "
            "export; expected jax 0.12 or later, or implementation='xla'"
        )
    return plgpu.InterpretGPUParams()
