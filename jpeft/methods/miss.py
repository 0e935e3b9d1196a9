"""MiSS: matrix shard sharing (Kang and Yin 2024, arXiv 2409.15371; called Bone in its first versions).

    ΔW[j·rank + p, o] = D[p, o]        for every shard j of `rank` inputs

with D (*stack, *batch, rank, out), zero at the start: one shard, shared by all. As x·ΔW = (Σ_j x_j)·D, the forward adds
up the shards of x and multiplies once. Modes:

    standard    D as above, the paper's default
    mini        D is `out / mini_r` copies, side by side, of a matrix (rank, mini_r)
    bat         ΔW_joᵀ = (I + W_joᵀ)·D_o for the blocks (rank, rank) of W, with D (out / rank, rank, rank)

`bat` depends on the weights: it reads them densely, so a compressed base is decoded whenever the update is formed.
HF PEFT pads inputs that `rank` does not divide; here such a site is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.ops import Dot, RaggedDot
from jpeft.core.sites import Site
from jpeft.core.update import Update
from jpeft.core.weight import Weight, apply, dense, matrix_sizes, static, to_matrix, weight

__all__ = ["MiSS", "Shared", "Mini", "Bat"]


@weight
class Shared(Factored):
    """`base + D`, one below the other for every shard of the inputs: A is identity matrices, and B is D.

    Shapes: shard (*stack, *batch, rank, out), key (*stack, *batch) or None.
    """

    base: Any
    shard: Any
    key: Any = None
    axes: str = static()
    scale: float = static(default=1.0)
    dropout: float = static(0.0)

    FIELDS = {"shard": "ro", "key": ""}
    TRAINABLE = frozenset({"shard"})
    SLICEABLE = "o"

    def apply(self, op, x):
        if not isinstance(op, Dot | RaggedDot):
            return super().apply(op, x)
        y, x = apply(op, x, self.base), self._dropped(x)
        shards, rank, shard = self._shards(), self.shard.shape[-2], self._whole()
        if op.transposed:
            return y + op.restore(jnp.tile(op.contract(x, shard.mT), shards)).astype(y.dtype)
        h = op.inputs(x)
        h = h.reshape(*h.shape[:-1], shards, rank).sum(-2)
        return y + op.restore(op.mix(h, shard)).astype(y.dtype)

    def factors(self):
        shard = self._whole()
        identities = jnp.tile(jnp.eye(shard.shape[-2], dtype=shard.dtype), (self._shards(), 1))
        return jnp.broadcast_to(identities, (*shard.shape[:-2], *identities.shape)), shard

    def _shards(self) -> int:
        return matrix_sizes(self.shape, self.labels)[1] // self.shard.shape[-2]

    def _whole(self):
        """D, (*stack, *batch, rank, out)."""
        return self.shard


@weight
class Mini(Shared):
    """As `Shared`, with D made of copies, side by side. Shapes: shard (*stack, *batch, rank, mini_r)."""

    axes: str = static()

    FIELDS = {"shard": "rm", "key": ""}
    SLICEABLE = ""

    def _whole(self):
        return jnp.tile(self.shard, matrix_sizes(self.shape, self.labels)[2] // self.shard.shape[-1])


@weight
class Bat(Update):
    """`base + (I + base) · D` by blocks. Shapes: shard (*stack, *batch, out / rank, rank, rank)."""

    base: Any
    shard: Any
    axes: str = static()

    FIELDS = {"shard": "kpq"}
    TRAINABLE = frozenset({"shard"})

    def matrix(self):
        shard, whole = self.shard.astype(self.wide), to_matrix(dense(self.base), self.labels).astype(self.wide)
        rank = shard.shape[-1]
        lead, n_in, n_out = matrix_sizes(self.shape, self.labels)
        blocks = whole.reshape(*lead, n_in // rank, rank, n_out // rank, rank)
        mixed = jnp.einsum("...jpko,...kpq->...jqko", blocks, shard, precision="highest")
        return (mixed + jnp.einsum("...koq->...qko", shard)[..., None, :, :, :]).reshape(whole.shape)


@dataclass(frozen=True)
class MiSS(Method):
    """One trained shard, shared by all shards of a matrix's inputs. Mergeable; no update at the start.

    Fields:
        rank: inputs of a shard; must divide the inputs of every site.
        mode: `"standard"`, `"mini"` or `"bat"` (the update depends on the weights; `rank` must divide the outputs too).
        mini_r: with `mode="mini"`, outputs of the shard; must divide the outputs of every site.
        dropout: rate on the update's input, on only while `bind` is given a key; not in mode `"bat"`, which has none.

    Raises:
        ValueError: from the constructor: a rank or mini_r below 1, an unknown mode, mini_r in another mode than
            `"mini"`, dropout outside [0, 1) or with `"bat"`; from `init`: a site whose inputs or outputs are not
            divisible.

    Example:
        >>> import jpeft
        >>> jpeft.MiSS(rank=64, mode="bat").rank
        64
    """

    rank: int = 64
    mode: Literal["standard", "mini", "bat"] = "standard"
    mini_r: int = 1
    dropout: float = 0.0

    EXPORT = Export(
        "MISS",
        tensors={"dense": {"miss_block": ("shard", "ro")}},
        config={"r": "rank", "miss_dropout": "dropout"},
        fixed={"init_weights": True, "bias": "none"},
        neutral={"init_weights": (False,), "mini_r": ()},
        required={"mode": "standard"},
    )
    SMALL = {"rank": 4}

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("standard", "mini", "bat"):
            raise ValueError(f"expected mode in ('standard', 'mini', 'bat'), got {self.mode!r}")
        if self.rank < 1 or self.mini_r < 1:
            raise ValueError(f"expected rank >= 1 and mini_r >= 1, got rank={self.rank}, mini_r={self.mini_r}")
        if self.mini_r != 1 and self.mode != "mini":
            raise ValueError(f"mini_r={self.mini_r} has no effect in mode {self.mode!r}; write mode='mini'")
        if not 0 <= self.dropout < 1 or self.dropout and self.mode == "bat":
            raise ValueError(f"expected 0 <= dropout < 1, and none in mode 'bat', got dropout={self.dropout}")

    @property
    def FORMS_DENSE_UPDATE(self) -> str:  # pyright: ignore  # noqa: N802  the same data, by mode
        return "the update is the base's own blocks, each mapped by the shard" if self.mode == "bat" else ""

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        parts = [(self.rank, "rank", n_in, "inputs")]
        if self.mode == "bat":
            parts.append((self.rank, "rank", n_out, "outputs"))
        if self.mode == "mini":
            parts.append((self.mini_r, "mini_r", n_out, "outputs"))
        for part, name, size, what in parts:
            if size % part:
                return f"{name} {part} does not divide its {size} {what}; choose a divisor or leave the site out"
        return None

    def wrap(self, key, leaf, site: Site) -> Weight:
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        shapes = {"standard": (self.rank, n_out), "mini": (self.rank, self.mini_r)}
        shape = shapes.get(self.mode, (n_out // self.rank, self.rank, self.rank))
        shard = jnp.zeros((*lead, *shape), jnp.promote_types(leaf.dtype, jnp.float32))
        axes = site.axes.lstrip("s")
        if self.mode == "bat":
            return Bat(leaf, shard, axes=axes)
        kind = Mini if self.mode == "mini" else Shared
        return kind(leaf, shard, axes=axes, dropout=self.dropout)
