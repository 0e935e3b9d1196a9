"""The product with NF4 weights on a GPU: measured on one that is here, or compiled for one that is not.

    python scripts/bench/nf4.py gpu                               # everything, on the GPU of this machine
    python scripts/bench/nf4.py gpu products --shapes 4096x4096 --rows 1 16
    python scripts/bench/nf4.py gpu tiles                         # entries for `gpu.TILES`
    python scripts/bench/nf4.py gpu --interpret                   # a rehearsal anywhere, on jax 0.12; no figures
    python scripts/bench/nf4.py sass --target h100.txtpb          # no GPU: instructions of the compiled kernels

`gpu` first compares with the reference on the device, to the bit, and stops where it differs. A time is that of a
program of many products over as many weights as no cache holds, divided by their number: with launches, without
dispatch. The roofline is what the packed bytes take at the rate of a copy in the same run. bitsandbytes is measured
where it and a torch with CUDA can be imported.

`sass` needs the CUDA plugin of JAX (`jax[cuda13]`), nvdisasm beside its ptxas (`nvidia-cuda-nvdisasm`,
`nvidia-cuda-cuobjdump`), and the description of a GPU that XLA compiles for without one (GpuTargetConfigProto, in XLA's
repository under xla/backends/gpu/target_config/specs).
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SASS = sys.argv[1:2] == ["sass"]
DUMP = Path(tempfile.mkdtemp(prefix="nf4-sass-"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of the memory
if SASS:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_TO": str(DUMP)}
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_gpu_dump_llvmir=true --xla_dump_emitter_re=.*"

import jax  # noqa: E402  after what it reads
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jpeft.kernels.nf4 import gpu, reference  # noqa: E402
from jpeft.kernels.nf4.op import nf4_matmul  # noqa: E402

LLAMA = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]  # 8B: (in, out) of the projections
TABLE = tuple(reference.CODEBOOKS["nf4"].tolist())
PACKED = 0.5 + 4 / 64  # bytes of a weight
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^\n]*)")


def line(*cells) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def head(*columns) -> None:
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")


# ---- measured ----


class Bench:
    """A device, and how it is measured."""

    def __init__(self, options):
        self.interpret, self.options = options.interpret, options
        self.kind = jax.devices()[0].device_kind
        self.chip = gpu.INTERPRETED if self.interpret else gpu.chip_of(self.kind)
        if self.chip is None:
            sys.exit(f"the kernels are made for {', '.join(gpu.CHIPS)}, and this is {self.kind}; --interpret rehearses")

    def weights(self, shape, bytes_each: float, make) -> list:
        """As many weights as the caches of no GPU hold, and enough to measure."""
        n = 2 if self.interpret else min(max(16, int(256e6 / (shape[0] * shape[1] * bytes_each))), 32)
        return [make(jax.random.fold_in(jax.random.key(0), i)) for i in range(n)]

    def packed(self, shape) -> list:
        one = jax.jit(lambda key: reference.quantize(jax.random.normal(key, shape, jnp.bfloat16)))
        return self.weights(shape, PACKED, one)

    def dense(self, shape) -> list:
        return self.weights(shape, 2, jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16)))

    def seconds(self, fn, weights, *x) -> float:
        """Of `fn(*x, weight)`: the median of several runs."""
        every = jax.jit(lambda x, weights: [fn(*x, weight) for weight in weights])
        jax.block_until_ready(every(x, weights))
        calls, times = 1 if self.interpret else 5, []
        for _ in range(1 if self.interpret else 9):
            start = time.perf_counter()
            for _ in range(calls):
                out = every(x, weights)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / calls / len(weights))
        return float(np.median(times))

    @functools.cached_property
    def copied(self) -> float:
        """Bytes a second that a copy reads and writes."""
        arrays = [jnp.full(1 << (10 if self.interpret else 27), n, jnp.uint32) for n in range(2)]  # 512 MiB each
        return 2 * arrays[0].nbytes / self.seconds(lambda x: x ^ 1, arrays)

    def rows(self, rows: int, width: int):
        return jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)

    def fused(self, transposed, tile=None):
        """The kernel that decodes in registers, for however many rows."""
        options = {"chip": self.chip, "codebook": TABLE, "transposed": transposed, "interpret": self.interpret}
        pick = lambda x, codes: tile or gpu.tile_for(self.chip, x.shape[0], codes.shape, transposed)
        return lambda x, w: gpu.matmul(x, *w, tile=pick(x, w[0]), **options)

    def decoded(self, transposed):
        """The kernel that decodes the weight, and cuBLAS."""

        def product(x, w):
            dense = gpu.decode(*w, codebook=TABLE, interpret=self.interpret)
            return x @ (dense.T if transposed else dense)

        return product

    def xla(self, transposed):
        return lambda x, w: nf4_matmul(x, *w, transposed=transposed, implementation="xla")


def row_check(bench: Bench):
    """The device's results are the reference's: weights to the bit, products but for the order of sums."""
    shape = (256, 512)
    for seed, block in ((0, 64), (1, 128)):
        w = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        packed = reference.quantize(w, block_size=block)
        dense = reference.dequantize(*packed, block_size=block, dtype="bfloat16")
        same = gpu.decode(*packed, codebook=TABLE, block_size=block, interpret=bench.interpret)
        assert np.array_equal(same, dense), "the decoded weight differs"
        for transposed in (False, True):
            turned = dense.T if transposed else dense
            options = {"chip": bench.chip, "codebook": TABLE, "block_size": block, "transposed": transposed}
            tile = gpu.tile_for(bench.chip, 64, shape, transposed)
            product = functools.partial(gpu.matmul, tile=tile, interpret=bench.interpret, **options)
            eye = jnp.eye(turned.shape[0], dtype=jnp.bfloat16)
            assert np.array_equal(product(eye, *packed), turned), f"{transposed=}: a weight in a product differs"
            for rows in (1, 7, 16, 33, 64, 70):
                x = bench.rows(rows, turned.shape[0])
                tile = gpu.tile_for(bench.chip, rows, shape, transposed)
                ours = gpu.matmul(x, *packed, tile=tile, result=jnp.float32, interpret=bench.interpret, **options)
                theirs = jnp.dot(x, turned, preferred_element_type=jnp.float32)
                np.testing.assert_allclose(ours, theirs, atol=1e-3 * float(jnp.abs(theirs).max()))
    print("the kernels decode to the bit, and their products are the reference's")


def row_decode(bench: Bench):
    """Bytes a second that decoding a weight to bfloat16 moves, against a copy."""
    print(f"\ncopy: {bench.copied / 1e9:.0f} GB/s read and written")
    head("in x out", "decoding", "us", "GB/s", "of a copy", "to reach")
    ways = {
        "kernel": lambda w: gpu.decode(*w, codebook=TABLE, interpret=bench.interpret),
        "XLA": lambda w: reference.dequantize(*w, dtype="bfloat16"),
    }
    for shape in bench.options.shapes:
        weights, moved = bench.packed(shape), shape[0] * shape[1] * (PACKED + 2)
        for name, fn in ways.items():
            took = bench.seconds(fn, weights)
            rate = moved / took
            line(
                "{} x {}".format(*shape),
                name,
                f"{1e6 * took:.1f}",
                f"{rate / 1e9:.0f}",
                f"{rate / bench.copied:.2f}",
                0.8,
            )


def row_products(bench: Bench):
    """Products of few rows and of many: the three ways of ours, cuBLAS with a bfloat16 weight, bitsandbytes."""
    columns = ["in x out", "rows", "", "kernel, us", "decoded once", "XLA", "bfloat16", "bitsandbytes"]
    head(*columns, "bfloat16 / best", "bitsandbytes / best", "of the packed roofline")
    for shape in bench.options.shapes:
        packed, dense = bench.packed(shape), bench.dense(shape)
        theirs = bitsandbytes(shape, len(packed))
        floor = shape[0] * shape[1] * PACKED / bench.copied
        for rows in bench.options.rows:
            for transposed in (False, True):
                x = bench.rows(rows, shape[transposed])
                few = rows <= 1024  # beyond, weights would be decoded over and over
                ours = [bench.seconds(bench.fused(transposed), packed, x)] if few else [float("nan")]
                ours += [bench.seconds(way(transposed), packed, x) for way in (bench.decoded, bench.xla)]
                plain = bench.seconds(lambda x, w, t=transposed: x @ (w.T if t else w), dense, x)
                other, best = theirs(rows, transposed), np.nanmin(ours)
                cells = [f"{1e6 * t:.1f}" for t in (*ours, plain, other)]
                ratios = plain / best, other / best, floor / best
                named = "{} x {}".format(*shape), rows, "backward" if transposed else "forward"
                line(*named, *cells, *(f"{ratio:.2f}" for ratio in ratios))


def bitsandbytes(shape, n: int):
    """`seconds(rows, transposed)` of bitsandbytes' own product; NaN where it cannot be had."""
    try:
        import bitsandbytes
        import torch

        available = torch.cuda.is_available()
    except ImportError:
        available = False
    if not available:
        return lambda rows, transposed: float("nan")
    make = lambda *size: torch.randn(*size, dtype=torch.bfloat16, device="cuda")
    weights = [bitsandbytes.functional.quantize_4bit(make(*shape[::-1]), quant_type="nf4") for _ in range(n)]

    def product(x, packed, state, transposed):
        if transposed:  # as its backward pass does
            return x @ bitsandbytes.functional.dequantize_4bit(packed, state).to(x.dtype)
        return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)

    def seconds(rows, transposed):
        x, times = make(rows, shape[transposed]), []
        with torch.no_grad():
            for _ in range(10):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for packed, state in weights:
                    product(x, packed, state, transposed)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / n)
        return float(np.median(times[1:]))

    return seconds


def row_tiles(bench: Bench):
    """The best pieces and steps ahead for 16 rows: entries of `gpu.TILES`."""
    print("\nTILES: dict[tuple, Tile] = {")
    for shape in bench.options.shapes:
        packed = bench.packed(shape)
        for transposed in (False, True):
            columns, steps = gpu._steps(shape, transposed)
            x, found = bench.rows(16, shape[transposed]), {}
            for pieces in (n for n in range(1, steps + 1) if steps % n == 0 and columns * n <= 8 * bench.chip.cores):
                for ahead in (2, 4, 6):
                    tile = gpu.Tile(16, pieces, ahead)
                    found[tile] = bench.seconds(bench.fused(transposed, tile), packed, x)
            best = min(found, key=found.__getitem__)
            usual = found.get(gpu.tile_for(bench.chip, 16, shape, transposed), float("nan"))
            key = (bench.chip.name, *shape, transposed)
            print(f"    {key}: {best},  # {1e6 * found[best]:.1f} us; computed one: {1e6 * usual:.1f}", flush=True)
    print("}")


# ---- compiled ----


def row_sass(options):
    """Registers, spills and instructions a weight of the kernels, compiled for a GPU that is not here."""
    described = topologies.get_topology_desc(
        platform="cuda", target_config=options.target.read_text(), topology="1x1x1"
    )
    mesh = Mesh(np.array(described.devices[:1]), ("x",), axis_types=(AxisType.Auto,))
    on = NamedSharding(mesh, PartitionSpec())
    like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on)
    chip = gpu.chip_of(described.devices[0].device_kind) or gpu.INTERPRETED

    def compiled(fn, *args) -> dict[str, str]:
        shutil.rmtree(DUMP, ignore_errors=True)
        DUMP.mkdir()
        with jax.set_mesh(mesh):
            jax.jit(fn, out_shardings=on).lower(*args).compile()
        return {path.suffix: path.read_text(errors="replace") for path in sorted(DUMP.iterdir()) if path.is_file()}

    print(f"compiled for {described.devices[0].device_kind} with ptxas, no GPU run")
    head(
        "in x out",
        "rows",
        "",
        "pieces x steps",
        "registers",
        "spilled bytes",
        "shared KiB",
        "a weight",
        "of them shuffles",
    )
    for shape in options.shapes:
        codes, scales = like(shape, jnp.uint4), like((shape[0] // 64, shape[1]), jnp.float32)
        named = "{} x {}".format(*shape)
        for rows in options.rows:
            for transposed in (False, True):
                tile = gpu.tile_for(chip, rows, shape, transposed)
                fn = functools.partial(gpu.matmul, chip=chip, codebook=TABLE, transposed=transposed, tile=tile)
                files = compiled(fn, like((rows, shape[transposed]), jnp.bfloat16), codes, scales)
                steps = gpu._steps(shape, transposed)[1] // tile.pieces
                way = "backward" if transposed else "forward"
                line(named, rows, way, f"{tile.pieces} x {steps}", *registers(files), *per_weight(files[".sass_ctrl"]))
        files = compiled(functools.partial(gpu.decode, codebook=TABLE), codes, scales)
        line(named, "", "decoding", "", *registers(files), *per_weight(files[".sass_ctrl"], "SHFL"))
        files = compiled(lambda *w: reference.dequantize(*w, dtype="bfloat16"), codes, scales)
        line(named, "", "decoding, XLA", "", *assembled(files[".ptx"]))


def registers(files: dict[str, str]) -> list[str]:
    """Of a thread, what is spilled, and shared memory, as ptxas and Mosaic say."""
    used, spilled = (
        re.search(r"Used (\d+) registers", files[".ptxas"]),
        re.findall(r"(\d+) bytes spill", files[".ptxas"]),
    )
    shared = re.search(r"smem_scratch_bytes=(\d+)", files[".txt"])
    assert used and shared, files.keys()
    return [used[1], "+".join(spilled), f"{int(shared[1]) / 1024:.0f}"]


def per_weight(sass: str, of: str = "HGMMA") -> list[str]:
    """Instructions of the innermost loop that has `of`, a weight, and its shuffles: a thread decodes
    STRIP · ACROSS / 128 weights in a turn. Where the steps were unrolled and there is no loop, of all instructions."""
    labels, found = {}, []
    for text in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", text):
            labels[label[1]] = len(found)
        if instruction := INSTRUCTION.search(text):
            found.append((instruction[1], instruction[2]))
    loops = []
    for end, (name, rest) in enumerate(found):
        target = re.search(r"\.L_x_\d+", rest) if name.startswith("BRA") else None
        start = labels.get(target[0], end) if target else end
        if start < end and any(n.startswith(of) for n, _ in found[start:end]):
            loops.append([n.split(".")[0] for n, _ in found[start : end + 1]])
    turn = min(loops, key=len, default=[n.split(".")[0] for n, _ in found])
    weights = max(1, round(collections.Counter(turn)["FMUL"] / 128)) * 128
    return [f"{len(turn) / weights:.2f}", f"{collections.Counter(turn)['SHFL'] / weights:.2f}"]


def assembled(ptx: str) -> list[str]:
    """The same of a fusion of XLA's: four weights a thread."""
    tools = Path(__import__("nvidia").__path__[0]) / "cu13" / "bin"
    source, cubin = DUMP / "fusion.ptx", DUMP / "fusion.cubin"
    source.write_text(ptx)
    said = subprocess.run(
        [tools / "ptxas", "-arch=sm_90a", "-v", source, "-o", cubin], capture_output=True, text=True, check=True
    ).stderr
    sass = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    names = [name.split(".")[0] for name, _ in INSTRUCTION.findall(sass)]
    used = re.search(r"Used (\d+) registers", said)
    assert used, said
    weights = names.count("FMUL")
    return [
        used[1],
        "+".join(re.findall(r"(\d+) bytes spill", said)),
        "0",
        f"{(len(names) - names.count('NOP')) / weights:.2f}",
        "0",
    ]


def main():
    pair = lambda text: tuple(int(n) for n in text.split("x"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = {n.removeprefix("row_"): fn for n, fn in globals().items() if n.startswith("row_") and n != "row_sass"}
    parser.add_argument("--shapes", nargs="+", type=pair, default=LLAMA, help="as 4096x14336")
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64] if SASS else [1, 16, 64, 256, 4096])
    if SASS:
        parser.add_argument("--target", type=Path, required=True, help="GpuTargetConfigProto as text")
        row_sass(parser.parse_args(sys.argv[2:]))
        shutil.rmtree(DUMP, ignore_errors=True)
        return
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(figures)}; all by default")
    parser.add_argument("--interpret", action="store_true", help="as plain JAX, with small shapes")
    options = parser.parse_args(sys.argv[2:])
    if options.interpret:
        options.shapes, options.rows = [(128, 512)], [3]
    bench = Bench(options)
    print(f"jax {jax.__version__}, {bench.kind}")
    for name in options.figures or figures:
        figures[name](bench)


if __name__ == "__main__":
    main()
