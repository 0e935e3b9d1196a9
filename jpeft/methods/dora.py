"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353).

    W' = m ∘ V / ‖V‖,        V = W + s·A·B

with m (*stack, *batch, out) trainable and ‖V‖ the norm over the inputs of each output, held constant in the backward
pass (the paper's section 4.3, and HF PEFT). m starts at ‖W‖, so the start is the pretrained function. The norm needs no
dense update:

    ‖V‖² = ‖W‖² + 2s·Σ_r B_ro (AᵀW)_ro + s²·Σ_r B_ro (AᵀA·B)_ro
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.sites import Site
from jpeft.core.weight import apply, dense, from_matrix, static, to_matrix, weight
from jpeft.methods.lora import PEFT_LORA, LoRA, LowRank

__all__ = ["DoRA", "Decomposed"]


@weight
class Decomposed(LowRank):
    """`magnitude ∘ (base + scale · a @ b) / norm`. Shapes: as `LowRank`; magnitude (*stack, *batch, out)."""

    magnitude: Any = None
    axes: str = static()

    FIELDS = {**LowRank.FIELDS, "magnitude": "o"}
    TRAINABLE = frozenset({"a", "b", "magnitude"})
    SLICEABLE = "o"

    def trainable_fields(self) -> frozenset[str]:
        return super().trainable_fields() | {"magnitude"}

    def apply(self, op, x):
        factor = self._factor()
        if op.transposed:
            return super().apply(op, op.map_inputs(x, lambda x: x * op.spread(factor).astype(x.dtype)))
        factor = op.spread(factor)
        low_rank = op.mix(op.contract(self._dropped(x), self.a), self.b) * self.scale
        y = apply(op, x, self.base)
        scaled = y * op.restore(factor) + op.restore(low_rank * factor)
        return scaled.astype(y.dtype)

    def dense(self):
        whole = to_matrix(dense(self.base), self.labels).astype(self._wide()) + self._update()
        matrix = whole * self._factor()[..., None, :]
        return from_matrix(matrix, self.labels, self.shape).astype(self.dtype)

    def _factor(self):
        """magnitude / ‖V‖, the norm held constant."""
        matrix = to_matrix(dense(self.base), self.labels).astype(self._wide())
        return self.magnitude / jax.lax.stop_gradient(norm(matrix, self.a, self.b, self.scale))


def norm(matrix, a, b, scale: float):
    """‖W + s·A·B‖ over the inputs, (*lead, out), without forming A·B. `matrix` (*lead, in, out)."""
    dot = lambda x, y: jnp.matmul(x, y, precision="highest")
    a, b = a.astype(matrix.dtype), b.astype(matrix.dtype)
    cross = 2 * scale * dot(a.mT, matrix) + scale**2 * dot(dot(a.mT, a), b)
    squared = jnp.sum(matrix * matrix, -2) + jnp.sum(b * cross, -2)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(matrix.dtype).tiny))


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the direction of each output's weights, with a trainable magnitude. Mergeable; fields as `LoRA`.

    Raises:
        ValueError: as `LoRA`.

    Example:
        >>> import jpeft
        >>> jpeft.DoRA(rank=16, alpha=32).rank
        16
    """

    EXPORT = replace(
        PEFT_LORA,
        tensors={
            "dense": {**PEFT_LORA.tensors["dense"], "lora_magnitude_vector": ("magnitude", "o")},
            "embedding": {**PEFT_LORA.tensors["embedding"], "lora_magnitude_vector": ("magnitude", "o")},
            "conv": {**PEFT_LORA.tensors["conv"], "lora_magnitude_vector": ("magnitude", "xow")},
        },
        fixed={**PEFT_LORA.fixed, "use_dora": True},
    )

    def wrap(self, key, leaf, site: Site) -> Decomposed:
        low = super().wrap(key, leaf, site)
        matrix = to_matrix(dense(leaf), low.labels).astype(jnp.promote_types(low.a.dtype, jnp.float32))
        magnitude = norm(matrix, low.a, low.b, low.scale).astype(low.a.dtype)
        return Decomposed(
            leaf,
            low.a,
            low.b,
            magnitude=magnitude,
            axes=low.axes,
            scale=low.scale,
            dropout=low.dropout,
            freeze_a=low.freeze_a,
        )
