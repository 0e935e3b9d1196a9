"""C3A: circular convolution adaptation (Chen et al. 2024, arXiv 2407.19342).

    y = x·W + x·ΔW,        block (j, i) of ΔW:        ΔW[c, a] = k_ij[(c - a) mod b] / in

ΔW is made of circulant blocks of block_size b, each one row of b numbers: the rank is free, and there are in·out / b
parameters. A circulant product is one of Fourier coefficients, y_i = F⁻¹(Σ_j F(x_j) ∘ conj F(k_ij)) / in, so ΔW is
formed by merging alone.

The kernels start at zero, exactly the pretrained function, and train from there, as the update is linear in them. HF
PEFT's default is `xavier_uniform`, which changes the function slightly at the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes, static, weight

__all__ = ["C3A", "BlockCirculant"]


@weight
class BlockCirculant(Weight):
    """`base + circulant(kernel) / in`. Shapes: kernel (*stack, *batch, out / b, in / b, b)."""

    base: Any
    kernel: Any
    axes: str = static()

    FIELDS = {"kernel": "mnb"}
    TRAINABLE = frozenset({"kernel"})

    def apply(self, op, x):
        y = apply(op, x, self.base)
        rows = op.inputs(x)
        *_, m, n, b = self.kernel.shape
        spectrum = jnp.fft.rfft(self.kernel.astype(jnp.float32))
        if op.transposed:
            matrices = jnp.moveaxis(spectrum, -1, -3)
        else:
            matrices = jnp.moveaxis(jnp.conj(spectrum), -1, -3).mT
        blocks = rows.astype(jnp.float32).reshape(*rows.shape[:-1], -1, b)
        seen = jnp.swapaxes(jnp.fft.rfft(blocks), -1, -2)
        out = jnp.fft.irfft(jnp.swapaxes(op.mix_blocks(seen, matrices), -1, -2), b) / (n * b)
        return y + op.restore(out.reshape(*rows.shape[:-1], -1)).astype(y.dtype)

    def dense(self):
        *lead, m, n, b = self.kernel.shape
        wide = jnp.result_type(jnp.float32, self.dtype, self.kernel.dtype)
        place = (jnp.arange(b)[:, None] - jnp.arange(b)) % b
        blocks = self.kernel.astype(wide)[..., place]  # (*lead, m, n, c, a)
        update = jnp.moveaxis(blocks, -4, -2).reshape(*lead, n * b, m * b) / (n * b)
        return (dense(self.base).astype(wide) + from_matrix(update, self.labels, self.shape)).astype(self.dtype)


@dataclass(frozen=True)
class C3A(Method):
    """Block-circulant updates. Mergeable; exactly the pretrained function at the start, unless `start` says otherwise.

    Fields:
        block_size: of the circulant blocks; it must divide the inputs and the outputs.
        start: the kernels' start, `"zeros"` or random, as HF PEFT: `"xavier_uniform"`, `"kaiming_uniform"`,
            `"gaussian"`.

    Raises:
        ValueError: from the constructor: a block_size below 1, an unknown start; from `init`: a block_size that does
            not divide a site.

    Example:
        >>> import jpeft
        >>> jpeft.C3A(block_size=64, targets=["q_proj", "v_proj"]).block_size
        64
    """

    block_size: int = 256
    start: Literal["zeros", "xavier_uniform", "kaiming_uniform", "gaussian"] = "zeros"

    KINDS = ("dense", "experts")
    SMALL = {"block_size": 4, "targets": "^(?!.*(head|embed))"}
    EXPORT = Export(
        peft_type="C3A",
        tensors={"dense": {"c3a_kernel": ("kernel", "mnb")}},
        config={"block_size": "block_size"},
        neutral={"init_weights": ()},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"expected block_size >= 1, got block_size={self.block_size}")
        if self.start not in _BOUNDS:
            raise ValueError(f"expected start in {tuple(_BOUNDS)}, got {self.start!r}")

    @property
    def NO_OP_AT_START(self) -> bool:  # type: ignore[override]  # noqa: N802
        return self.start == "zeros"

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        if n_in % self.block_size or n_out % self.block_size:
            common = math.gcd(n_in, n_out)
            return f"block_size={self.block_size} does not divide its {n_in} inputs and {n_out} outputs; {common} does"
        return None

    def wrap(self, key, leaf, site: Site) -> BlockCirculant:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        shape = (*lead, n_out // self.block_size, n_in // self.block_size, self.block_size)
        dtype, bound = jnp.promote_types(leaf.dtype, jnp.float32), _BOUNDS[self.start](n_in, n_out)
        if self.start == "gaussian":
            kernel = jax.random.normal(key, shape, dtype)
        else:
            kernel = jax.random.uniform(key, shape, dtype, -bound, bound) if bound else jnp.zeros(shape, dtype)
        return BlockCirculant(leaf, kernel, axes=site.axes.lstrip("s"))


_BOUNDS = {  # of the uniform starts
    "zeros": lambda n_in, n_out: 0.0,
    "xavier_uniform": lambda n_in, n_out: math.sqrt(6 / (n_in + n_out)),
    "kaiming_uniform": lambda n_in, n_out: math.sqrt(1 / n_in),
    "gaussian": lambda n_in, n_out: math.inf,
}
