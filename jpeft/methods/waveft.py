"""WaveFT: a few wavelet coefficients of the update train (Bilican et al. 2025, arXiv 2505.12532).

    W' = W + scale · IDWT(S(values, index))

with one level of the inverse wavelet transform of the four quadrants [[A, H], [V, D]] of S. values (*stack, *batch, n)
start at zero; index (2, n) is one for all layers, and for all matrices of one shape.

A filter longer than 2 reads beyond the border, so S is larger than W by filter - 2 on each side in all, and W's
coefficients lie in its middle; a side that is odd then is one longer, and the update loses its last row or column. That
is HF PEFT's way, and its adapters hold no more than the values: another way would be another update.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.export import Export
from jpeft.core.sites import Site, Sites
from jpeft.core.weight import matrix_sizes, static, weight
from jpeft.methods._sparse import INDEX, Entries, scatter
from jpeft.methods._spectral import _SpectralMethod, torch_positions

__all__ = ["WaveFT", "Wavelets"]


@weight
class Wavelets(Entries):
    """`base + scale · idwt(scatter(values, index))`. Shapes: values (*stack, *batch, n), index (2, n)."""

    axes: str = static()
    order: int = static(1)

    UNSTACKED = frozenset({"index"})

    def matrix(self):
        _, n_in, n_out = matrix_sizes(self.shape, self.labels)
        (height, top), (width, left) = (padded(n, self.order) for n in (n_in, n_out))
        index = self.index + jnp.array([[left], [top]], self.index.dtype)
        coefficients = scatter(self.values.astype(self.wide), index, height, width)
        return self.scale * inverse_wavelet(coefficients, self.order)[..., :n_in, :n_out]


@dataclass(frozen=True)
class WaveFT(_SpectralMethod):
    """An update that is sparse in wavelets. Mergeable; the pretrained function at first.

    Fields:
        n_frequency: coefficients that train, for each matrix.
        scale: of the update.
        n_frequency_pattern: `{regex: n_frequency}` on paths, first match wins; each must match an adapted site.
        seed: chooses the coefficients, by the shuffle of HF PEFT's `random_loc_seed`, whose adapters do not hold them.
        wavelet_family: `"db1"` (Haar's) to `"db10"`, Daubechies' wavelet with so many vanishing moments.
        proportional_parameters: `n_frequency` is the mean over all adapted matrices, and each has its share by its
            number of entries, at least one.

    Raises:
        ValueError: from the constructor: n_frequency below 1, a seed of more than 32 bits, an unknown wavelet, a
            pattern beside `proportional_parameters`; from `init`: a matrix with fewer entries than coefficients, a
            pattern that matches no adapted site.

    Example:
        >>> import jpeft
        >>> jpeft.WaveFT(n_frequency=5000, wavelet_family="db2").n_frequency
        5000
    """

    n_frequency: int = 2592
    scale: float = 25.0
    wavelet_family: str = "db1"
    proportional_parameters: bool = False

    FORMS_DENSE_UPDATE = "one transform a step costs less than a product with n_frequency wavelets for each token"
    ADDS_FROZEN = INDEX
    EXPORT = Export(
        "WAVEFT",
        {"dense": {"waveft_spectrum": ("values", "k")}},
        config={
            "n_frequency": "n_frequency",
            "scaling": "scale",
            "random_loc_seed": "seed",
            "wavelet_family": "wavelet_family",
            "proportional_parameters": "proportional_parameters",
        },
        patterns={"n_frequency_pattern": ("n_frequency_pattern", "n_frequency")},
        fixed={"use_idwt": True},
        neutral={"init_weights": ()},
    )
    SMALL = {"n_frequency": 20, "scale": 5.0, "wavelet_family": "db2"}

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"db([1-9]|10)", self.wavelet_family):
            raise ValueError(f"expected wavelet_family from 'db1' to 'db10', got {self.wavelet_family!r}")
        if self.proportional_parameters and self.n_frequency_pattern:
            raise ValueError("expected n_frequency_pattern or proportional_parameters=True, got both")

    def init(self, key, params, sites: Sites, calibration=None):
        if not self.proportional_parameters:
            return super().init(key, params, sites, calibration)
        shares = tuple((f"^{re.escape(path)}$", n) for path, n in self.shares(sites).items())
        return replace(self, proportional_parameters=False, n_frequency_pattern=shares).init(key, params, sites)

    def shares(self, sites: Sites) -> dict[str, int]:
        """`{path: coefficients of each matrix}` under `proportional_parameters`."""
        entries, matrices = {}, 0
        for path, site in super().chosen(sites).items():
            lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
            entries[path] = (n_in * n_out, math.prod(lead))
            matrices += math.prod(lead)
        total = sum(size * count for size, count in entries.values())
        return {path: max(1, round(size / total * self.n_frequency * matrices)) for path, (size, _) in entries.items()}

    def check(self, site: Site) -> str | None:
        return None if self.proportional_parameters else super().check(site)

    def wrap(self, key, leaf, site: Site) -> Wavelets:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        index = torch_positions(self.seed, n_in, n_out, self.n_frequency_of(site.path))
        values = self._coefficients(key, leaf, site, 0.0)
        order, axes = int(self.wavelet_family.removeprefix("db")), site.axes.lstrip("s")
        return Wavelets(leaf, values, jnp.asarray(index), axes=axes, scale=self.scale, order=order)


def padded(n: int, order: int) -> tuple[int, int]:
    """The even number of coefficients that make n or n + 1 numbers, and where the n ones that train begin."""
    size = n + 2 * (order - 1)
    size += size % 2
    return size, (size - n) // 2


def inverse_wavelet(coefficients: jax.Array, order: int) -> jax.Array:
    """One level of the inverse transform of [[A, H], [V, D]], (*lead, 2m, 2n), without what the border cuts.

    A is low in both directions; H high along the first and low along the second, V the other way round.
    """
    low = daubechies(order)
    high = low[::-1] * (-1.0) ** np.arange(low.size)
    filters = np.stack([np.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))])
    *lead, height, width = coefficients.shape
    quadrants = coefficients.reshape(-1, 2, height // 2, 2, width // 2).transpose(0, 1, 3, 2, 4)
    update = jax.lax.conv_general_dilated(
        quadrants.reshape(-1, 4, height // 2, width // 2),
        jnp.asarray(filters[None, :, ::-1, ::-1], coefficients.dtype),  # a convolution proper, not a correlation
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        lhs_dilation=(2, 2),
        precision="highest",
    )
    return update.reshape(*lead, *update.shape[-2:])


def daubechies(order: int) -> np.ndarray:
    """The low-pass filter (2 · order) with `order` vanishing moments and minimal phase, of norm one.

    Its transform is ((1 + z) / 2)^order times q, with |q|² = Σ_k C(order - 1 + k, k) y^k and y = (2 - z - 1/z) / 4: of
    each root y, q has the z within the unit circle (Daubechies 1988, section 4).
    """
    roots = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    inner = [min(np.roots([1, 4 * y - 2, 1]), key=abs) for y in roots]
    taps = np.poly([*inner, *[-1] * order]).real
    return taps * math.sqrt(2) / taps.sum()
