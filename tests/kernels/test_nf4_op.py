"""The product with a packed weight equals the product with the dense one, forward and backward, and keeps nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.kernels.nf4 import reference
from jpeft.kernels.nf4.op import nf4_matmul

K, N = 96, 40


def packed(double, block_size=64):
    w = jax.random.normal(jax.random.key(0), (K, N))
    codes, scales = reference.quantize(w, block_size=block_size)
    return codes, *(reference.quantize_scales(scales) if double else (scales,))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_equals_the_product_with_the_dense_weight(transposed, double, dtype):
    arrays = packed(double)
    dense = reference.dequantize(*arrays, dtype=dtype)
    dense = dense.T if transposed else dense
    x = jax.random.normal(jax.random.key(1), (2, 3, dense.shape[0])).astype(dtype)
    ours = lambda x: nf4_matmul(x, *arrays, transposed=transposed)
    theirs = lambda x: x @ dense
    size = float(jnp.abs(theirs(x)).max())
    tolerance = 5e-6 * size if dtype == "float32" else 2**-8 * size
    for a, b in (
        (ours(x), theirs(x)),
        (jax.grad(lambda x: jnp.sin(ours(x)).sum())(x), jax.grad(lambda x: jnp.sin(theirs(x)).sum())(x)),
        (jax.vmap(ours)(x), theirs(x)),
    ):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance)


def test_dtypes_are_the_ones_asked_for():
    arrays, x = packed(False), jnp.ones((2, K), jnp.bfloat16)
    y, pull = jax.vjp(lambda x: nf4_matmul(x, *arrays, dtype="float32", result="float32", rounded="float16"), x)
    dense = reference.dequantize(*arrays, dtype="float16").astype(jnp.float32)
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ dense, rtol=1e-6)
    assert y.dtype == jnp.float32 and pull(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("double", [False, True])
def test_nothing_is_kept_for_the_backward_pass_but_the_packed_arrays(double):
    arrays = packed(double)
    _, pull = jax.vjp(lambda x: nf4_matmul(x, *arrays), jnp.ones((5, K)))
    kept = sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(pull))
    assert kept == sorted((x.shape, str(x.dtype)) for x in arrays)


def test_a_deeper_scan_keeps_no_dense_weights():
    size = 256

    def loss(x, layers):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(nf4_matmul(x, *layer)), None), x, layers)[0].sum()

    def room(n):
        layers = reference.quantize(jax.random.normal(jax.random.key(0), (n, size, size)) / 16)
        step = jax.jit(jax.grad(loss)).lower(jnp.ones((4, size)), layers).compile()
        return step.memory_analysis().temp_size_in_bytes

    dense = 4 * size * size
    assert room(2) < 4 * dense and room(12) - room(2) < 10 * dense / 2


def test_each_backward_pass_decodes_behind_a_barrier_of_its_own():
    """Where layers are unrolled the compiler could merge the two decodings, and keep the dense weight in between."""
    codes, scales = packed(False)
    fn = lambda x: nf4_matmul(nf4_matmul(x, codes, scales), codes, scales, transposed=True).sum()
    text = jax.jit(jax.grad(fn)).lower(jnp.ones((2, K))).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert len(barriers) == 2 and all(f"{K}x{N}xui4" in line for line in barriers)


def test_codes_have_no_gradient_and_scales_have_none():
    codes, scales = packed(False)
    x = jnp.ones((2, K))
    grads = jax.grad(lambda x, s: nf4_matmul(x, codes, s).sum(), argnums=(0, 1))(x, scales)
    assert np.any(grads[0]) and not np.any(grads[1])
