"""The product of an activation with a packed 4-bit weight, in both directions, from the same packed codes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.kernels.nf4 import choose, gpu, reference, tpu

__all__ = ["nf4_matmul"]


@dataclass(frozen=True)
class _How:
    """What the product must know besides its arrays."""

    block_size: int
    codebook: str
    transposed: bool
    rounded: Any  # the dtype of the weight that the codes stand for
    dtype: Any
    precision: Any
    result: Any
    implementation: str | None
    interpret: bool


def nf4_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None = None,
    offset: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    block_size: int = 64,
    codebook: str = "nf4",
    transposed: bool = False,
    rounded: Any = None,
    dtype: Any = None,
    precision: Any = None,
    result: Any = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x @ W`, or `x @ Wᵀ` where `transposed`, for the W (in, out) that `reference.dequantize` gives.

    Linear in x alone. The backward pass decodes W again from the packed arrays: nothing else is kept for it, neither a
    dense W nor x, and an optimization barrier on x and the codes keeps the compiler from merging the two decodings.

    Args:
        x: (*rows, in), or (*rows, out) where `transposed`.
        codes, scales, nested, offset, block_size, codebook: as in `reference`, without leading axes.
        layer: which layer's codes these are, where `codes` is a stack (layers, in, out); () int32. The TPU kernel reads
            them in the stack.
        rounded: dtype of the weight that was quantized; W is rounded to it first. None: not rounded.
        dtype: of both operands of the product; x's own where None.
        precision: as in `lax.dot_general`.
        result: dtype of the result; x's own where None.
        implementation: "xla", or "tpu" or "gpu" for a Pallas kernel, in both directions; None takes what `choose` finds
            best for each, and `choose.why` says why.
        interpret: run the kernel as plain JAX, on any platform; slow, for tests. The TPU's unless "gpu" is asked for.

    Raises:
        ValueError: an implementation that cannot take the product, forward or backward.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jpeft.kernels.nf4 import choose, gpu, reference, tpu
        >>> codes, scales = reference.quantize(jax.random.normal(jax.random.key(0), (128, 8)))
        >>> nf4_matmul(jnp.ones((2, 128)), codes, scales).shape
        (2, 8)
    """
    name = lambda given, default: jnp.dtype(default if given is None else given)
    how = _How(
        block_size,
        codebook,
        transposed,
        name(rounded, jnp.float32),
        name(dtype, x.dtype),
        precision,
        name(result, x.dtype),
        implementation,
        interpret,
    )
    return _matmul(how, jnp.dtype(x.dtype), x, (codes, scales, nested, offset, layer))


def _product(how: _How, x, packed):
    codes, rows = packed[0], math.prod(x.shape[:-1])
    product = choose.Product(rows, codes.shape[-2:], how.block_size, how.transposed, how.dtype, how.rounded)
    choice = choose.choose(product, None, how.implementation, how.interpret)
    plain = functools.partial(_in_xla, how)
    if choice.chip is None:
        return plain(x, packed)
    kernel = functools.partial(_in_kernel, how, choice)
    if how.implementation or how.interpret:
        return kernel(x, packed)
    platform = {"tpu": "tpu", "gpu": "cuda"}[choice.implementation]
    return lax.platform_dependent(x, packed, **{platform: kernel}, default=plain)


def _in_xla(how: _How, x, packed):
    codes, scales, layer = _with_plain_scales(packed)
    codes = _layer_of(codes, layer)
    rows, blocks = codes.shape[0], scales.shape[0]
    if rows == blocks * how.block_size:  # then the scales' broadcast fuses into the product, where the barrier is first
        codes, scales = codes.reshape(blocks, how.block_size, -1), scales[:, None, :]
    else:
        codes, scales = codes[None], reference.spread(scales, how.block_size, rows)[None]
    x, codes = lax.optimization_barrier((x, codes))
    w = reference.lookup(codes, reference.CODEBOOKS[how.codebook]) * scales
    w, x = w.astype(how.rounded).astype(how.dtype), x.astype(how.dtype)
    dot = functools.partial(lax.dot_general, precision=how.precision, preferred_element_type=how.result)
    if how.transposed:
        return dot(x, w, (((x.ndim - 1,), (2,)), ((), ()))).reshape(*x.shape[:-1], rows)
    x = x.reshape(*x.shape[:-1], *w.shape[:2])
    return dot(x, w, (((x.ndim - 2, x.ndim - 1), (0, 1)), ((), ())))


def _in_kernel(how: _How, choice: choose.Choice, x, packed):
    codes, scales, layer = _with_plain_scales(packed)
    if choice.implementation != "tpu":
        codes, layer = _layer_of(codes, layer), None
    in_stack = [] if layer is None else [layer]
    y = _kernel(how, choice)(x.astype(how.dtype).reshape(-1, x.shape[-1]), codes, scales, *in_stack)
    return y.reshape(*x.shape[:-1], -1)


def _with_plain_scales(packed):
    """`(codes, scales, layer)`, the scales float32."""
    codes, scales, nested, offset, layer = packed
    if nested is not None and offset is not None:
        scales = reference.dequantize_scales(scales, nested, offset)
    return codes, scales, layer


def _layer_of(codes, layer):
    return codes if layer is None else lax.dynamic_index_in_dim(codes, layer, keepdims=False)


@functools.cache
def _kernel(how: _How, choice: choose.Choice):
    """The kernel under a `vmap` that knows: more of x alone are more rows, and its weights are decoded once."""
    kernel = functools.partial(
        {"tpu": tpu.matmul, "gpu": gpu.matmul}[choice.implementation],
        chip=choice.chip,
        codebook=tuple(reference.CODEBOOKS[how.codebook].tolist()),
        block_size=how.block_size,
        transposed=how.transposed,
        result=how.result,
        interpret=how.interpret,
    )
    batching = jax.custom_batching.custom_vmap(kernel)

    @batching.def_vmap
    def _(size, batched, x, *weight):
        if any(batched[1:]):
            return jax.vmap(kernel, [0 if b else None for b in batched], axis_size=size)(x, *weight), True
        return batching(x.reshape(-1, x.shape[-1]), *weight).reshape(*x.shape[:-1], -1), True

    return batching


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(how: _How, x_dtype, x, packed):
    return _product(how, x, packed)


def _forward(how, x_dtype, x, packed):  # through the rule again, which second derivatives need
    return _matmul(how, x_dtype, x, packed), packed


def _backward(how, x_dtype, packed, g):
    how = replace(how, transposed=not how.transposed, result=x_dtype)
    return _matmul(how, jnp.dtype(g.dtype), g, packed), None


_matmul.defvjp(_forward, _backward)
