"""The TPU kernel, run as plain JAX, equals the reference; what takes a product is chosen, said and never guessed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.kernels.nf4 import choose, reference, tpu
from jpeft.kernels.nf4.choose import Product, Target
from jpeft.kernels.nf4.op import nf4_matmul

V5E, V6E = tpu.CHIPS["TPU v5 lite"], tpu.CHIPS["TPU v6 lite"]
normal = lambda seed, *shape, dtype="float32": jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def packed(shape, block_size=64, double=False, codebook="nf4"):
    codes, scales = reference.quantize(normal(0, *shape), block_size=block_size, codebook=codebook)
    return codes, *(reference.quantize_scales(scales) if double else (scales,))


def close(a, b, dtype):
    """Equal but for the order of float32 sums and one rounding to `dtype`."""
    assert a.shape == b.shape and a.dtype == b.dtype == dtype
    tolerance = 2**-8 if dtype == "bfloat16" else 2**-16
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance * float(jnp.abs(b).max()))


# ---- the kernel ----


@settings(max_examples=8)
@given(
    chip=st.sampled_from([V5E, V6E]),
    rows=st.integers(1, 40),
    inputs=st.sampled_from([64, 192, 576]),
    outputs=st.sampled_from([128, 256]),
    block_size=st.sampled_from([16, 32, 64, 192]),
    codebook=st.sampled_from(sorted(reference.CODEBOOKS)),
    transposed=st.booleans(),
    result=st.sampled_from(["bfloat16", "float32"]),
)
def test_it_equals_the_reference(chip, rows, inputs, outputs, block_size, codebook, transposed, result):
    if inputs % block_size:
        block_size = 64
    codes, scales = packed((inputs, outputs), block_size, codebook=codebook)
    w = reference.dequantize(codes, scales, block_size=block_size, codebook=codebook, dtype="bfloat16")
    w = w.T if transposed else w
    x = normal(1, rows, w.shape[0], dtype="bfloat16")
    entries = tuple(reference.CODEBOOKS[codebook].tolist())
    whole = inputs if transposed else 128  # outputs of a step: several steps forward, one of the whole backward
    ours = tpu.matmul(
        x,
        codes,
        scales,
        chip=chip,
        codebook=entries,
        block_size=block_size,
        transposed=transposed,
        result=result,
        tile=tpu.Tile(min(rows, 16), whole),
        interpret=True,
    )
    close(ours, jnp.dot(x, w, preferred_element_type=result), result)


@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda chip: chip.name)
def test_weights_are_decoded_to_the_bit(chip):
    codes, scales = packed((128, 128))
    entries = tuple(reference.CODEBOOKS["nf4"].tolist())
    eye = jnp.eye(128, dtype=jnp.bfloat16)
    ours = tpu.matmul(eye, codes, scales, chip=chip, codebook=entries, interpret=True)
    assert np.array_equal(ours, reference.dequantize(codes, scales, dtype="bfloat16"))


@pytest.mark.parametrize("transposed", [False, True])
def test_reductions_longer_than_one_product_are_a_loop(transposed, monkeypatch):
    monkeypatch.setattr(tpu, "DEPTH", 128)
    codes, scales = packed((320, 384))
    w = reference.dequantize(codes, scales, dtype="bfloat16")
    x = normal(1, 8, 384 if transposed else 320, dtype="bfloat16")
    entries = tuple(reference.CODEBOOKS["nf4"].tolist())
    ours = tpu.matmul(x, codes, scales, chip=V6E, codebook=entries, transposed=transposed, interpret=True)
    close(ours, x @ (w.T if transposed else w), "bfloat16")


@pytest.mark.parametrize(("transposed", "outputs"), [(False, 256), (True, 512)])
def test_the_last_blocks_of_rows_and_outputs_may_be_shorter(transposed, outputs):
    codes, scales = packed((640, 384))
    w = reference.dequantize(codes, scales, dtype="bfloat16")
    x = normal(1, 20, 384 if transposed else 640, dtype="bfloat16")
    entries = tuple(reference.CODEBOOKS["nf4"].tolist())
    tile = tpu.Tile(16, outputs)
    ours = tpu.matmul(x, codes, scales, chip=V6E, codebook=entries, transposed=transposed, tile=tile, interpret=True)
    close(ours, x @ (w.T if transposed else w), "bfloat16")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_that_does_not_fit_is_cut_in_outputs_then_rows_then_buffers(transposed):
    sizes = []
    for vmem in (128, 64, 32, 16, 8, 4, 1):
        chip = tpu.Chip("v6e", vmem << 20, 16)
        tile = tpu.tile_for(chip, 4096, (4096, 4096), 64, transposed)
        assert tile is None or tpu.vmem_bytes(tile, 4096, 64) <= vmem << 20
        sizes.append(tile)
    assert sizes[0] == tpu.TILES[("v6e",)] and sizes[-1] is None
    found = [(-t.buffers, -t.outputs) for t in sizes if t]
    assert found == sorted(found) and len(set(found)) > 1


# ---- through the op ----


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_and_its_gradients_are_the_reference_s(double, transposed):
    arrays = packed((128, 256), double=double)
    x = normal(1, 2, 3, 256 if transposed else 128, dtype="bfloat16")
    ours = lambda x: nf4_matmul(x, *arrays, transposed=transposed, interpret=True)
    theirs = lambda x: nf4_matmul(x, *arrays, transposed=transposed, implementation="xla")
    loss = lambda fn: lambda x: jnp.sin(fn(x).astype(jnp.float32)).sum()
    close(ours(x), theirs(x), "bfloat16")
    close(jax.grad(loss(ours))(x), jax.grad(loss(theirs))(x), "bfloat16")
    twice = lambda fn: jax.grad(lambda x: (jax.grad(loss(fn))(x).astype(jnp.float32) ** 2).sum())(x)
    a, b = np.float32(twice(ours)), np.float32(twice(theirs))
    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_more_of_x_under_vmap_are_more_rows_of_one_call():
    arrays = packed((64, 128))
    x = normal(1, 5, 3, 64, dtype="bfloat16")
    fn = lambda x: nf4_matmul(x, *arrays, interpret=True)
    calls = [eqn for eqn in _equations(jax.make_jaxpr(jax.vmap(fn))(x).jaxpr) if eqn.primitive.name == "pallas_call"]
    assert [eqn.outvars[0].aval.shape for eqn in calls] == [(15, 128)]
    close(jax.vmap(fn)(x), fn(x), "bfloat16")
    gradients = jax.vmap(jax.grad(lambda x: fn(x).astype(jnp.float32).sum()))(x)
    close(gradients, jax.grad(lambda x: fn(x).astype(jnp.float32).sum())(x), "bfloat16")


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", None)
            if inner is not None and eqn.primitive.name != "pallas_call":
                yield from _equations(inner)


def test_stacked_weights_go_through_vmap_and_scan():
    codes, scales = packed((3, 64, 128))
    x = normal(1, 3, 4, 64, dtype="bfloat16")
    fn = lambda x, c, s: nf4_matmul(x, c, s, interpret=True)
    expected = jnp.stack([nf4_matmul(x[n], codes[n], scales[n]) for n in range(3)])
    close(jax.vmap(fn)(x, codes, scales), expected, "bfloat16")
    _, scanned = jax.lax.scan(lambda _, row: (None, fn(*row)), None, (x, codes, scales))
    close(scanned, expected, "bfloat16")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_is_read_in_its_stack(transposed):
    codes, scales = packed((3, 64, 128))
    x = normal(1, 4, 128 if transposed else 64, dtype="bfloat16")
    for layer in range(3):
        ours = lambda x, n=layer: nf4_matmul(
            x, codes, scales[n], layer=jnp.int32(n), transposed=transposed, interpret=True
        )
        theirs = lambda x, n=layer: nf4_matmul(x, codes[n], scales[n], transposed=transposed, implementation="xla")
        in_xla = nf4_matmul(
            x, codes, scales[layer], layer=jnp.int32(layer), transposed=transposed, implementation="xla"
        )
        close(ours(x), theirs(x), "bfloat16")
        close(in_xla, theirs(x), "bfloat16")
        gradient = lambda fn: jax.grad(lambda x: fn(x).astype(jnp.float32).sum())(x)
        close(gradient(ours), gradient(theirs), "bfloat16")
    close(jax.vmap(ours)(jnp.stack([x, x])), jnp.stack([theirs(x)] * 2), "bfloat16")


def test_a_scan_gives_the_kernel_the_whole_stack():
    params = {"kernel": normal(0, 3, 128, 128, dtype="bfloat16")}
    x = normal(1, 4, 128, dtype="bfloat16")
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]
    method = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=2))
    tree = method.bind(*method.init(jax.random.key(0), params, jpeft.find_sites(fn, params, x)))
    with_kernels = lambda loss: jax.make_jaxpr(jax.grad(loss))(x).jaxpr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "target", lambda: ON_TPU)
        jaxpr = with_kernels(lambda x: jpeft.lift(fn)(tree, x).astype(jnp.float32).sum())
    calls = [eqn for eqn in _equations(jaxpr) if eqn.primitive.name == "pallas_call"]
    assert len(calls) == 2 and all((3, 128, 128) in [v.aval.shape for v in eqn.invars] for eqn in calls)


def test_under_shard_map_every_device_takes_its_own_outputs():
    codes, scales = packed((64, 512))
    x = normal(1, 8, 64, dtype="bfloat16")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fn = lambda x, c, s: nf4_matmul(x, c, s, interpret=True)
    specs = (P("data"), P(None, "model"), P(None, "model"))
    ours = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P("data", "model"), check_vma=False)
    close(jax.jit(ours)(x, codes, scales), nf4_matmul(x, codes, scales), "bfloat16")


# ---- the choice ----

ON_TPU = Target("tpu", "TPU v5 lite")


@pytest.mark.parametrize("kind", tpu.CHIPS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 2048])
@pytest.mark.parametrize("shape", [(4096, 1024), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)], ids=str)
def test_large_weights_have_a_tile_on_every_chip(kind, transposed, rows, shape):
    product = Product(rows, shape, transposed=transposed)
    assert choose.choose(product, Target("tpu", kind)).implementation == "tpu"
    chip = tpu.CHIPS[kind]
    tile = tpu.tile_for(chip, rows, shape, 64, transposed)
    assert tile.rows <= rows and tpu.vmem_bytes(tile, shape[1 if transposed else 0], 64) < chip.vmem


@pytest.mark.parametrize(
    ("product", "where", "reason"),
    [
        (Product(8, (64, 128)), Target("cpu", "cpu"), "runs on cpu"),
        (Product(8, (64, 128)), Target("tpu", "TPU v4"), "runs on TPU v4"),
        (Product(8, (64, 128)), Target("tpu", "TPU v5 lite", 8), "over 8 devices"),
        (Product(8, (64, 128), dtype="float32"), ON_TPU, "product is in float32"),
        (Product(8, (64, 128), rounded="float16"), ON_TPU, "stand for float16"),
        (Product(8, (64, 128), block_size=8), ON_TPU, "blocks of 8 over 64 inputs"),
        (Product(8, (96, 128)), ON_TPU, "blocks of 64 over 96 inputs"),
        (Product(8, (96, 128), block_size=32), ON_TPU, "got 96 and 128"),
        (Product(8, (64, 100)), ON_TPU, "got 64 and 100"),
        (Product(0, (64, 128)), ON_TPU, "no rows"),
        (Product(8, (1 << 20, 128)), ON_TPU, "no tile of a weight of 1048576 x 128"),
    ],
    ids=str,
)
def test_xla_takes_the_rest_and_the_reason_is_said(product, where, reason):
    choice = choose.choose(product, where)
    assert choice.implementation == "xla" and reason in choice.why
    assert choose.why(product, where) == f"xla: {choice.why}"
    with pytest.raises(ValueError, match="cannot take this product") as error:
        choose.choose(product, where, "tpu")
    assert choice.why in str(error.value)


def test_what_is_asked_for_is_taken_or_refused():
    arrays, x = packed((64, 128)), normal(1, 4, 64, dtype="bfloat16")
    with pytest.raises(ValueError, match="runs on cpu"):
        nf4_matmul(x, *arrays, implementation="tpu")
    with pytest.raises(ValueError, match="expected implementation among xla, tpu"):
        nf4_matmul(x, *arrays, implementation="cuda")
    with pytest.raises(ValueError, match="has none"):
        nf4_matmul(x, *arrays, implementation="xla", interpret=True)
    with pytest.raises(ValueError, match="multiplies in bfloat16"):
        nf4_matmul(x.astype("float32"), *arrays, interpret=True)
    assert choose.choose(Product(4, (64, 128)), ON_TPU, "xla").why == "it was asked for"
    assert choose.why(Product(4, (64, 128)), ON_TPU) == "tpu: the kernel decodes in VMEM of TPU v5 lite"


def test_the_target_is_that_of_the_mesh_in_context():
    assert choose.target() == Target("cpu", "cpu", 8)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    seen = []
    look = lambda x: seen.append(choose.target()) or x
    with jax.set_mesh(mesh):
        jax.eval_shape(look, jnp.ones(8))
        jax.eval_shape(jax.shard_map(look, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}), jnp.ones(8))
        jax.eval_shape(jax.shard_map(look, in_specs=P("data"), out_specs=P("data")), jnp.ones(8))
    assert [where.devices for where in seen] == [8, 4, 1]


def test_a_program_for_a_tpu_has_the_kernel_and_for_a_cpu_has_not(monkeypatch):
    monkeypatch.setattr(choose, "target", lambda: ON_TPU)
    arrays, x = packed((64, 128)), normal(1, 4, 64, dtype="bfloat16")
    traced = jax.jit(jax.grad(lambda x: nf4_matmul(x, *arrays).astype(jnp.float32).sum())).trace(x)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    expected = nf4_matmul(jnp.ones((4, 128), "bfloat16"), *arrays, transposed=True, implementation="xla")
    close(traced.lower().compile()(x), expected, "bfloat16")
