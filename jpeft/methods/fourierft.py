"""FourierFT: a few coefficients of the update's Fourier transform train (Gao et al. 2024, arXiv 2405.03003).

    W' = W + scale · Re(IDFT₂(S(values, index)))

with the inverse transform divided by in · out. values (*stack, *batch, n_frequency) start at N(0, 1), in the paper and
in HF PEFT; index (2, n_frequency) is one for all layers, and for all matrices of one shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.sites import Site
from jpeft.core.weight import matrix_sizes, static, weight
from jpeft.methods._sparse import INDEX, Entries, largest_index, scatter, too_many_entries
from jpeft.methods._spectral import _SpectralMethod, torch_positions

__all__ = ["FourierFT", "Spectrum"]


@weight
class Spectrum(Entries):
    """`base + scale · Re(ifft2(scatter(values, index)))`. Shapes: values (*stack, *batch, n), index (2, n)."""

    axes: str = static()

    UNSTACKED = frozenset({"index"})

    def matrix(self):
        _, n_in, n_out = matrix_sizes(self.shape, self.labels)
        spectrum = scatter(self.values.astype(self.wide), self.index, n_in, n_out)
        return self.scale * jnp.fft.ifft2(spectrum).real


@dataclass(frozen=True)
class FourierFT(_SpectralMethod):
    """An update that is sparse in frequency. Mergeable; no no-op at the start, as its coefficients start at random.

    Fields:
        n_frequency: coefficients that train, for each matrix.
        scale: the paper's alpha, 300 for language models; HF PEFT's default is 150.
        n_frequency_pattern: `{regex: n_frequency}` on paths, first match wins; each must match an adapted site.
        seed: chooses the frequencies, by the shuffle of HF PEFT's `random_loc_seed`, whose adapters do not hold them.
        frequency_bias: None, where all frequencies are equally likely, or the paper's favoured central frequency f_c:
            one at distance D from frequency zero is drawn with weight exp(−((D² − f_c²) / (D · bandwidth))²).
        bandwidth: of that bias.
        start: `"normal"`, or `"zeros"` for the pretrained function (HF PEFT's `init_weights=True`).

    Raises:
        ValueError: from the constructor: n_frequency below 1, a seed of more than 32 bits, a negative frequency_bias, a
            bandwidth that is not positive, an unknown start; from `init`: a matrix with fewer entries than frequencies,
            a pattern that matches no adapted site.

    Example:
        >>> import jpeft
        >>> jpeft.FourierFT(n_frequency=5000, targets=["q_proj", "v_proj"]).n_frequency
        5000
    """

    scale: float = 300.0
    frequency_bias: float | None = None
    bandwidth: float = 200.0
    start: Literal["normal", "zeros"] = "normal"

    NO_OP_AT_START = False
    FORMS_DENSE_UPDATE = "one transform a step costs less than a product with 2 · n_frequency waves for each token"
    ADDS_FROZEN = INDEX
    EXPORT = Export(
        "FOURIERFT",
        {"dense": {"fourierft_spectrum": ("values", "k")}},
        config={"n_frequency": "n_frequency", "scaling": "scale", "random_loc_seed": "seed"},
        patterns={"n_frequency_pattern": ("n_frequency_pattern", "n_frequency")},
        neutral={"init_weights": ()},
        required={"frequency_bias": None},
    )
    SMALL = {"n_frequency": 20, "scale": 40.0}

    def __post_init__(self):
        super().__post_init__()
        if self.frequency_bias is not None and self.frequency_bias < 0:
            raise ValueError(f"expected frequency_bias >= 0 or None, got frequency_bias={self.frequency_bias}")
        if self.bandwidth <= 0:
            raise ValueError(f"expected bandwidth > 0, got bandwidth={self.bandwidth}")
        if self.start not in ("normal", "zeros"):
            raise ValueError(f"expected start as 'normal' or 'zeros', got {self.start!r}")

    def check(self, site: Site) -> str | None:
        return super().check(site) or (None if self.frequency_bias is None else too_many_entries(site))

    def wrap(self, key, leaf, site: Site) -> Spectrum:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        n = self.n_frequency_of(site.path)
        if self.frequency_bias is None:
            index = jnp.asarray(torch_positions(self.seed, n_in, n_out, n))
        else:  # the largest of log-weights with Gumbel noise are draws without replacement
            weights = log_weights(n_in, n_out, self.frequency_bias, self.bandwidth)
            index = largest_index(weights + jax.random.gumbel(jax.random.key(self.seed), weights.shape), n)
        values = self._coefficients(key, leaf, site, 1.0 if self.start == "normal" else 0.0)
        return Spectrum(leaf, values, index, axes=site.axes.lstrip("s"), scale=self.scale)


def log_weights(n_in: int, n_out: int, centre: float, bandwidth: float) -> jax.Array:
    """The logarithm of the paper's band-pass filter (equation 5), (in, out).

    The paper draws it with frequency zero in the middle of the matrix; here it is where the transform has it, at 0, and
    the frequencies above n / 2 are the negative ones.
    """
    inputs, outputs = (jnp.abs(jnp.fft.fftfreq(n, 1 / n)) for n in (n_in, n_out))
    distance = jnp.hypot(inputs[:, None], outputs)
    return -(((distance**2 - centre**2) / (jnp.maximum(distance, 1e-6) * bandwidth)) ** 2)
