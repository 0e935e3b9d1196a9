"""What each compressing Method does of its own: sizes, cuts, lookups, dtypes, refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.kernels.nf4 import choose, reference
from jpeft.quant import quantizers

KEY = jax.random.key(0)
normal = lambda *shape, dtype="float32": jax.random.normal(jax.random.key(sum(shape)), shape).astype(dtype)


def linear(p, x):
    return x @ p["kernel"].astype(x.dtype)


def bound(method, fn, params, x):
    halves = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    return method.bind(*halves)


def both_ways(fn, tree, *inputs, densify=None):
    """The function of the bound tree, lifted and through the merged tree."""
    return jpeft.lift(fn, densify)(tree, *inputs), fn(jpeft.merge(tree), *inputs)


# ---- sizes ----


@pytest.mark.parametrize(("double", "expected"), [(True, 4.127), (False, 4.5)])
def test_bits_for_each_weight(double, expected):
    params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    sites = jpeft.find_sites(linear, params, x)
    method = jpeft.NF4(double_quant=double)
    _, frozen = jax.eval_shape(lambda k, p: method.init(k, p, sites), KEY, params)
    bits = sum(a.size * jax.dtypes.itemsize_bits(a.dtype) for a in jax.tree.leaves(frozen))
    assert round(bits / 4096**2, 3) == expected


def test_codes_take_four_bits_on_the_device():
    tree, x = bound(jpeft.NF4(), linear, {"kernel": normal(128, 64)}, normal(2, 128)), normal(2, 128)
    step = jax.jit(jpeft.lift(linear)).lower(tree, x).compile()
    rest = sum(a.nbytes for a in jax.tree.leaves((tree, x)) if a.dtype != jnp.uint4)
    assert abs(step.memory_analysis().argument_size_in_bytes - rest - 128 * 64 / 2) < 64


# ---- what it stands for ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cls", quantizers().values(), ids=quantizers())
def test_it_stands_for_the_leaf_in_its_shape_and_dtype(cls, dtype):
    w = bound(cls(), linear, {"kernel": normal(130, 6, dtype=dtype)}, normal(2, 130))["kernel"]
    assert w.shape == w.base.shape == (130, 6) and w.dtype == dtype and w.dense().dtype == dtype
    error = np.linalg.norm(np.float32(w.dense()) - np.float32(normal(130, 6, dtype=dtype)))
    assert error < 0.15 * np.linalg.norm(np.float32(normal(130, 6, dtype=dtype)))
    again = w.standing_for(w.dense().astype(jnp.float32))
    assert jax.tree.structure(again) == jax.tree.structure(w) and again.dtype == dtype
    np.testing.assert_allclose(np.float32(again.dense()), np.float32(w.dense()), atol=0.02)


def test_blocks_run_along_the_inputs_whatever_the_order_of_the_axes():
    w = normal(6, 4, 16)  # (out, heads, head_dim)
    params, x = {"kernel": w}, normal(2, 4, 16)
    fn = lambda p, x: jnp.einsum("bhd,ohd->bo", x, p["kernel"])
    leaf = bound(jpeft.NF4(block_size=32, double_quant=False), fn, params, x)["kernel"]
    matrix = w.reshape(6, 64).T
    codes, scales = reference.quantize(matrix, block_size=32)
    assert np.array_equal(leaf.base.reshape(6, 64).T, codes) and np.array_equal(leaf.scales, scales)
    lifted, merged = both_ways(fn, {"kernel": leaf}, x)
    np.testing.assert_allclose(lifted, merged, atol=1e-5)


# ---- cuts ----


@pytest.mark.parametrize("double", [True, False])
def test_a_slice_of_the_outputs_stays_compressed(double):
    fn = lambda p, x: x @ p["kernel"][:, 3:17] + x @ jnp.split(p["kernel"], 2, axis=1)[1][:, :14]
    tree = bound(jpeft.NF4(double_quant=double), fn, {"kernel": normal(70, 40)}, normal(2, 70))
    lifted, merged = both_ways(fn, tree, normal(2, 70))
    np.testing.assert_allclose(lifted, merged, atol=1e-5)


def test_a_slice_of_the_inputs_crosses_blocks_and_is_refused():
    fn = lambda p, x: x[:, :5] @ p["kernel"][:5]
    params, x = {"kernel": normal(70, 40)}, normal(2, 70)
    tree = bound(jpeft.NF4(), fn, params, x)
    with pytest.raises(jpeft.DensifyError, match="'kernel' holds a NormalFloat4"):
        jpeft.lift(fn)(tree, x)
    lifted, merged = both_ways(fn, tree, x, densify="kernel")
    np.testing.assert_allclose(lifted, merged, atol=1e-5)
    tree = bound(jpeft.Int8(), fn, params, x)  # its scale is for all inputs
    np.testing.assert_allclose(*both_ways(fn, tree, x), atol=1e-5)


@pytest.mark.parametrize("method", [jpeft.NF4(), jpeft.NF4(double_quant=False), jpeft.Int8()], ids=str)
def test_outputs_may_be_split_over_a_mesh(method):
    """Alone and under LoRA. A group of 256 8-bit scales is here of 85 outputs and a third: shards end within groups."""
    auto, spec = jax.sharding.AxisType.Auto, jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(auto,))
    local = lambda w, x: x @ w
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec(None, "tp"), spec()), out_specs=spec(None, "tp"))
    fn = lambda p, x: sharded(p["kernel"], x)
    params, x = {"kernel": normal(150, 320)}, normal(2, 150)
    both = jpeft.chain(method, jpeft.LoRA(rank=2))
    trainable, frozen = both.init(KEY, params, jpeft.find_sites(fn, params, x))
    run = jax.jit(jpeft.lift(fn))
    codes = {"uint4": "u4", "int8": "s8"}[bound(method, fn, params, x)["kernel"].base.dtype.name]
    for tree in (bound(method, fn, params, x), both.bind(jax.tree.map(lambda a: a + 0.1, trainable), frozen)):
        np.testing.assert_allclose(run(tree, x), linear(jpeft.merge(tree), x), rtol=1e-5, atol=1e-4)
        assert f"{codes}[150,40]" in run.lower(tree, x).compile().as_text(), "every device has its own codes, packed"
        sums = (
            jax.grad(lambda x, f=f, t=tree: jnp.sin(f(t, x)).sum())(x)
            for f in (run, lambda t, x: linear(jpeft.merge(t), x))
        )
        np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-3)


def test_inputs_that_the_mesh_splits_cross_blocks_and_are_refused():
    auto, spec = jax.sharding.AxisType.Auto, jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(auto,))
    local = lambda w, x: jax.lax.psum(x @ w, "tp")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec("tp"), spec(None, "tp")), out_specs=spec())
    fn = lambda p, x: sharded(p["kernel"], x)
    params, x = {"kernel": normal(128, 8)}, normal(2, 128)
    with pytest.raises(jpeft.DensifyError, match="cannot be cut along the 'i' axes"):
        jpeft.lift(fn)(bound(jpeft.NF4(), fn, params, x), x)


# ---- lookups ----


@pytest.mark.parametrize("cls", quantizers().values(), ids=quantizers())
@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_a_lookup_decodes_the_rows_it_takes_and_treats_others_as_the_dense_table_does(cls, mode):
    fn = lambda p, tokens: jnp.take(p["table"], tokens, axis=0, mode=mode)
    tokens = jnp.array([[0, 63, 64], [69, 70, 1000]])
    tree = bound(cls(targets="embedding"), fn, {"table": normal(70, 12)}, tokens)
    lifted, merged = both_ways(fn, tree, tokens)
    np.testing.assert_array_equal(lifted, merged)
    assert np.isnan(lifted).any() == (mode == "fill")
    text = jax.jit(jpeft.lift(fn)).lower(tree, tokens).as_text()
    assert "tensor<70x12xf32>" not in text, "the whole table is decoded"


def test_a_tied_table_is_looked_up_and_multiplied():
    fn = lambda p, tokens: p["table"][tokens] @ p["table"].T
    tokens = jnp.array([0, 63, 64, 69])
    tree = bound(jpeft.NF4(targets="table"), fn, {"table": normal(70, 12)}, tokens)
    np.testing.assert_allclose(*both_ways(fn, tree, tokens), atol=1e-5)


# ---- dtypes ----


@pytest.mark.parametrize("cls", quantizers().values(), ids=quantizers())
def test_products_are_in_the_compute_dtype_and_the_result_in_the_activations(cls):
    params, x = {"kernel": normal(128, 8)}, normal(3, 128)
    tree = bound(cls(compute_dtype="bfloat16"), linear, params, x)
    dense = jpeft.merge(tree)["kernel"]
    run = jax.jit(jpeft.lift(linear))
    text = run.lower(tree, x).as_text()
    assert "dot_general" in text and re.search("tensor<(128|2x64)x8xbf16>", text)  # a matrix, or its blocks
    y = run(tree, x)
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32) @ dense.astype(jnp.bfloat16).astype(jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded, atol=2e-5 * float(jnp.abs(rounded).max()))
    pulled = jax.grad(lambda x: run(tree, x).sum())(x)
    assert pulled.dtype == jnp.float32
    np.testing.assert_allclose(pulled, jnp.broadcast_to(dense.sum(1), x.shape), atol=0.1)


def test_an_activation_of_16_bits_is_multiplied_in_16_bits():
    params, x = {"kernel": normal(128, 8)}, normal(3, 128, dtype="bfloat16")
    lifted, merged = both_ways(linear, bound(jpeft.NF4(), linear, params, x), x)
    assert lifted.dtype == merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(lifted), np.float32(merged), atol=2**-7 * float(jnp.abs(merged).max()))


# ---- with other methods ----


def test_qlora_starts_at_the_compressed_function_and_merges_in_full_precision():
    params, x = {"kernel": normal(128, 8, dtype="bfloat16")}, normal(3, 128)
    sites = jpeft.find_sites(linear, params, x)
    method = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=4))
    trainable, frozen = method.init(KEY, params, sites)
    compressed = jpeft.NF4().init(KEY, params, sites)
    only = jpeft.NF4().bind(*compressed)
    np.testing.assert_array_equal(jpeft.lift(linear)(method.bind(trainable, frozen), x), jpeft.lift(linear)(only, x))
    assert trainable[1]["kernel"].a.dtype == jnp.float32
    update = jax.tree.map(lambda v: v + 0.1, trainable)
    merged = jpeft.merge(method.bind(update, frozen))["kernel"]
    exact = only["kernel"].dense().astype(jnp.float32) + update[1]["kernel"].a @ update[1]["kernel"].b * 2
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(merged), exact, atol=2**-7 * float(jnp.abs(exact).max()))


def test_a_model_that_came_compressed_is_adapted_as_it_is():
    x = normal(2, 128)
    tree = bound(jpeft.NF4(), linear, {"kernel": normal(128, 8)}, x)
    method = jpeft.LoRA(rank=2)
    trainable, frozen = method.init(KEY, tree, jpeft.find_sites(linear, tree, x))
    assert frozen["kernel"].base.base is tree["kernel"].base
    np.testing.assert_allclose(*both_ways(linear, method.bind(trainable, frozen), x), atol=1e-5)


# ---- refusals ----


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("method", [jpeft.NF4(), jpeft.FP4(double_quant=False), jpeft.Int8()])
def test_weights_that_are_not_finite_are_refused_by_name(method, bad):
    params, x = {"kernel": normal(128, 8).at[100, 3].set(bad)}, normal(2, 128)
    with pytest.raises(ValueError, match="^kernel: expected finite weights"):
        method.init(KEY, params, jpeft.find_sites(linear, params, x))


def test_an_adapted_leaf_is_not_compressed():
    params, x = {"kernel": normal(128, 8)}, normal(2, 128)
    sites = jpeft.find_sites(linear, params, x)
    with pytest.raises(ValueError, match="a LowRank stands there already; put NF4 first in the chain"):
        jpeft.chain(jpeft.LoRA(), jpeft.NF4()).init(KEY, params, sites)


def test_codes_do_not_train():
    params, x = {"kernel": normal(128, 8)}, normal(2, 128)
    sites = jpeft.find_sites(linear, params, x)
    for method in (jpeft.FullFineTuning(), jpeft.LoRA(modules_to_save=("kernel",))):
        with pytest.raises(ValueError, match=f"{type(method).__name__} cannot train kernel: whole numbers stand there"):
            jpeft.chain(jpeft.Int8(), method).init(KEY, params, sites)


@pytest.mark.parametrize("block_size", [1, 0, 64.0, None])
def test_a_block_size_is_a_whole_number(block_size):
    with pytest.raises(ValueError, match="expected a whole block_size >= 2"):
        jpeft.NF4(block_size=block_size)


@pytest.mark.parametrize("dtype", ["int8", "bf17", 3.5, "float8_e4m3fn"])
def test_a_compute_dtype_is_a_float(dtype):
    with pytest.raises(ValueError, match="expected compute_dtype among bfloat16, float16, float32, float64, got"):
        jpeft.Int8(compute_dtype=dtype)


def test_a_compute_dtype_that_the_hardware_lacks_is_refused(monkeypatch):
    params, x = {"kernel": normal(128, 8)}, normal(2, 128)
    sites = jpeft.find_sites(linear, params, x)
    with pytest.raises(ValueError, match=r"kernel: compute_dtype='float64' needs jax.config.update"):
        jpeft.NF4(compute_dtype="float64").init(KEY, params, sites)
    jpeft.NF4(compute_dtype="float16").init(KEY, params, sites)
    monkeypatch.setattr(choose, "target", lambda: choose.Target("tpu", "TPU v5 lite"))
    with pytest.raises(ValueError, match="a TPU multiplies in bfloat16 and float32, got compute_dtype='float16'"):
        jpeft.NF4(compute_dtype="float16").init(KEY, params, sites)


@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64"])
@pytest.mark.parametrize("cls", quantizers().values(), ids=quantizers())
def test_leaves_without_a_fraction_or_with_two_parts_are_refused(cls, dtype):
    params, x = {"kernel": jnp.ones((128, 8), dtype)}, jnp.ones((2, 128), dtype)
    fn = lambda p, x: x @ p["kernel"]
    with pytest.raises(ValueError, match=f"kernel: expected real weights with a fraction, got {dtype}"):
        cls().init(KEY, params, jpeft.find_sites(fn, params, x))


def test_the_bases_say_what_a_subclass_defines():
    from jpeft.quant.packed import Packed

    w = Packed(jnp.zeros((2, 2), jnp.int8), axes="io", leaf_dtype=jnp.dtype("float32"))
    for call in (lambda: Packed.encode(w.base), w.matrix, lambda: w.rows(None, None)):
        with pytest.raises(TypeError, match="Packed defines no"):
            call()
