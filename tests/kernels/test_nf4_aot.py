"""The TPU kernel compiled for TPUs that are not here, at the shapes of Llama 3.1: it is in the program, and no dense
weight is. Needs libtpu (the extra `tpu`), whose own compiler this is.
"""

import contextlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.kernels.nf4 import choose
from jpeft.kernels.nf4.op import nf4_matmul

pytest.importorskip("libtpu")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]  # 8B: queries and outputs, keys, up, down
LARGE = [(8192, 8192), (8192, 28672), (28672, 8192)]  # 70B
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several test processes at a time
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def chips(request):
    """The devices of a TPU that is not here."""
    return chips_of(request.param)


def chips_of(name):
    os.environ.update(OFFLINE)
    return topologies.get_topology_desc(TOPOLOGIES[name], platform="tpu").devices


def mesh_of(chips, *sizes, names=("data", "model")):
    chips = np.array(chips[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(chips, names[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def packed_like(shape, mesh, lead=(), spec=None):
    """Abstract double-quantized weights."""
    (k, n), on = (
        shape,
        lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P())),
    )
    return (
        on((*lead, k, n), jnp.uint4, spec),
        on((*lead, k // 64, n), jnp.uint8, spec),
        on((*lead, k * n // 64 // 256), jnp.float32, P()),
        on(lead, jnp.float32, P()),
    )


def rows_like(rows, width, mesh, spec=None):
    return jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=NamedSharding(mesh, spec or P()))


def kernels(text: str) -> list[str]:
    """Names of the Pallas kernels in a compiled program."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return sorted(re.search(r"%(\w+?)(\.\d+)? =", line).group(1) for line in calls)


def dense(text: str, shape) -> list[str]:
    """Arrays of a weight's shape that are not its codes."""
    k, n = shape
    return [found for found in re.findall(rf"\b(\w+)\[(?:{k},{n}|{n},{k})\]", text) if found != "u4"]


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_both_directions_are_kernels(chips, shape):
    mesh = mesh_of(chips, 1)

    def both(x, g, *packed):
        y, pull = jax.vjp(lambda x: nf4_matmul(x, *packed), x)
        return y, pull(g)

    rows = 144  # no side of any weight
    with jax.set_mesh(mesh):
        args = rows_like(rows, shape[0], mesh), rows_like(rows, shape[1], mesh), *packed_like(shape, mesh)
        compiled = jax.jit(both).lower(*args).compile()
    assert kernels(compiled.as_text()) == ["nf4_matmul", "nf4_matmul_transposed"]
    assert not dense(compiled.as_text(), shape)
    assert compiled.memory_analysis().temp_size_in_bytes < shape[0] * shape[1] / 2


@pytest.mark.parametrize("rows", [1, 2048])
def test_few_rows_and_many_are_kernels(chips, rows):
    mesh, shape = mesh_of(chips, 1), (4096, 1024)
    with jax.set_mesh(mesh):
        args = rows_like(rows, shape[0], mesh), *packed_like(shape, mesh)
        compiled = jax.jit(lambda x, *packed: nf4_matmul(x, *packed)).lower(*args).compile()
    assert kernels(compiled.as_text()) == ["nf4_matmul"] and not dense(compiled.as_text(), shape)


def test_a_scan_over_layers_has_one_kernel_for_each_use(chips):
    mesh, shape = mesh_of(chips, 1), (1024, 2048)

    def loss(x, *layers):
        def layer(x, packed):
            return nf4_matmul(jnp.tanh(nf4_matmul(x, *packed)), *packed, transposed=True), None

        return jax.lax.scan(layer, x, layers)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        args = rows_like(512, shape[0], mesh), *packed_like(shape, mesh, lead=(6,))
        compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
    # Forward: up and down, but for the last layer's unused sum; backward: the transpose of each.
    assert kernels(compiled.as_text()) == ["nf4_matmul"] * 2 + ["nf4_matmul_transposed"] * 2
    assert not dense(compiled.as_text(), shape)


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_a_qlora_step_reads_the_codes_in_their_stack_and_keeps_no_dense_weight(implementation):
    """Temporaries are no more than the layers' inputs, and all that is moved is less than a float32 for each weight
    would be, as scales that are spread to the rows of their blocks, written and read for each product."""
    layers, width, inner, rows = 4, 1024, 2816, 256
    shapes = {"up": (width, inner), "down": (inner, width)}
    mesh = mesh_of(chips_of("v5e"), 1)
    on = lambda tree: jax.tree.map(lambda a: a.update(sharding=NamedSharding(mesh, P())), tree)
    params = {n: jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16) for n, shape in shapes.items()}
    layer = jax.checkpoint(lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None))
    apply = lambda params, x: jax.lax.scan(layer, x, params)[0]
    x = rows_like(rows, width, mesh)
    method, sites = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=8)), jpeft.find_sites(apply, params, x)
    trainable, frozen = jax.eval_shape(lambda k, p: method.init(k, p, sites), jax.random.key(0), params)

    def step(trainable, frozen, x):
        loss = lambda t: jpeft.lift(apply)(method.bind(t, frozen), x).astype(jnp.float32).mean()
        return jax.value_and_grad(loss)(trainable)

    with jax.set_mesh(mesh) if implementation == "kernel" else contextlib.nullcontext():
        compiled = jax.jit(step).lower(on(trainable), on(frozen), x).compile()
    text, weights = compiled.as_text(), width * inner
    assert len(kernels(text)) == (5 if implementation == "kernel" else 0)
    assert compiled.memory_analysis().temp_size_in_bytes <= layers * 2 * rows * width + 2**20
    uses = 5  # forward twice, again once (the last product's output is not wanted), backward twice
    assert compiled.cost_analysis()["bytes accessed"] < uses * 8 * weights
    if implementation == "kernel":  # what is prefetched into VMEM has S(1) in its layout
        cut_out = re.findall(rf"\bu4\[(?:1,)?(?:{width},{inner}|{inner},{width})\]\{{[^}}]*\}}", text)
        assert all("S(1)" in layout for layout in cut_out)


def test_shards_are_taken_by_kernels_and_whole_weights_by_xla(chips):
    shape = (1024, 2048)
    mesh = mesh_of(chips, 2, 2)
    product = lambda x, *packed: nf4_matmul(x, *packed)
    codes, scales, *_ = packed_like(shape, mesh, spec=P(None, "model"))
    args = rows_like(512, shape[0], mesh, P("data")), codes, scales.update(dtype=jnp.float32)
    specs = P("data"), P(None, "model"), P(None, "model")
    with jax.set_mesh(mesh):
        local = jax.shard_map(product, in_specs=specs, out_specs=P("data", "model"), check_vma=False)
        assert kernels(jax.jit(local).lower(*args).compile().as_text()) == ["nf4_matmul"]
        assert kernels(jax.jit(product).lower(*args).compile().as_text()) == []
        assert "over 4 devices" in choose.why(choose.Product(512, shape))
