"""What the families build their modules of: linear maps, embeddings, norms, activations, and scanned stacks of layers.

Each takes the family's config for `initializer_range` and `param_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

__all__ = ["ACTIVATIONS", "REMAT", "Embedding", "LayerNorm", "Linear", "RMSNorm", "normal", "scan_layers", "stack"]

# A layer's results that the backward pass finds stored, on the device or in the host's memory; the rest is computed
# again.
_INPUT = "jpeft.layer_input"
REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

# By Hugging Face's names. The backward pass computes them again, so that only their inputs are kept for it.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.checkpoint(partial(jax.nn.gelu, approximate=False)),
    "gelu_new": jax.checkpoint(partial(jax.nn.gelu, approximate=True)),
    "gelu_pytorch_tanh": jax.checkpoint(partial(jax.nn.gelu, approximate=True)),
    "relu": jax.nn.relu,
    "silu": jax.checkpoint(jax.nn.silu),
}


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` in the dtype of `x`; kernel `(in, out)`."""

    def __init__(self, features_in: int, features_out: int, config, rngs: nnx.Rngs, *, bias: bool = False):
        self.kernel = nnx.Param(normal(rngs, (features_in, features_out), config))
        if bias:
            self.bias = nnx.Param(jnp.zeros(features_out, config.param_dtype))
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel.get_value().astype(x.dtype)
        return y + self.bias.get_value().astype(x.dtype) if self.has_bias else y


class Embedding(nnx.Module):
    """Rows of a `(rows, features)` table. An index outside it gives NaN, not a neighbour's row."""

    def __init__(self, rows: int, features: int, config, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs, (rows, features), config))

    def __call__(self, indices: Array) -> Array:
        return jnp.take(self.embedding.get_value(), indices, axis=0)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, features: int, eps: float, config):
        self.scale = nnx.Param(jnp.ones(features, config.param_dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias` in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, features: int, eps: float, config):
        self.scale = nnx.Param(jnp.ones(features, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, config.param_dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale, bias = (p.get_value().astype(jnp.float32) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], config) -> Array:
    """Normal numbers with the config's `initializer_range`."""
    return config.initializer_range * jax.random.normal(rngs.params(), shape, config.param_dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers in one, each parameter with a leading axis and each layer with random numbers of its own."""
    stacked = nnx.vmap(make, in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=count)(stacked)(rngs)


def scan_layers(
    layers: nnx.Module, step: Callable, x: Any, per_layer: Any = None, *, remat: str | None = None
) -> tuple[Any, Any]:
    """`x, out = step(layer, x, given)` from layer to layer of a stack; returns the last `x` and the outs, stacked.

    `per_layer` is a tree with a leading axis, of which each layer is given its slice. `remat` is a key of `REMAT`.
    """
    graph, weights = nnx.split(layers)

    def body(x, scanned):
        weights, given = scanned
        if remat == "offload":  # the name must be on what is used from here on, or the unnamed value is kept as well
            x = checkpoint_name(x, _INPUT)
        return step(nnx.merge(graph, weights), x, given)

    if remat is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (weights, per_layer))
