"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280).

    y = (x·R)·W,        R = diag(R_1, ..., R_n),        R_i = (1 - Q_i)(1 + Q_i)⁻¹,        Q_i = -Q_iᵀ

with Q_i of block_size × block_size, stored as what is above the diagonal, and zero at the start: exactly the pretrained
function. Angles between neurons are kept. The paper writes Q with the other sign, which is a name for the same; here it
is as HF PEFT stores it. `neumann` takes (1 + Q)(1 - Q)⁻¹ by the first terms of its series, without a solve and
orthogonal only nearly (Qiu et al. 2025, arXiv 2506.19847, HF PEFT's default); its Q has the paper's sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.rotation import Rotation, cayley, skew, turned_axis
from jpeft.core.sites import Site
from jpeft.core.weight import matrix_sizes, static, weight

__all__ = ["OFT", "BlockRotation"]


@weight
class BlockRotation(Rotation):
    """`blockdiag(R) @ base`.

    Shapes: q (*stack, *batch, blocks, block_size · (block_size - 1) / 2), one block if shared; key (*stack, *batch) or
    None.
    """

    base: Any
    q: Any
    key: Any = None
    axes: str = static()
    side: Any = static("i")
    block_size: int = static(2)
    terms: int = static(0)  # of the Neumann series; 0: exact
    eps: float = static(math.inf)
    dropout: float = static(0.0)

    FIELDS = {"q": "ne", "key": ""}
    TRAINABLE = frozenset({"q"})

    def randomized(self, key):
        outer = super().randomized(key)
        if not self.dropout:
            return outer
        lead = matrix_sizes(self.shape, self.labels)[0]
        return outer.replace(key=jax.random.split(key, lead) if lead else key)

    def turned(self, rows, op, inverse):
        turn = self._kept(self._turn())
        blocks = rows.reshape(*rows.shape[:-1], -1, self.block_size)
        if turn.shape[-3] == 1:
            turn = jnp.broadcast_to(turn, (*turn.shape[:-3], blocks.shape[-2], *turn.shape[-2:]))
        moved = op.mix_blocks(blocks, turn.mT if inverse else turn)
        return (blocks + moved).reshape(rows.shape).astype(rows.dtype)

    def _turn(self):
        """R - 1, (*stack, *batch, blocks, block_size, block_size): exactly zero at the start in any precision."""
        q = skew(self.q.astype(jnp.promote_types(self.q.dtype, jnp.float32)), self.block_size)
        if self.eps < math.inf:
            q = _within(q, self.eps / math.sqrt(q.shape[-3]))
        return neumann(q, self.terms) if self.terms else cayley(q)

    def _kept(self, turn):
        """Multiplicative dropout: blocks that stay the identity."""
        if self.key is None:
            return turn
        key = self.key if self.key.ndim == 0 else self.key.reshape(-1)[0]
        blocks = turn.shape[turn.ndim - 1 - len(self.FIELDS["q"]) : -2]
        return turn * jax.random.bernoulli(key, 1 - self.dropout, (*blocks, 1, 1))


def neumann(q: jax.Array, terms: int) -> jax.Array:
    """1 + 2Q + 2Q² + ... + 2Qⁿ⁻² + Qⁿ⁻¹, less 1, for n terms of (1 + Q)(1 - Q)⁻¹. HF PEFT takes 3 terms for 4."""
    if terms == 2:
        return 2 * q
    total, power = 2 * q, q
    for n in range(2, max(terms, 4)):
        power = jnp.matmul(power, q, precision="highest")
        total = total + (1 if n == max(terms, 4) - 1 else 2) * power
    return total


def _within(q, bound: float):
    """Q, each block scaled down to a Frobenius norm of at most `bound`."""
    squared = jnp.sum(q * q, (-2, -1), keepdims=True)
    outside = squared > bound**2
    return jnp.where(outside, q * bound / jnp.sqrt(jnp.where(outside, squared, 1)), q)


@dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning by blocks. Mergeable; exactly the pretrained function at the start.

    Fields:
        block_size, r: the size of a block, or their number; one of the two is 0. It must divide the inputs (an
            embedding's width): it is never adjusted.
        block_share: one block for all, as many parameters as one.
        coft, eps: keep ‖Q‖ of a block below eps / √blocks (constrained OFT). The bound is part of the function; HF PEFT
            writes it into the parameters at each step.
        neumann, terms: the series instead of the solve, and its number of terms.
        dropout: share of the blocks that are left out, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: block_size and r both or neither, fewer than 2 terms, dropout outside [0, 1),
            eps not above 0; from `init`: a block_size or r that does not divide what is turned.

    Example:
        >>> import jpeft
        >>> jpeft.OFT(block_size=64, targets=["q_proj", "v_proj"]).block_size
        64
    """

    block_size: int = 32
    r: int = 0
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    neumann: bool = False
    terms: int = 5
    dropout: float = 0.0

    SMALL = {"block_size": 4, "targets": "."}
    EXPORT = Export(
        peft_type="OFT",
        tensors={"dense": {"oft_R.weight": ("q", "ne")}, "embedding": {"oft_embedding_R.weight": ("q", "ne")}},
        config={
            "oft_block_size": "block_size",
            "r": "r",
            "block_share": "block_share",
            "coft": "coft",
            "eps": "eps",
            "use_cayley_neumann": "neumann",
            "num_cayley_neumann_terms": "terms",
            "module_dropout": "dropout",
        },
        neutral={"init_weights": ()},
    )

    def __post_init__(self):
        super().__post_init__()
        if min(self.block_size, self.r) != 0 or max(self.block_size, self.r) < 1 or self.block_size == 1:
            raise ValueError(
                f"expected block_size >= 2 with r=0, or r >= 1 with block_size=0, got block_size={self.block_size}, "
                f"r={self.r}"
            )
        if self.terms < 2:
            raise ValueError(f"expected terms >= 2, got terms={self.terms}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")
        if self.eps <= 0:
            raise ValueError(f"expected eps > 0, got eps={self.eps}")

    def check(self, site: Site) -> str | None:
        name, part = ("block_size", self.block_size) if self.block_size else ("r", self.r)
        side, size = turned_axis(site)
        if size % part or (self.r and size // part < 2):
            what = "inputs" if side == "i" else "outputs"
            return f"{name}={part} does not divide its {size} {what} into blocks of 2 or more; choose another {name}"
        return None

    def wrap(self, key, leaf, site: Site) -> BlockRotation:
        lead, *_ = matrix_sizes(site.shape, site.axes)
        side, size = turned_axis(site)
        block = self.block_size or size // self.r
        blocks = 1 if self.block_share else size // block
        q = jnp.zeros((*lead, blocks, block * (block - 1) // 2), jnp.promote_types(leaf.dtype, jnp.float32))
        return BlockRotation(
            leaf,
            q,
            axes=site.axes.lstrip("s"),
            side=side,
            block_size=block,
            terms=self.terms if self.neumann else 0,
            eps=self.eps if self.coft else math.inf,
            dropout=self.dropout,
        )
