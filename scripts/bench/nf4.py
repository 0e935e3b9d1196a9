"""The product with NF4 weights, in figures that need no accelerator: what libtpu's compiler schedules and allocates.

    python scripts/bench/nf4.py                                   # everything, in about half an hour
    python scripts/bench/nf4.py gpu                               # measured on a GPU: nf4_gpu.py
    python scripts/bench/nf4.py sass --target h100.txtpb          # compiled for a GPU: nf4_gpu.py
    python scripts/bench/nf4.py products --chips v6e --shapes 4096x4096 --rows 2048
    python scripts/bench/nf4.py step

Needs the extra `tpu` (libtpu compiles on any x86-64 Linux; no TPU is used). Expected numbers: docs/benchmarks.md.

A schedule has one line, a bundle, for each cycle of the core, and is counted as often as the kernel's loops run it. A
product cannot be faster than the chip's matrix units, which the static schedule does not always know (on v5e it has
fewer lines than they need cycles): so `cycles` is the larger of the two for the product, and the decoding on top; and
neither ours nor XLA's estimate for a bfloat16 weight is less than its HBM takes to be read once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if sys.argv[1:2] in (["gpu"], ["sass"]):  # which want another environment
    runpy.run_path(str(Path(__file__).with_name("nf4_gpu.py")), run_name="__main__")
    sys.exit()

DUMP = Path(tempfile.mkdtemp(prefix="nf4-schedules-"))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
}

import jax  # noqa: E402  after what libtpu reads
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

import jpeft  # noqa: E402
from jpeft.kernels.nf4 import choose, reference, tpu  # noqa: E402
from jpeft.kernels.nf4.op import nf4_matmul  # noqa: E402

MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """A topology to compile for.

    Fields:
        flops, bytes: of one cycle: its matrix units' (bfloat16), and from HBM (published bandwidth over clock).
        cores: over which a kernel's blocks of outputs are split.
    """

    topology: str
    flops: int
    bytes: int
    cores: int = 1


MACHINES = {
    "v5e": Machine("v5e:2x2", 2 * 4 * 128**2, 546),
    "v5p": Machine("v5p:2x2x1", 2 * 2 * 4 * 128**2, 1580, cores=2),
    "v6e": Machine("v6e:2x2", 2 * 4 * 256**2, 937),
}
LLAMA = {  # (in, out) of the projections
    "8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "70B": [(8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)],
}


def mesh_of(chip: str) -> Mesh:
    devices = topologies.get_topology_desc(MACHINES[chip].topology, platform="tpu").devices
    return Mesh(np.array(devices[:1]), ("x",), axis_types=(AxisType.Auto,))


def compiled(mesh: Mesh, fn, *args, kernels: bool = True):
    """`fn` at shapes and dtypes, compiled for the mesh's one chip; its schedules lie in DUMP. Where the mesh is not in
    context while `fn` is traced, products go to XLA."""
    shutil.rmtree(DUMP, ignore_errors=True)
    on = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), args)
    with jax.set_mesh(mesh) if kernels else contextlib.nullcontext():
        return jax.jit(fn).lower(*args).compile()


def estimated(program) -> int:
    """The cycles that XLA expects of its own fusions."""
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', program.as_text()))


def loops_of(path: Path) -> tuple[int, list[int]]:
    """`(lines in no loop but the grid's, lines of each loop within it)` of a schedule, in its order."""
    rows, loops, inside = 0, [], False
    for line in path.read_text().splitlines():
        if not (found := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(LB)?\s*[A-Z]*\s*:\s*(>*)", line)):
            continue
        depth = len(found[2])
        if found[1] and depth == 2:
            loops.append(0)
            inside = True
        inside &= depth >= 2
        if inside:
            loops[-1] += 1
        else:
            rows += 1
    return rows, loops


def schedule(rows: int, shape: tuple[int, int], transposed: bool, machine: Machine, chip: tpu.Chip) -> dict[str, int]:
    """Bundles of the kernel that was compiled last: of the decoding, and of the product."""
    [path] = [p for p in DUMP.glob("*nf4_matmul*-final_bundles.txt") if "analysis" not in p.name]
    tile = tpu.tile_for(chip, rows, shape, 64, transposed)
    assert tile is not None
    reduction, outputs = shape[::-1] if transposed else shape
    n_rows, columns = (tile.outputs, shape[1]) if transposed else (shape[0], tile.outputs)
    group, across = tpu.GROUP * 64, columns // tpu.LANES
    turns = across * (n_rows // group)
    unroll = tpu.UNROLL if turns % tpu.UNROLL == 0 else 1
    decoding = [turns // unroll] if turns else []
    decoding += [across] if n_rows % group else []
    products = [reduction // tpu.DEPTH] if reduction > tpu.DEPTH else []
    outside, loops = loops_of(path)
    times = [n for n in decoding + products if n > 1]  # a loop of one turn is none
    assert len(times) == len(loops), (path, times, loops)
    split = len([n for n in decoding if n > 1])
    blocks = -(-outputs // tile.outputs) / machine.cores
    steps = blocks * -(-rows // tile.rows)
    spent = lambda part: sum(n * lines for n, lines in part)
    pairs = list(zip(times, loops, strict=True))
    return {"decode": int(blocks * spent(pairs[:split])), "product": int(steps * (outside + spent(pairs[split:])))}


def row_bits(options):
    """Stored bits of a weight."""
    for double in (False, True):
        params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
        linear = lambda p, x: x @ p["kernel"]
        sites = jpeft.find_sites(linear, params, jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16))
        method = jpeft.NF4(double_quant=double)
        frozen = jax.eval_shape(lambda k, p, m=method, s=sites: m.init(k, p, s)[1], jax.random.key(0), params)
        bits = sum(a.size * jax.dtypes.itemsize_bits(a.dtype) for a in jax.tree.leaves(frozen)) / 4096**2
        print(f"stored bits a weight, double_quant={double}: {bits:.3f}")


def row_products(options):
    """Cycles and HBM of single products, ours against XLA's of a bfloat16 weight."""
    columns = ["chip", "in x out", "rows", "", "decode", "product", "bundles", "matrix units", "cycles", "XLA, bf16"]
    columns += ["ratio", "HBM, MiB / bf16", *(["XLA, packed"] if options.xla else [])]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for chip in options.chips:
        mesh = mesh_of(chip)
        for shape in options.shapes:
            for rows in options.rows:
                for transposed in (False, True):
                    cells = product(mesh, chip, shape, rows, transposed, options.xla)
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def product(mesh, chip, shape, rows, transposed, with_xla) -> list:
    """One line of the table."""
    machine, kind, dtype = MACHINES[chip], mesh.devices.flat[0].device_kind, jnp.bfloat16
    named = [chip, "{} x {}".format(*shape), rows, "backward" if transposed else "forward"]
    choice = choose.choose(choose.Product(rows, shape, transposed=transposed), choose.Target("tpu", kind))
    if choice.chip is None:
        return [*named, choice.why]
    x = jax.ShapeDtypeStruct((rows, shape[transposed]), dtype)
    dense = jax.ShapeDtypeStruct(shape, dtype)
    codes, scales = jax.eval_shape(reference.quantize, dense)
    packed = (codes, *jax.eval_shape(reference.quantize_scales, scales))

    ours = compiled(mesh, lambda x, *p: nf4_matmul(x, *p, transposed=transposed), x, *packed)
    found = schedule(rows, shape, transposed, machine, choice.chip)
    theirs = compiled(mesh, lambda x, w: x @ (w.T if transposed else w), x, dense)
    units = 2 * rows * shape[0] * shape[1] // machine.flops
    memory = [program.memory_analysis() for program in (ours, theirs)]
    hbm = [m.argument_size_in_bytes + m.temp_size_in_bytes for m in memory]
    cycles = max(found["decode"] + max(found["product"], units), hbm[0] // machine.bytes)
    dense_cycles = max(estimated(theirs), hbm[1] // machine.bytes)
    numbers = [found["decode"], found["product"], sum(found.values()), units, cycles, dense_cycles]
    cells = [*named, *(f"{n:,}" for n in numbers), f"{cycles / dense_cycles:.2f}"]
    cells.append(f"{hbm[0] / MIB:.1f} / {hbm[1] / MIB:.1f}")
    if with_xla:
        plain = lambda x, *p: nf4_matmul(x, *p, transposed=transposed)
        cells.append(f"{estimated(compiled(mesh, plain, x, codes, scales, kernels=False)):,}")
    return cells


# The step: four scanned layers of width 2048 without attention, all seven projections adapted.
WIDTH, FEED_FORWARD, TOKENS = 2048, 5632, 512
PROJECTIONS = {n: (WIDTH, WIDTH) for n in ("q", "k", "v", "o")}
PROJECTIONS |= {"gate": (WIDTH, FEED_FORWARD), "up": (WIDTH, FEED_FORWARD), "down": (FEED_FORWARD, WIDTH)}


def layer(x, p):
    normed = lambda x: x * jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-6).astype(x.dtype)
    h = normed(x)
    x = x + (jnp.tanh(h @ p["q"]) * (h @ p["k"]) + h @ p["v"]) @ p["o"]
    h = normed(x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def row_step(options):
    """Arguments and temporaries of a training step: bfloat16 LoRA, NF4 in plain XLA, NF4 with the kernel."""
    params = {n: jax.ShapeDtypeStruct((4, *s), jnp.bfloat16) for n, s in PROJECTIONS.items()}
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    lora, qlora = jpeft.LoRA(rank=16), jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=16))
    for chip in options.chips:
        mesh = mesh_of(chip)
        for remat in (True, False):
            body = jax.checkpoint(layer) if remat else layer
            apply = lambda p, x, body=body: jax.lax.scan(lambda x, p: (body(x, p), None), x, p)[0]
            sites = jpeft.find_sites(apply, params, x)
            for name, method, kernels in (("LoRA, bf16", lora, False), ("XLA", qlora, False), ("kernel", qlora, True)):
                halves = jax.eval_shape(lambda k, p, m=method, s=sites: m.init(k, p, s), jax.random.key(0), params)

                def step(trainable, frozen, x, method=method, apply=apply):
                    loss = lambda t: jpeft.lift(apply)(method.bind(t, frozen), x).astype(jnp.float32).mean()
                    grads = jax.grad(loss)(trainable)
                    return jax.tree.map(lambda p, g: p - 1e-3 * g, trainable, grads)

                program = compiled(mesh, step, *halves, x, kernels=kernels)
                memory = program.memory_analysis()
                sizes = [n / 1e6 for n in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
                moved = program.cost_analysis()["bytes accessed"] / 1e9
                calls = program.as_text().count('custom_call_target="tpu_custom_call"')
                cells = [chip, "remat" if remat else "no remat", name, f"{sizes[0]:.0f} + {sizes[1]:.0f} MB"]
                cells += [f"{sum(sizes):.0f} MB", f"{moved:.2f} GB", f"{calls} kernels"]
                print(f"| {' | '.join(cells)} |", flush=True)


ROWS = {n.removeprefix("row_"): fn for n, fn in list(globals().items()) if n.startswith("row_")}

if __name__ == "__main__":
    pair = lambda text: tuple(int(n) for n in text.split("x"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--chips", nargs="+", default=list(MACHINES), choices=MACHINES)
    parser.add_argument("--shapes", nargs="+", type=pair, default=LLAMA["8B"] + LLAMA["70B"], help="as 4096x14336")
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 2048])
    parser.add_argument("--xla", action="store_true", help="XLA's product with the packed weight too; slow to compile")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, libtpu {__import__('libtpu').__version__}, compiled ahead of time, no TPU run")
    for name in options.figures or ROWS:
        ROWS[name](options)
    shutil.rmtree(DUMP, ignore_errors=True)
