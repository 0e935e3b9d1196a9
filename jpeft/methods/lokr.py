"""LoKr: low-rank Kronecker product (LyCORIS, Yeh et al. 2023, arXiv 2309.14859).

    ΔW = s · W₁ ⊗ W₂,        s = alpha / rank
    in = m·n, out = l·k,     W₁ (m, l) or W₁b·W₁a,   W₂ (n, k) or W₂b·W₂a

W₂ is a product of rank `rank` where that is below max(n, k) / 2, else a full matrix; so is W₁ with `decompose_both`.
For a convolution `in` are its channels, and n comes with the window; with `effective_conv` a low-rank W₂ knows the
window: Σ_qr T[q, r, window] · W₂b[n, r] · W₂a[q, k]. Names as in LyCORIS, whose matrices are the transposes of these.

The forward multiplies x, as a matrix (m, n), by the small factors in turn, so that a product never forms ΔW. A
convolution and a grouped product (`ragged_dot`) do.

LyCORIS starts with W₂ (or W₂b) at zero, HF PEFT with W₁ (or W₁a): `zero` says which. The others start Kaiming-uniform.
Both libraries take the nearest divisor where `decompose_factor` does not divide a side; here such a site is refused.
LyCORIS has s = 1 where both factors are full; here s is alpha / rank always, as in HF PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.ops import Dot, Gather
from jpeft.core.sites import Site
from jpeft.core.update import Update, from_channels_first
from jpeft.core.weight import apply, matrix_sizes, static, weight
from jpeft.methods._factors import kaiming_uniform, window_of

__all__ = ["LoKr", "Kronecker"]


@weight
class Kronecker(Update):
    """`base + scale · W₁ ⊗ W₂`; of each factor the whole or its parts is None.

    Shapes: w1 (*stack, *batch, m, l), w1_b (.., m, rank), w1_a (.., rank, l); w2 (.., n, k), w2_b (.., n, rank),
    w2_a (.., rank, k), where a convolution has n · window instead of n; t2 (.., rank, rank, window) with n.
    """

    base: Any
    w1: Any = None
    w1_b: Any = None
    w1_a: Any = None
    w2: Any = None
    w2_b: Any = None
    w2_a: Any = None
    t2: Any = None
    axes: str = static()
    scale: float = static(1.0)
    channels: int | None = static(None)

    FIELDS = {"w1": "ml", "w1_b": "mr", "w1_a": "rl", "w2": "nk", "w2_b": "nr", "w2_a": "rk", "t2": "qrw"}
    TRAINABLE = frozenset(FIELDS)

    def apply(self, op, x):
        if isinstance(op, Dot):
            update = self._product(op, x)
        elif isinstance(op, Gather):
            update = self._rows(op, x)
        else:
            return super().apply(op, x)
        y = apply(op, x, self.base)
        return y + op.restore(update).astype(y.dtype)

    def _factors(self, transposed: bool = False) -> tuple[list, list]:
        """The matrices whose products are W₁ and W₂, or their transposes."""
        first = [self.w1] if self.w1 is not None else [self.w1_b, self.w1_a]
        second = [self.w2] if self.w2 is not None else [self.w2_b, self.w2_a]
        return tuple([m.mT for m in reversed(f)] if transposed else f for f in (first, second))  # type: ignore

    def _product(self, op, x):
        """x as a matrix (m, n): W₁ᵀ·x·W₂."""
        first, second = self._factors(op.transposed)
        h = op.inputs(x)
        h = h.reshape(*h.shape[:-1], first[0].shape[-2], second[0].shape[-2])
        for factor in second:
            h = op.mix(h, factor)
        h = jnp.swapaxes(h, -1, -2) * jnp.asarray(self.scale, h.dtype)
        for factor in first:
            h = op.mix(h, factor)
        return jnp.swapaxes(h, -1, -2).reshape(*h.shape[:-2], -1)

    def _rows(self, op, x):
        """Row i of ΔW is W₁'s row i // n times W₂'s row i % n."""
        first, second = (_multiplied(factors) for factors in self._factors(op.transposed))
        m, n = first.shape[-2], second.shape[-2]
        left, right = op.contract(x, jnp.repeat(first, n, -2)), op.contract(x, jnp.tile(second, (m, 1)))
        rows = left[..., :, None] * right[..., None, :] * jnp.asarray(self.scale, left.dtype)
        return rows.reshape(*rows.shape[:-2], -1)

    def matrix(self):
        first, second = self._factors()
        first = _multiplied([m.astype(self.wide) for m in first])
        if self.t2 is None:
            second = _multiplied([m.astype(self.wide) for m in second])
        else:
            parts = (m.astype(self.wide) for m in (self.t2, *second))
            second = jnp.einsum("...qrw,...nr,...qk->...nwk", *parts, precision="highest")
            second = second.reshape(*second.shape[:-3], -1, second.shape[-1])
        both = first[..., :, None, :, None] * second[..., None, :, None, :] * jnp.asarray(self.scale, self.wide)
        matrix = both.reshape(*first.shape[:-2], both.shape[-4] * both.shape[-3], -1)
        return matrix if self.channels is None else from_channels_first(matrix, self, self.channels)


def _multiplied(factors: list):
    return factors[0] if len(factors) == 1 else jnp.matmul(*factors, precision="highest")


@dataclass(frozen=True)
class LoKr(Method):
    """An update that is the Kronecker product of two small matrices. Mergeable; no update at the start.

    Fields:
        rank: of a factor that is decomposed.
        alpha: numerator of the scale.
        decompose_factor: m and l, the first factor's sides; must divide the inputs and outputs of every site. -1 takes
            for each side the largest divisor up to its square root.
        decompose_both: decompose W₁ too, where `rank` is below half its longer side.
        zero: which factor starts at zero: `"w2"` (LyCORIS) or `"w1"` (HF PEFT).
        effective_conv: let a decomposed W₂ of convolutions know the window (of more than one place). HF PEFT's
            `use_effective_conv2d`.

    Raises:
        ValueError: from the constructor: a rank below 1, a decompose_factor that is neither -1 nor positive, an unknown
            zero; from `init`: a site whose inputs or outputs decompose_factor does not divide, `effective_conv` without
            a convolution to adapt.

    Example:
        >>> import jpeft
        >>> jpeft.LoKr(rank=32, alpha=64.0, decompose_factor=4).decompose_factor
        4
    """

    rank: int = 8
    alpha: float = 8.0
    decompose_factor: int = -1
    decompose_both: bool = False
    zero: Literal["w2", "w1"] = "w2"
    effective_conv: bool = False

    EXPORT = Export(
        "LOKR",
        tensors={
            "dense": {
                "lokr_w1": ("w1", "lm"),
                "lokr_w1_a": ("w1_a", "lr"),
                "lokr_w1_b": ("w1_b", "rm"),
                "lokr_w2": ("w2", "kn"),
                "lokr_w2_a": ("w2_a", "kr"),
                "lokr_w2_b": ("w2_b", "rn"),
            }
        },
        config={
            "r": "rank",
            "alpha": "alpha",
            "decompose_factor": "decompose_factor",
            "decompose_both": "decompose_both",
        },
        fixed={"init_weights": True, "use_effective_conv2d": False},
        neutral={
            "init_weights": (False, "lycoris"),
            "rank_dropout": (),
            "module_dropout": (),
            "rank_dropout_scale": (),
        },
        required={"effective_conv": False},
    )
    SMALL = {"rank": 2, "decompose_both": True}

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1, got rank={self.rank}")
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"expected decompose_factor >= 1, or -1, got decompose_factor={self.decompose_factor}")
        if self.zero not in ("w2", "w1"):
            raise ValueError(f"expected zero in ('w2', 'w1'), got {self.zero!r}")

    def chosen(self, sites):
        chosen = super().chosen(sites)
        if self.effective_conv and not any(window_of(site)[1] > 1 for site in chosen.values()):
            raise ValueError("effective_conv=True has no effect: no convolution with a window is adapted; see targets")
        return chosen

    def check(self, site: Site) -> str | None:
        factor, (channels, _), n_out = self.decompose_factor, window_of(site), matrix_sizes(site.shape, site.axes)[2]
        if factor != -1 and (channels % factor or n_out % factor):
            what = "inputs" if site.channels is None else "input channels"
            return f"decompose_factor {factor} does not divide its {channels} {what} and {n_out} outputs; write -1"
        return None

    def wrap(self, key, leaf, site: Site) -> Kronecker:
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        channels, window = window_of(site)
        (m, n), (l, k) = self.sides(channels), self.sides(n_out)  # noqa: E741  the equation's letter
        rank, keys = self.rank, iter(jax.random.split(key, 5))
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        start = lambda shape, fan_in: kaiming_uniform(next(keys), (*lead, *shape), fan_in, dtype)
        if self.decompose_both and rank < max(l, m) / 2:
            fields = {"w1_b": start((m, rank), m), "w1_a": start((rank, l), rank)}
        else:
            fields = {"w1": start((m, l), m)}
        if not rank < max(n, k) / 2:
            fields["w2"] = start((n * window, k), n * window)
        elif self.effective_conv and window > 1:
            fields |= {"w2_b": start((n, rank), n), "w2_a": start((rank, k), k)}
            fields["t2"] = start((rank, rank, window), rank * window)
        else:
            fields |= {"w2_b": start((n * window, rank), n * window), "w2_a": start((rank, k), rank)}
        at_zero = next(name for name in (self.zero, "w2_b" if self.zero == "w2" else "w1_a") if name in fields)
        fields[at_zero] = jnp.zeros_like(fields[at_zero])
        axes, scale = site.axes.lstrip("s"), self.alpha / rank
        return Kronecker(leaf, **fields, axes=axes, scale=scale, channels=site.channels)

    def sides(self, size: int) -> tuple[int, int]:
        """The two numbers whose product is a side of a matrix: the first factor's side and the second's."""
        factor = self.decompose_factor
        if factor == -1:
            factor = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
        return factor, size // factor
