"""The GPU kernel, run as plain JAX, equals the reference; it is lowered for GPUs that are not here; and is chosen."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from jpeft.kernels.nf4 import choose, gpu, gpu_registers, reference
from jpeft.kernels.nf4.choose import Product, Target
from jpeft.kernels.nf4.gpu_registers import ACROSS, STRIP, Order
from jpeft.kernels.nf4.op import nf4_matmul

H100 = gpu.CHIPS["H100"]
TABLE = tuple(reference.CODEBOOKS["nf4"].tolist())
normal = lambda seed, *shape, dtype="float32": jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def packed(shape, block_size=64, double=False, codebook="nf4"):
    codes, scales = reference.quantize(normal(0, *shape), block_size=block_size, codebook=codebook)
    return codes, *(reference.quantize_scales(scales) if double else (scales,))


def close(a, b, dtype):
    """Equal but for the order of float32 sums and one rounding to `dtype`."""
    assert a.shape == b.shape and a.dtype == b.dtype == dtype
    tolerance = 2**-8 if dtype == "bfloat16" else 2**-16
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance * float(jnp.abs(b).max()))


@pytest.fixture(autouse=True, scope="module")
def simulation():
    """JAX 0.10 has the simulation of a GPU, and does not export it."""
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(plgpu, "InterpretGPUParams"):
            from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

            patch.setattr(plgpu, "InterpretGPUParams", InterpretGPUParams, raising=False)
        yield


# ---- the kernel ----


@settings(max_examples=5)
@given(
    rows=st.integers(1, 70),
    strips=st.integers(1, 2),
    across=st.integers(1, 2),
    block=st.sampled_from([64, 128]),
    codebook=st.sampled_from(sorted(reference.CODEBOOKS)),
    transposed=st.booleans(),
    result=st.sampled_from(["bfloat16", "float32"]),
)
def test_it_equals_the_reference(rows, strips, across, block, codebook, transposed, result):
    codes, scales = packed((block * strips, 256 * across), block, codebook=codebook)
    w = reference.dequantize(codes, scales, block_size=block, codebook=codebook, dtype="bfloat16")
    w = w.T if transposed else w
    x = normal(1, rows, w.shape[0], dtype="bfloat16")
    table = tuple(reference.CODEBOOKS[codebook].tolist())
    options = {"block_size": block, "transposed": transposed, "result": result, "interpret": True}
    ours = gpu.matmul(x, codes, scales, chip=H100, codebook=table, **options)
    close(ours, jnp.dot(x, w, preferred_element_type=result), result)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_decoded_to_the_bit(transposed):
    codes, scales = packed((64, 256))
    eye = jnp.eye(256 if transposed else 64, dtype=jnp.bfloat16)
    ours = gpu.matmul(eye, codes, scales, chip=H100, codebook=TABLE, transposed=transposed, interpret=True)
    w = reference.dequantize(codes, scales, dtype="bfloat16")
    assert np.array_equal(ours, w.T if transposed else w)


@pytest.mark.parametrize(("transposed", "shape"), [(False, (256, 256)), (True, (64, 1024))])
def test_pieces_of_the_reduction_are_summed(transposed, shape):
    codes, scales = packed(shape)
    w = reference.dequantize(codes, scales, dtype="bfloat16")
    x = normal(1, 12, shape[transposed], dtype="bfloat16")
    tile = gpu.Tile(8, 2, ahead=1)
    ours = gpu.matmul(x, codes, scales, chip=H100, codebook=TABLE, transposed=transposed, tile=tile, interpret=True)
    close(ours, x @ (w.T if transposed else w), "bfloat16")


def test_many_rows_have_the_weight_decoded_once():
    codes, scales = packed((128, 256), 128)
    w = reference.dequantize(codes, scales, block_size=128, dtype="bfloat16")
    options = {"codebook": TABLE, "block_size": 128, "interpret": True}
    assert np.array_equal(gpu.decode(codes, scales, **options), w)
    g = normal(1, gpu.ROWS["H100"] + 1, 256, dtype="bfloat16")
    traced = jax.make_jaxpr(functools.partial(gpu.matmul, chip=H100, transposed=True, **options))(g, codes, scales)
    assert "dot_general" in str(traced)
    close(gpu.matmul(g, codes, scales, chip=H100, transposed=True, **options), g @ w.T, "bfloat16")


@pytest.mark.parametrize("order", Order)
def test_every_thread_has_the_codes_and_scales_of_the_weights_it_hands_over(order):
    """What a thread's registers hold is Mosaic's to say; which of them it decodes is said once for all threads."""
    held, scaled, wanted = (each.to_mgpu() for each in gpu_registers.layouts(order))
    codes, scales = holdings(held, (STRIP, ACROSS)), holdings(scaled, (ACROSS,))
    names = gpu_registers.renamed(np.arange(STRIP * ACROSS).reshape(STRIP, ACROSS), order)
    names = names.T if order is Order.ROWS else names
    registers = holdings(wanted, names.shape)
    sources = gpu_registers.sources(order, held, scaled, wanted)
    assert sources.keys() == registers.keys() and sum(map(len, sources.values())) * 128 == names.size
    for register, each in sources.items():
        for one, (word, neighbour, scale, element) in enumerate(each):
            weight = names.reshape(-1)[registers[register] + one]
            np.testing.assert_array_equal(codes[word] + neighbour, weight)
            np.testing.assert_array_equal(scales[scale] + element, weight % ACROSS)


def holdings(layout, shape) -> dict[tuple, np.ndarray]:
    """Where in the flattened array each register's first element lies, by thread (128,)."""
    sizes = layout.tiling.tile_shape(shape)
    strides = layout.tiling.tile_strides(tuple(np.cumprod((1, *shape[:0:-1]))[::-1].tolist()))
    warp, lane = np.divmod(np.arange(128), 32)
    first = np.zeros(128, int)
    for index, dims in ((warp, layout.warp_dims), (lane, layout.lane_dims)):
        along = [d.times if hasattr(d, "times") else sizes[d] for d in dims]
        for d, i in zip(dims, np.unravel_index(index, along), strict=True):
            first += 0 if hasattr(d, "times") else i * strides[d]
    registers = np.ndindex(*layout.registers_shape(shape))
    return {n: first + sum(i * stride for i, stride in zip(n, strides, strict=True)) for n in registers}


def test_rows_are_put_back():
    names = np.arange(512).reshape(1, 512)
    assert np.array_equal(gpu_registers.restored(gpu_registers.renamed(names, Order.ROWS)), names)


# ---- through the op ----

ours = functools.partial(nf4_matmul, implementation="gpu", interpret=True)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_and_its_gradient_are_the_reference_s(double, transposed):
    arrays = packed((64, 256), double=double)
    x = normal(1, 2, 3, 256 if transposed else 64, dtype="bfloat16")
    theirs = functools.partial(nf4_matmul, implementation="xla")
    results = [
        jax.value_and_grad(lambda x, fn=fn: jnp.sin(fn(x, *arrays, transposed=transposed).astype("float32")).sum())(x)
        for fn in (ours, theirs)
    ]
    np.testing.assert_allclose(*(float(value) for value, _ in results), atol=0.5)
    close(*(gradient for _, gradient in results), "bfloat16")


def test_without_a_simulation_there_is_no_interpreting(monkeypatch):
    monkeypatch.delattr(plgpu, "InterpretGPUParams")
    with pytest.raises(ValueError, match=f"which jax {jax.__version__} does not export; expected jax 0.12"):
        ours(normal(1, 9, 64, dtype="bfloat16"), *packed((64, 256)))


def test_more_of_x_under_vmap_are_more_rows():
    arrays = packed((64, 256))
    x = normal(1, 5, 3, 64, dtype="bfloat16")
    fn = lambda x: ours(x, *arrays)
    close(jax.vmap(fn)(x), nf4_matmul(x, *arrays), "bfloat16")
    assert "15,64" in str(jax.make_jaxpr(jax.vmap(fn))(x))


def test_stacked_weights_go_through_vmap_and_scan():
    codes, scales = packed((2, 64, 256))
    x = normal(1, 2, 4, 64, dtype="bfloat16")
    expected = jnp.stack([nf4_matmul(x[n], codes[n], scales[n]) for n in range(2)])
    close(jax.vmap(ours)(x, codes, scales), expected, "bfloat16")
    _, scanned = jax.lax.scan(lambda _, row: (None, ours(*row)), None, (x, codes, scales))
    close(scanned, expected, "bfloat16")


# ---- lowered for GPUs that are not here ----


def lowered(kind, fn, *args) -> str:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def abstract(rows, shape, width):
    codes, scales = jax.eval_shape(reference.quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.ShapeDtypeStruct((rows, width), jnp.bfloat16), codes, scales


def both_directions(x, codes, scales):
    y, pull = jax.vjp(lambda x: nf4_matmul(x, codes, scales), x)
    return pull(y)


@pytest.fixture
def measured(monkeypatch):
    """As if the kernel had been measured everywhere."""
    monkeypatch.setattr(gpu, "MEASURED", frozenset(gpu.ROWS))


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
@pytest.mark.parametrize("rows", [1, 16, 64, 100])
def test_few_rows_are_kernels_on_hopper(kind, rows):
    text = lowered(kind, both_directions, *abstract(rows, (512, 1024), 512))
    assert text.count("@mosaic_gpu_v2") == 2
    assert not {"512x1024xbf16", "512x1024xf32"} & set(re.findall(r"tensor<(\w+)>", text))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB", "NVIDIA B200", "NVIDIA L4"])
def test_other_gpus_are_xla_s(kind):
    assert "mosaic" not in lowered(kind, both_directions, *abstract(16, (512, 1024), 512))
    with pytest.raises(ValueError, match=f"made for H100, .*runs on {kind}"):
        lowered(kind, functools.partial(nf4_matmul, implementation="gpu"), *abstract(16, (512, 1024), 512))


@pytest.mark.usefixtures("measured")
def test_many_rows_are_xla_s_unless_the_kernel_is_asked_for():
    args = abstract(2048, (512, 1024), 512)
    assert "mosaic" not in lowered("NVIDIA H100 80GB HBM3", both_directions, *args)
    asked = functools.partial(nf4_matmul, implementation="gpu")
    assert "@mosaic_gpu_v2" in lowered("NVIDIA H100 80GB HBM3", asked, *args)


@pytest.mark.usefixtures("measured")
def test_scanned_layers_are_kernels_and_no_dense_weight():
    def loss(x, *layers):
        def layer(x, packed):
            return nf4_matmul(jnp.tanh(nf4_matmul(x, *packed)), *packed, transposed=True), None

        return jax.lax.scan(layer, x, layers)[0].astype(jnp.float32).sum()

    x, *layers = abstract(16, (256, 512), 256)
    layers = [jax.ShapeDtypeStruct((6, *each.shape), each.dtype) for each in layers]
    text = lowered("NVIDIA H100 80GB HBM3", jax.grad(loss), x, *layers)
    assert text.count("@mosaic_gpu_v2") >= 2  # equal products may be calls of one function
    assert not {"256x512xbf16", "256x512xf32"} & set(re.findall(r"tensor<(?:6x)?([\w]+)>", text))


@pytest.mark.usefixtures("measured")
def test_experts_under_vmap_are_one_kernel():
    x, *packed = (jax.ShapeDtypeStruct((4, *each.shape), each.dtype) for each in abstract(16, (256, 512), 256))
    text = lowered("NVIDIA H100 80GB HBM3", jax.vmap(nf4_matmul), x, *packed)
    assert text.count("@mosaic_gpu_v2") == 1 and "4x256x512xbf16" not in text


# ---- the choice ----

ON_GPU = Target("gpu", "NVIDIA H200")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9, 64, 200])
@pytest.mark.parametrize("shape", [(4096, 1024), (4096, 14336), (14336, 4096), (8192, 28672), (64, 256)], ids=str)
def test_tiles_divide_the_reduction_and_keep_the_chip_busy(shape, rows, transposed):
    tile = gpu.tile_for(H100, rows, shape, transposed)
    columns, steps = gpu._steps(shape, transposed)
    assert steps % tile.pieces == 0 and tile.rows in gpu.WIDTHS and (tile.rows >= rows or tile.rows == 64)
    assert columns * tile.pieces * -(-rows // tile.rows) >= 0.9 * H100.cores or steps // tile.pieces <= 3


def test_a_tile_that_was_measured_is_taken(monkeypatch):
    monkeypatch.setitem(gpu.TILES, ("H100", 4096, 4096, True), gpu.Tile(64, 2, ahead=6))
    assert gpu.tile_for(H100, 3, (4096, 4096), True) == gpu.Tile(8, 2, ahead=6)


@pytest.mark.parametrize(
    ("product", "where", "reason"),
    [
        (Product(8, (64, 256)), Target("cpu", "cpu"), "runs on cpu"),
        (Product(8, (64, 256)), Target("gpu", "NVIDIA A100-SXM4-80GB"), "made for H100"),
        (Product(8, (64, 256)), Target("gpu", "AMD Instinct MI300X"), "made for H100"),
        (Product(8, (64, 256)), Target("gpu", "NVIDIA H200", 8), "over 8 devices"),
        (Product(8, (64, 256), dtype="float32"), ON_GPU, "product is in float32"),
        (Product(8, (64, 256), rounded="float16"), ON_GPU, "stand for float16"),
        (Product(8, (64, 256), block_size=32), ON_GPU, "blocks of 32 over 64 inputs"),
        (Product(8, (96, 256)), ON_GPU, "blocks of 64 over 96 inputs"),
        (Product(8, (64, 384)), ON_GPU, "outputs in multiples of 256, got 384"),
        (Product(0, (64, 256)), ON_GPU, "no rows"),
    ],
    ids=str,
)
def test_xla_takes_the_rest_and_the_reason_is_said(product, where, reason):
    choice = choose.choose(product, where)
    assert choice.implementation == "xla" and reason in choice.why
    with pytest.raises(ValueError, match="implementation='gpu' cannot take this product") as error:
        choose.choose(product, where, "gpu")
    assert choice.why in str(error.value)


def test_until_it_was_measured_a_kernel_runs_where_it_is_asked_for():
    few = Product(16, (4096, 4096))
    assert gpu.MEASURED <= gpu.ROWS.keys()
    for chip in gpu.ROWS.keys() - gpu.MEASURED:
        where = Target("gpu", f"NVIDIA {chip}")
        assert f"not measured on a {chip} yet" in choose.why(few, where)
        assert choose.choose(few, where, "gpu").implementation == "gpu"


@pytest.mark.usefixtures("measured")
def test_rows_decide_unless_a_kernel_is_asked_for():
    few, many = (Product(rows, (4096, 4096)) for rows in (gpu.ROWS["H200"], gpu.ROWS["H200"] + 1))
    assert choose.why(few, ON_GPU) == "gpu: the kernel decodes in registers of NVIDIA H200"
    assert "beyond 256 rows" in choose.why(many, ON_GPU)
    assert choose.choose(many, ON_GPU, "gpu").implementation == "gpu"
    with pytest.raises(ValueError, match="runs on gpu, and the kernel on a TPU"):
        choose.choose(few, ON_GPU, "tpu")
    with pytest.raises(ValueError, match="runs on tpu, and the kernel on a GPU"):
        choose.choose(few, Target("tpu", "TPU v5 lite"), "gpu")
    assert gpu.ROWS.keys() == {chip.name for chip in gpu.CHIPS.values()}
