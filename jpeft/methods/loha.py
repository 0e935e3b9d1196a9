"""LoHa: low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS, Yeh et al. 2023,
arXiv 2309.14859).

    ΔW = s · (A₁·B₁) ∘ (A₂·B₂),        s = alpha / rank

with each A (*stack, *batch, in, rank) and B (*stack, *batch, rank, out): the update's rank is up to rank². With
`effective_conv` (FedPara's proposition 3) the factors of a convolution know its window: each is then

    Σ_qr T[q, r, window] · A[channels, r] · B[q, out]

All start Kaiming-uniform as in FedPara, A₂ at zero; in LyCORIS normally distributed, and B₂ is at zero. The update's
only product with x is that of a dense matrix; a lookup of rows forms those rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.ops import Gather
from jpeft.core.sites import Site
from jpeft.core.update import Update, from_channels_first
from jpeft.core.weight import apply, matrix_sizes, static, weight
from jpeft.methods._factors import kaiming_uniform, rank_problem, window_of

__all__ = ["LoHa", "HadamardProduct", "WindowedProduct"]


@weight
class HadamardProduct(Update):
    """`base + scale · (a1 @ b1) ∘ (a2 @ b2)`. Shapes: a (*stack, *batch, in, rank), b (*stack, *batch, rank, out)."""

    base: Any
    a1: Any
    b1: Any
    a2: Any
    b2: Any
    axes: str = static()
    scale: float = static(1.0)

    FIELDS = {"a1": "ir", "b1": "ro", "a2": "ir", "b2": "ro"}
    TRAINABLE = frozenset({"a1", "b1", "a2", "b2"})
    SLICEABLE = "io"

    def apply(self, op, x):
        if not isinstance(op, Gather):
            return super().apply(op, x)
        y = apply(op, x, self.base)
        pairs = ((self.a1, self.b1), (self.a2, self.b2))
        down_up = [(b.mT, a.mT) for a, b in pairs] if op.transposed else pairs
        first, second = (op.mix(op.contract(x, down), up) for down, up in down_up)
        return y + op.restore(first * second * self.scale).astype(y.dtype)

    def matrix(self):
        first, second = self._factor(self.a1, self.b1), self._factor(self.a2, self.b2)
        return first * second * jnp.asarray(self.scale, self.wide)

    def _factor(self, a, b):
        return jnp.matmul(a.astype(self.wide), b.astype(self.wide), precision="highest")


@weight
class WindowedProduct(HadamardProduct):
    """As `HadamardProduct`, for a convolution, whose input channels are at `channels`, counted from the last axis.

    Shapes: a (*stack, channels, rank), b (*stack, rank, out), t (*stack, rank, rank, window).
    """

    t1: Any = None
    t2: Any = None
    axes: str = static()
    channels: int = static()

    FIELDS = {"a1": "cr", "b1": "qo", "a2": "cr", "b2": "qo", "t1": "qrw", "t2": "qrw"}
    TRAINABLE = frozenset(FIELDS)
    SLICEABLE = "o"

    def matrix(self):
        first, second = self._windowed(self.a1, self.b1, self.t1), self._windowed(self.a2, self.b2, self.t2)
        return from_channels_first(first * second * jnp.asarray(self.scale, self.wide), self, self.channels)

    def _windowed(self, a, b, t):
        """(*stack, channels · window, out)."""
        factors = (x.astype(self.wide) for x in (t, a, b))
        whole = jnp.einsum("...qrw,...cr,...qo->...cwo", *factors, precision="highest")
        return whole.reshape(*whole.shape[:-3], -1, whole.shape[-1])


@dataclass(frozen=True)
class LoHa(Method):
    """An update that is the elementwise product of two low-rank ones. Mergeable; no update at the start.

    Fields:
        rank: of each of the two; the update's is up to its square.
        alpha: numerator of the scale.
        init_weights: `"kaiming"` (FedPara, HF PEFT) or `"normal"` (LyCORIS).
        effective_conv: let the factors of convolutions know the window (of more than one place). HF PEFT's
            `use_effective_conv2d`.

    Raises:
        ValueError: from the constructor: a rank below 1, an unknown init_weights; from `init`: a rank above
            min(in, out) of a site (with `effective_conv` above min(channels, out)), `effective_conv` without a
            convolution to adapt.

    Example:
        >>> import jpeft
        >>> jpeft.LoHa(rank=16, alpha=32.0).rank
        16
    """

    rank: int = 8
    alpha: float = 8.0
    init_weights: Literal["kaiming", "normal"] = "kaiming"
    effective_conv: bool = False

    FORMS_DENSE_UPDATE = "an elementwise product of matrices has no product with a vector but its own"
    EXPORT = Export(
        "LOHA",
        tensors={
            kind: {
                "hada_w1_a": ("b1", "or"),
                "hada_w1_b": ("a1", inputs),
                "hada_w2_a": ("b2", "or"),
                "hada_w2_b": ("a2", inputs),
            }
            for kind, inputs in (("dense", "ri"), ("conv", "r(i)"))
        },
        config={"r": "rank", "alpha": "alpha"},
        fixed={"init_weights": True, "use_effective_conv2d": False},
        neutral={"init_weights": (False,), "rank_dropout": (), "module_dropout": ()},
        required={"effective_conv": False},
    )
    SMALL = {"rank": 3}

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1, got rank={self.rank}")
        if self.init_weights not in ("kaiming", "normal"):
            raise ValueError(f"expected init_weights in ('kaiming', 'normal'), got {self.init_weights!r}")

    def chosen(self, sites):
        chosen = super().chosen(sites)
        if self.effective_conv and not any(window_of(site)[1] > 1 for site in chosen.values()):
            raise ValueError("effective_conv=True has no effect: no convolution with a window is adapted; see targets")
        return chosen

    def check(self, site: Site) -> str | None:
        channels, window = window_of(site)
        n_out = matrix_sizes(site.shape, site.axes)[2]
        if self.effective_conv and window > 1 and self.rank > min(channels, n_out):
            return f"rank {self.rank} is above min(channels, out) = min({channels}, {n_out}); write a smaller one"
        return rank_problem(self.rank, site)

    def wrap(self, key, leaf, site: Site) -> HadamardProduct:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        channels, window = window_of(site)
        windowed = self.effective_conv and window > 1
        rank, inputs = self.rank, channels if windowed else n_in
        keys = iter(jax.random.split(key, 6))
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)

        def start(*shape, fan_in, std):
            if self.init_weights == "kaiming":
                return kaiming_uniform(next(keys), (*lead, *shape), fan_in, dtype)
            return std * jax.random.normal(next(keys), (*lead, *shape), dtype)

        into = [start(inputs, rank, fan_in=inputs, std=1.0) for _ in range(2)]
        out = [start(rank, n_out, fan_in=n_out if windowed else rank, std=0.1) for _ in range(2)]
        zero = into if self.init_weights == "kaiming" else out
        zero[1] = jnp.zeros_like(zero[1])
        fields = {"a1": into[0], "b1": out[0], "a2": into[1], "b2": out[1]}
        options = {"axes": site.axes.lstrip("s"), "scale": self.alpha / rank}
        if not windowed:
            return HadamardProduct(leaf, **fields, **options)
        assert site.channels is not None, "only a convolution has a window"
        t1, t2 = (start(rank, rank, window, fan_in=rank * window, std=0.1) for _ in range(2))
        return WindowedProduct(leaf, **fields, t1=t1, t2=t2, channels=site.channels, **options)
