"""The 4-bit and 8-bit formats, held to bitsandbytes to the bit. The vectors: `tests/golden/README.md`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpeft.kernels import int8
from jpeft.kernels.nf4 import reference

GOLDEN = Path(__file__).parent.parent / "golden"
WEIGHTS = ("f32_64x128", "f32_partial_3x50", "f32_edge_8x64")


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def flat(w):
    """A weight as bitsandbytes sees it: one column."""
    return jnp.asarray(w).reshape(-1, 1)


def test_tables_are_those_of_bitsandbytes():
    tables = golden("tables")
    for name in ("nf4", "fp4"):
        np.testing.assert_array_equal(reference.CODEBOOKS[name], tables[name])
    np.testing.assert_array_equal(reference.DYNAMIC, tables["dynamic_map"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_scales_and_values_are_those_of_bitsandbytes(name):
    theirs = golden(name)
    codes, scales = reference.quantize(flat(theirs["w"]))
    np.testing.assert_array_equal(reference.pack(codes[:, 0]), theirs["packed"][:, 0])
    np.testing.assert_array_equal(scales[:, 0], theirs["absmax"])
    np.testing.assert_array_equal(reference.dequantize(codes, scales).reshape(theirs["w"].shape), theirs["deq"])
    np.testing.assert_array_equal(reference.unpack(theirs["packed"][:, 0], codes.size), codes[:, 0])


@pytest.mark.parametrize("name", WEIGHTS)
def test_double_quantized_values_are_those_of_bitsandbytes(name):
    theirs = golden(name)
    codes = reference.unpack(jnp.asarray(theirs["packed"][:, 0]), theirs["w"].size)[:, None]
    nested = theirs["q_absmax"][:, None], theirs["nested_absmax"], theirs["nested_offset"]
    ours = reference.dequantize(codes, *map(jnp.asarray, nested)).reshape(theirs["w"].shape)
    # A scale is a product plus an offset, which the compiler may round once: half an ulp of the larger of the two.
    one_rounding = np.spacing(np.float32(max(theirs["nested_absmax"].max(), abs(theirs["nested_offset"]))))
    np.testing.assert_allclose(ours, theirs["deq_nested"], rtol=1e-7, atol=float(one_rounding))


def test_scales_in_8_bits_are_the_nearest_entries():
    theirs = golden("nested_1000")
    codes, nested, offset = reference.quantize_scales(theirs["absmax"][:, None])
    np.testing.assert_array_equal(codes[:, 0], theirs["q_default"])
    # The mean's last bits are the order of the summation's, and nested scales are distances from it.
    np.testing.assert_allclose(offset, theirs["offset"], rtol=3e-7)
    np.testing.assert_allclose(nested, theirs["nested_absmax"], rtol=0, atol=3e-7 * float(offset))
    deq = reference.dequantize_scales(codes, nested, offset)[:, 0]
    # What is stored of a scale is its distance from their mean: two roundings of numbers of the mean's size.
    np.testing.assert_allclose(deq, theirs["deq_default"], rtol=0, atol=4e-7 * float(offset))


def test_a_tpu_s_decoding_of_8_bit_scales_is_the_same_to_the_bit():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        np.asarray(reference._dynamic(codes)).view(np.int32), reference.DYNAMIC.view(np.int32)
    )


def test_fp4_is_that_of_bitsandbytes():
    theirs, w = golden("fp4_64x128"), golden("f32_64x128")["w"]
    codes, scales = reference.quantize(flat(w), codebook="fp4")
    np.testing.assert_array_equal(reference.pack(codes[:, 0]), theirs["packed"][:, 0])
    np.testing.assert_array_equal(scales[:, 0], theirs["absmax"])
    deq = reference.dequantize(codes, scales, codebook="fp4")
    np.testing.assert_array_equal(deq.reshape(w.shape), theirs["deq"])
    theirs = golden("fp4_thresholds_64")
    codes, _ = reference.quantize(flat(theirs["w"]), codebook="fp4")
    np.testing.assert_array_equal(reference.pack(codes[:, 0]), theirs["packed"][:, 0])


def test_int8_is_that_of_bitsandbytes():
    theirs, w = golden("int8_64x128"), golden("f32_64x128")["w"].astype(np.float16)
    codes, absmax = int8.quantize(jnp.asarray(w.T))
    np.testing.assert_array_equal(codes.T, theirs["codes"])
    np.testing.assert_array_equal(absmax, theirs["absmax"])
    np.testing.assert_array_equal(int8.dequantize(codes, absmax).T, theirs["deq"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_weight_of_16_bits_is_quantized_as_its_float32_values(dtype):
    w = jax.random.normal(jax.random.key(0), (128, 6)).astype(dtype)
    ours, theirs = reference.quantize(w), reference.quantize(w.astype(jnp.float32))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    deq = reference.dequantize(*ours, dtype=dtype)
    assert deq.dtype == dtype
    np.testing.assert_array_equal(deq, reference.dequantize(*theirs).astype(dtype))


def test_zeros_stay_zeros_and_denormals_stay_small():
    w = np.zeros((128, 3), np.float32)
    w[:64, 1], w[64:, 2] = 1e-40, 1e-30
    for name in reference.CODEBOOKS:
        codes, scales = reference.quantize(w, codebook=name)
        deq = np.asarray(reference.dequantize(codes, scales, codebook=name))
        assert np.array_equal(deq[w == 0], w[w == 0])
        assert np.abs(deq[:64, 1]).max() <= np.finfo(np.float32).tiny
        np.testing.assert_array_equal(deq[64:, 2], w[64:, 2])
    codes, absmax = int8.quantize(w)
    assert np.isfinite(int8.dequantize(codes, absmax)).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows_in_the_scales(bad):
    w = np.ones((128, 3), np.float32)
    w[70, 1] = bad
    _, scales = reference.quantize(w)
    assert np.isfinite(scales).tolist() == [[True] * 3, [True, False, True]]
    assert not np.isfinite(reference.quantize_scales(scales)[2])
    assert np.isfinite(int8.quantize(w)[1]).tolist() == [True, False, True]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.integers(1, 5), st.integers(2, 80), st.sampled_from(["nf4", "fp4"]))
def test_every_value_is_within_half_a_step_of_its_own_in_any_shape(rows, out, block_size, codebook):
    w = np.random.default_rng(rows).standard_cauchy((2, rows, out)).astype(np.float32)
    codes, scales = reference.quantize(w, block_size=block_size, codebook=codebook)
    assert codes.shape == w.shape and scales.shape == (2, -(-rows // block_size), out)
    deq = reference.dequantize(codes, scales, block_size=block_size, codebook=codebook)
    step = np.diff(np.sort(reference.CODEBOOKS[codebook])).max() / 2
    each = np.repeat(scales, block_size, axis=1)[:, :rows]
    assert (np.abs(deq - w) <= each * step * 1.00001).all()
    for n in range(2):  # a stack of matrices is its matrices
        alone = reference.quantize(w[n], block_size=block_size, codebook=codebook)
        assert np.array_equal(alone[0], codes[n]) and np.array_equal(alone[1], scales[n])


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9))
def test_packing_an_odd_number_of_codes_loses_none(n):
    codes = jnp.arange(n, dtype=jnp.uint8).astype(jnp.uint4)
    packed = reference.pack(codes)
    assert packed.shape == ((n + 1) // 2,) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(reference.unpack(packed, n), codes)


@pytest.mark.parametrize("shape", [(64, 128), (8, 64)])
def test_blocks_along_the_inputs_are_those_of_bitsandbytes_where_they_divide(shape):
    theirs = golden(f"f32_{'' if shape == (64, 128) else 'edge_'}{shape[0]}x{shape[1]}")
    codes, scales = reference.quantize(theirs["w"].T)
    packed, absmax = reference.to_bitsandbytes(codes, scales)
    np.testing.assert_array_equal(packed, theirs["packed"])
    np.testing.assert_array_equal(absmax, theirs["absmax"])
    back = reference.from_bitsandbytes(packed, absmax, shape)
    assert np.array_equal(back[0], codes) and np.array_equal(back[1], scales)
    ours, _, _ = reference.quantize_scales(scales)
    alone, _, _ = reference.quantize_scales(flat(absmax))
    np.testing.assert_array_equal(ours.T.reshape(-1), alone[:, 0])  # groups run output by output


def test_blocks_that_cross_outputs_are_refused():
    codes, scales = reference.quantize(jnp.ones((50, 3)))
    with pytest.raises(ValueError, match="50 inputs run from one output into the next"):
        reference.to_bitsandbytes(codes, scales)
    with pytest.raises(ValueError, match="divides 50"):
        reference.from_bitsandbytes(jnp.zeros((75, 1), jnp.uint8), jnp.ones(3), (3, 50))


def relative_error(deq, w):
    return float(np.linalg.norm(np.asarray(deq, np.float64) - w) / np.linalg.norm(w))


@pytest.mark.parametrize(("block_size", "expected"), [(32, 0.0873), (64, 0.0920), (128, 0.0956), (256, 0.0987)])
def test_error_of_nf4_on_normal_weights(block_size, expected):
    w = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)
    codes, scales = reference.quantize(w, block_size=block_size)
    plain = relative_error(reference.dequantize(codes, scales, block_size=block_size), w)
    double = relative_error(reference.dequantize(codes, *reference.quantize_scales(scales), block_size=block_size), w)
    assert abs(plain - expected) < 3e-4 and abs(double - expected) < 3e-4


def test_nf4_errs_less_than_four_bit_integers_and_floats():
    w = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)
    error = {
        n: relative_error(reference.dequantize(*reference.quantize(w, codebook=n), codebook=n), w)
        for n in ("nf4", "fp4")
    }
    step = np.abs(w.reshape(-1, 64, 512)).max(1, keepdims=True) / 7
    error["int4"] = relative_error((np.round(w.reshape(-1, 64, 512) / step) * step).reshape(w.shape), w)
    for name, expected in (("nf4", 0.0920), ("fp4", 0.1220), ("int4", 0.1077)):
        assert abs(error[name] - expected) < 1e-3
    assert error["nf4"] < error["int4"] < error["fp4"]
