"""Bottleneck adapters: small two-layer networks beside the frozen layers, and what their methods have in common.

    y' = y + s·norm(up(act(down(norm(h)))))        down (d, m), up (m, d), each with a bias; m much smaller than d

y is what a layer puts out, its bias included, in front of the residual sum and of a norm that follows. So the Weight
stands at the layer's bias, or at its kernel where there is none. A sequential adapter reads h = y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.biases import ends
from jpeft.core.method import Method
from jpeft.core.ops import NotAnOp
from jpeft.core.sites import Site, Sites
from jpeft.core.weight import Weight, apply, dense, matrix_sizes, static, weight

__all__ = ["ACTIVATIONS", "Acting", "Bottleneck"]

# As torch and transformers name them; every other name is one of jax.nn (whose own gelu is an approximation).
ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "leakyrelu": jax.nn.leaky_relu,
}


def activation_of(name: str) -> Callable | None:
    """The function of a name, from an array to one of its shape; None where there is none."""
    fn = ACTIVATIONS.get(name) or getattr(jax.nn, name, None)
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    try:
        return fn if callable(fn) and jax.eval_shape(fn, x).shape == x.shape else None
    except Exception:  # it takes other arguments, or more of them
        return None


class Acting(Weight):
    """A Weight that acts on what its layer puts out. A subclass is decorated with `@weight` and defines `update`."""

    def update(self, op, y) -> jax.Array:
        """What is added to the outputs y (*batch, *free, d)."""
        raise TypeError(f"{type(self).__name__} defines no update")

    def apply(self, op, x):
        if op.transposed:
            raise NotAnOp("the adapter is for the leaf's outputs, and the product has its inputs in their place")
        return self._changed(op, apply(op, x, self.base))

    def added(self, op, x):
        y = self.base.added(op, x) if isinstance(self.base, Weight) else None
        return self._changed(op, op.base(x, dense(self.base)) if y is None else y)

    def _changed(self, op, y):
        return op.map_outputs(y, lambda y: y + self.update(op, y).astype(y.dtype))

    def dense(self):
        raise ValueError(
            f"a {type(self).__name__} has no dense form: {self.why_not_merge()}. "
            "In a chain a method that needs the dense weight goes before it"
        )

    def why_not_merge(self):
        return (
            "an adapter with a nonlinearity acts on what the layer puts out, and no weight amounts to that; "
            "run the bound tree with jpeft.lift"
        )


class TwoLayers(Acting):
    """`scale · norm(up(act(down(norm(h)))))`. A subclass has the fields below and defines `down_from` and `up_from`.

    Shapes: before, after (*stack, *batch, 2, d), scale and bias of the norms, or None.
    """

    before: jax.Array | None
    after: jax.Array | None
    activation: str
    scale: float

    def down_from(self, op, h) -> jax.Array:
        """h (*batch, *free, d) in the bottleneck, (*batch, *free, m)."""
        raise TypeError(f"{type(self).__name__} defines no down_from")

    def up_from(self, op, h) -> jax.Array:
        """The inverse direction."""
        raise TypeError(f"{type(self).__name__} defines no up_from")

    def read(self, op, y) -> jax.Array:
        """What the adapter reads. Default: the layer's outputs."""
        return y

    def update(self, op, y):
        h = self.down_from(op, _normed(op, self.read(op, y), self.before))
        h = _normed(op, self.up_from(op, activation_of(self.activation)(h)), self.after)  # type: ignore[misc]
        return h * jnp.asarray(self.scale, h.dtype)


def _normed(op, h, norm):
    """LayerNorm with the scale and bias in `norm`, in float32; h itself where that is None."""
    if norm is None:
        return h
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    return (wide * op.spread(norm[..., 0, :]) + op.spread(norm[..., 1, :])).astype(h.dtype)


def affine(op, h, kernel, bias):
    """h·kernel + bias with kernel (*batch, in, out) and bias (*batch, out)."""
    h = op.mix(h, kernel)
    return h + op.spread(bias).astype(h.dtype)


@weight
class Bottleneck(TwoLayers):
    """An adapter of two dense layers.

    Shapes: down (*stack, *batch, d, m), down_bias (*stack, *batch, m), up (*stack, *batch, m, d), up_bias (*stack,
    *batch, d); before and after as `TwoLayers`.
    """

    base: Any
    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    before: Any = None
    after: Any = None
    axes: str = static()
    activation: str = static()
    scale: float = static(default=1.0)

    FIELDS = {"down": "hm", "down_bias": "m", "up": "mo", "up_bias": "o", "before": "nh", "after": "no"}
    TRAINABLE = frozenset(FIELDS)
    UP = frozenset({"up"})

    def down_from(self, op, h):
        return affine(op, h, self.down, self.down_bias)

    def up_from(self, op, h):
        return affine(op, h, self.up, self.up_bias)


@dataclass(frozen=True)
class _AdapterMethod(Method):
    """What the adapter methods have in common, whatever their layers are made of.

    Fields:
        bottleneck: the adapter's inner size m; d / reduction where None.
        reduction: d / m.
        activation: a name of `jax.nn`, or "gelu" (exact), "gelu_new" (its approximation), "leakyrelu".
        ln_before, ln_after: a new LayerNorm at the adapter's input; at its output, in front of the sum with y.
    """

    bottleneck: int | None = None
    reduction: int = 16
    activation: str = "relu"
    ln_before: bool = False
    ln_after: bool = False

    KINDS = ("dense", "experts")

    def __post_init__(self):
        super().__post_init__()
        self._at_least_one("reduction", *(["bottleneck"] if self.bottleneck is not None else []))
        if activation_of(self.activation) is None:
            raise ValueError(
                f"expected activation as a name of jax.nn, or one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected a whole {name} >= 1, got {name}={value}")

    def matched(self, sites: Sites) -> dict[str, Site]:
        return ends(sites, self.targets, self.KINDS)

    def width_of(self, site: Site) -> int:
        """The inner size m at a site."""
        return self.bottleneck or matrix_sizes(site.shape, site.axes)[2] // self.reduction

    def check(self, site: Site) -> str | None:
        width = matrix_sizes(site.shape, site.axes)[2]
        if self.bottleneck is None and width % self.reduction:
            return f"its {width} outputs are not divisible by reduction={self.reduction}; write bottleneck=..."
        return None

    def norms(self, lead, n_in: int, n_out: int, dtype) -> dict[str, Any]:
        """The fields `before` and `after` at the start."""
        norm = lambda n: jnp.stack([jnp.ones((*lead, n), dtype), jnp.zeros((*lead, n), dtype)], -2)
        return {"before": norm(n_in) if self.ln_before else None, "after": norm(n_out) if self.ln_after else None}


@dataclass(frozen=True)
class _BottleneckMethod(_AdapterMethod):
    """Adapters of dense layers.

    Fields:
        init_weights: how kernels start, in the words of the `adapters` package: "houlsby" (both truncated normal),
            "bert" (both normal), "mam_adapter" (down uniform in ±1/√d, up zero). Biases start at zero.
        init_std: of the first two.
    """

    init_weights: Literal["houlsby", "bert", "mam_adapter"] = "bert"
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.init_weights not in ("houlsby", "bert", "mam_adapter"):
            raise ValueError(f"expected init_weights 'houlsby', 'bert' or 'mam_adapter', got {self.init_weights!r}")
        if self.init_std <= 0:
            raise ValueError(f"expected init_std > 0, got init_std={self.init_std}")

    @property
    def NO_OP_AT_START(self) -> bool:  # type: ignore[override]  # noqa: N802
        return self.init_weights == "mam_adapter"

    def wrap(self, key, leaf, site: Site) -> Weight:
        lead, _, width = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        arrays = self.arrays(key, lead, width, self.width_of(site), width, dtype)
        return Bottleneck(leaf, **arrays, axes=site.axes.lstrip("s"), activation=self.activation)

    def arrays(self, key, lead, n_in: int, m: int, n_out: int, dtype) -> dict[str, Any]:
        """The fields of a `Bottleneck` at the start."""
        down_key, up_key = jax.random.split(key)
        zeros = lambda *shape: jnp.zeros((*lead, *shape), dtype)
        starts_off = self.init_weights == "mam_adapter"
        return {
            "down": self.kernel(down_key, (*lead, n_in, m), dtype),
            "down_bias": zeros(m),
            "up": zeros(m, n_out) if starts_off else self.kernel(up_key, (*lead, m, n_out), dtype),
            "up_bias": zeros(n_out),
            **self.norms(lead, n_in, n_out, dtype),
        }

    def kernel(self, key, shape, dtype) -> jax.Array:
        """One kernel (*lead, in, out) by `init_weights`."""
        if self.init_weights == "mam_adapter":
            bound = 1 / math.sqrt(shape[-2])
            return jax.random.uniform(key, shape, dtype, -bound, bound)
        if self.init_weights == "houlsby":
            return self.init_std * jax.random.truncated_normal(key, -2, 2, shape, dtype)
        return self.init_std * jax.random.normal(key, shape, dtype)
