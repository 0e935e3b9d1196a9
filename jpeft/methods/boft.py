"""BOFT: orthogonal butterfly fine-tuning (Liu et al. 2023, arXiv 2311.06243).

    y = (x·R)·W,        R = B_m ... B_2·B_1,        B_k = P_k·diag(R_k1, ..., R_kn)·P_kᵀ,        R_kj as in OFT

Factor k turns pairs of half blocks that lie 2ᵏ⁻¹ half blocks apart, so a few factors of small blocks mix what one of
large blocks would. Zero at the start: exactly the pretrained function. The permutations are reshapes: a factor costs
the activations times the block size, and no matrix of inputs × inputs is formed.

The paper trains the skew-symmetric parts, here what is above their diagonals: in · factors · (block_size - 1) / 2
numbers. HF PEFT stores whole blocks, of which only the skew part counts, and a scale for each output beside them;
`scaled` does so. HF PEFT allows one factor alone where its CUDA extension is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.rotation import cayley, skew, turned_axis
from jpeft.core.sites import Site
from jpeft.core.weight import Weight, from_matrix, matrix_sizes, weight
from jpeft.methods.oft import BlockRotation

__all__ = ["BOFT", "Butterfly"]


@weight
class Butterfly(BlockRotation):
    """`R @ base`, or `R @ base ∘ s`.

    Shapes: q (*stack, *batch, factors, blocks, block_size · (block_size - 1) / 2); or else whole (*stack, *batch,
    factors, blocks, block_size, block_size) and s (*stack, *batch, out); key (*stack, *batch) or None.
    """

    whole: Any = None
    s: Any = None

    FIELDS = {"q": "mne", "whole": "mnbc", "s": "o", "key": ""}
    TRAINABLE = frozenset({"q", "whole", "s"})

    def apply(self, op, x):
        if self.s is None:
            return super().apply(op, x)
        scale = op.spread(self.s)
        if op.transposed:
            return super().apply(op, op.map_inputs(x, lambda x: (x * scale).astype(x.dtype)))
        y = super().apply(op, x)
        return (y * op.restore(scale)).astype(y.dtype)

    def dense(self):
        if self.s is None:
            return super().dense()
        return from_matrix(self.rotated() * self.s[..., None, :], self.labels, self.shape).astype(self.dtype)

    def turned(self, rows, op, inverse):
        turn = self._kept(self._turn())
        factors = range(turn.shape[-4])
        for n in factors if inverse else reversed(factors):
            one = turn[..., n, :, :, :]
            moved = op.mix_blocks(self._gathered(rows, n), one.mT if inverse else one)
            rows = (rows + self._scattered(moved, n)).astype(rows.dtype)
        return rows

    def _turn(self):
        """R_kj - 1, (*stack, *batch, factors, blocks, block_size, block_size)."""
        if self.whole is None:
            return cayley(skew(self.q.astype(jnp.promote_types(self.q.dtype, jnp.float32)), self.block_size))
        whole = self.whole.astype(jnp.promote_types(self.whole.dtype, jnp.float32))
        return cayley((whole - whole.mT) / 2)

    def _gathered(self, rows, n: int):
        """`rows @ P_n` (..., blocks, block_size): two half blocks that lie 2ⁿ apart side by side."""
        if n:
            halves = rows.reshape(*rows.shape[:-1], -1, 2, 2**n, self.block_size // 2)
            rows = jnp.swapaxes(halves, -3, -2)
        return rows.reshape(*rows.shape[: rows.ndim - (4 if n else 1)], -1, self.block_size)

    def _scattered(self, blocks, n: int):
        """The inverse of `_gathered`."""
        lead = blocks.shape[:-2]
        if n:
            halves = blocks.reshape(*lead, -1, 2**n, 2, self.block_size // 2)
            blocks = jnp.swapaxes(halves, -3, -2)
        return blocks.reshape(*lead, -1)


@dataclass(frozen=True)
class BOFT(Method):
    """Orthogonal fine-tuning by butterfly factors. Mergeable; exactly the pretrained function at the start.

    Fields:
        boft_block_size, boft_block_num: the size of a block, or their number; one of the two is 0. It must divide the
            inputs (an embedding's width): it is never adjusted.
        boft_n_butterfly_factor: number of factors; with more than one the block size must be even, and the number of
            blocks a multiple of 2 to the factors less one.
        scaled: parameters as HF PEFT has them: whole blocks, and a scale for each output.
        dropout: share of the blocks that are left out, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: block size and number both or neither, no factor, dropout outside [0, 1); from
            `init`: blocks that do not divide what is turned, or cannot be paired by so many factors.

    Example:
        >>> import jpeft
        >>> jpeft.BOFT(boft_block_size=8, boft_n_butterfly_factor=2).boft_block_size
        8
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    scaled: bool = False
    dropout: float = 0.0

    SMALL = {"boft_block_size": 4, "targets": "."}
    EXPORT = Export(
        peft_type="BOFT",
        tensors={"dense": {"boft_R": ("whole", "mnbc"), "boft_s": ("s", "oi")}},
        config={
            "boft_block_size": "boft_block_size",
            "boft_block_num": "boft_block_num",
            "boft_n_butterfly_factor": "boft_n_butterfly_factor",
            "boft_dropout": "dropout",
        },
        neutral={"init_weights": ()},
        required={"scaled": True},
    )

    def __post_init__(self):
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if min(size, number) != 0 or max(size, number) < 1 or size == 1:
            raise ValueError(
                "expected boft_block_size >= 2 with boft_block_num=0, or boft_block_num >= 1 with boft_block_size=0, "
                f"got boft_block_size={size}, boft_block_num={number}"
            )
        if self.boft_n_butterfly_factor < 1:
            raise ValueError(
                f"expected boft_n_butterfly_factor >= 1, got boft_n_butterfly_factor={self.boft_n_butterfly_factor}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def check(self, site: Site) -> str | None:
        name = "boft_block_size" if self.boft_block_size else "boft_block_num"
        side, size = turned_axis(site)
        part = getattr(self, name)
        block = self.boft_block_size or size // part
        if size % part or block < 2:
            what = "inputs" if side == "i" else "outputs"
            return f"{name}={part} does not divide its {size} {what} into blocks of 2 or more; choose another {name}"
        factors, blocks = self.boft_n_butterfly_factor, size // block
        if factors > 1 and (block % 2 or blocks % 2 ** (factors - 1)):
            return (
                f"{blocks} blocks of {block} cannot be paired by boft_n_butterfly_factor={factors}: expected an even "
                f"block size, and blocks in a multiple of {2 ** (factors - 1)}"
            )
        return None

    def wrap(self, key, leaf, site: Site) -> Butterfly:
        lead, _, n_out = matrix_sizes(site.shape, site.axes)
        side, size = turned_axis(site)
        block = self.boft_block_size or size // self.boft_block_num
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        shape = (*lead, self.boft_n_butterfly_factor, size // block)
        if self.scaled:
            own = {"whole": jnp.zeros((*shape, block, block), dtype), "s": jnp.ones((*lead, n_out), dtype)}
        else:
            own = {"q": jnp.zeros((*shape, block * (block - 1) // 2), dtype)}
        axes = site.axes.lstrip("s")
        return Butterfly(leaf, **{"q": None, **own}, axes=axes, side=side, block_size=block, dropout=self.dropout)

    def exported(self, trainable, frozen):
        if self.scaled:
            return self, trainable

        def whole(ours, base):
            if not isinstance(ours, Butterfly):
                return ours
            lead, _, n_out = matrix_sizes(base.shape, base.labels)
            return ours.replace(q=None, whole=skew(ours.q, ours.block_size), s=jnp.ones((*lead, n_out), ours.q.dtype))

        is_leaf = lambda x: x is None or isinstance(x, Weight)
        return replace(self, scaled=True), jax.tree.map(whole, trainable, frozen, is_leaf=is_leaf)
