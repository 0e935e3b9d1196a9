"""VB-LoRA: LoRA whose factors are composed from one vector bank (Li, Han and Ji 2024, arXiv 2405.15179).

    W' = W + A·B;   every sub-vector of A and B, `vector_length` long, is   Σ_j softmax(topk(σ))_j · bank_j

with one trained bank (num_vectors, vector_length) for the whole model and trained logits σ for each sub-vector:
logits_a (*stack, *batch, rank, in / vector_length, num_vectors) for the columns of A and logits_b (*stack, *batch,
out / vector_length, rank, num_vectors) for the rows of B. Only the `topk` largest logits of a sub-vector, and their
vectors, have gradients. The bank starts at U(±bank_bound), the logits at N(0, logits_std²), so that neither factor is
zero: the start is near the pretrained function, and not that function itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.tree import key_for_path
from jpeft.core.weight import matrix_sizes, static, weight

__all__ = ["VBLoRA"]


@weight
class Composed(Factored):
    """`base + a · b` with a and b composed of vectors of the bank.

    Shapes: logits_a (*stack, *batch, rank, in parts, vectors), logits_b (*stack, *batch, out parts, rank, vectors);
    shared bank (vectors, vector_length).
    """

    base: Any
    logits_a: Any
    logits_b: Any
    bank: Any = None
    key: Any = None
    axes: str = static()
    topk: int = static(2)
    dropout: float = static(0.0)
    scale = 1.0

    FIELDS = {"logits_a": "rpv", "logits_b": "qrv", "bank": "vl", "key": ""}
    TRAINABLE = frozenset({"logits_a", "logits_b", "bank"})
    UNSTACKED = frozenset({"bank"})

    def tied(self):
        return {"bank": "bank"}

    def factors(self):
        a, b = self._composed(self.logits_a), self._composed(self.logits_b).mT
        a = a.reshape(*a.shape[:-2], -1).mT
        return a, b.reshape(*b.shape[:-3], -1, b.shape[-1]).mT

    def _composed(self, logits):
        """The sub-vectors, (*logits' axes but the last, vector_length)."""
        largest, places = jax.lax.top_k(logits, self.topk)
        return jnp.einsum("...k,...kl->...l", jax.nn.softmax(largest), self.bank[places])


@dataclass(frozen=True)
class VBLoRA(Method):
    """Low-rank adaptation with all factors mixed from one bank of vectors. Mergeable; not quite a no-op at the start.

    Trainable parameters: num_vectors · vector_length, and rank · num_vectors · (in + out) / vector_length a matrix. (Of
    the logits a finished adapter needs `topk` only; the paper counts those as stored. Here all are saved, and training
    can go on.)

    Fields:
        rank: of the update; the update has no scale.
        num_vectors, vector_length: the bank's size; vector_length must divide the inputs and outputs of every site.
        topk: how many vectors a sub-vector mixes.
        bank_bound, logits_std: the start of the bank and of the logits.
        dropout: rate on the input of A, on only while `bind` is given a key.

    Raises:
        ValueError: from the constructor: a size below 1, topk above num_vectors, a bound or deviation that is not above
            zero, dropout outside [0, 1); from `init`: a rank above min(in, out), a size that is not divisible.

    Example:
        >>> import jpeft
        >>> jpeft.VBLoRA(num_vectors=90, vector_length=256, targets=["q_proj", "v_proj"]).topk
        2
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    bank_bound: float = 0.02
    logits_std: float = 0.1
    dropout: float = 0.0

    NO_OP_AT_START = False  # were one factor zero, the bank that both are made of would be zero, and all gradients
    SMALL = {
        "rank": 2,
        "num_vectors": 7,
        "vector_length": 4,
        "bank_bound": 0.1,
        "targets": r"^(?!embed|head|torch_head)",  # whose 37 or 19 outputs four does not divide
    }
    EXPORT = Export(
        "VBLORA",
        tensors={"dense": {"vblora_logits_A": ("logits_a", "rpv"), "vblora_logits_B": ("logits_b", "qrv")}},
        config={
            "r": "rank",
            "num_vectors": "num_vectors",
            "vector_length": "vector_length",
            "topk": "topk",
            "vblora_dropout": "dropout",
            "init_vector_bank_bound": "bank_bound",
            "init_logits_std": "logits_std",
        },
        fixed={"save_only_topk_weights": False, "bias": "none"},
        shared={"base_model.vblora_vector_bank": ("bank", "vl")},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "num_vectors", "vector_length", "topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected a whole {name} >= 1, got {name}={value}")
        if self.topk > self.num_vectors:
            raise ValueError(f"expected topk <= num_vectors, got topk={self.topk}, num_vectors={self.num_vectors}")
        for name in ("bank_bound", "logits_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {name}={getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        if self.rank > min(n_in, n_out):
            return f"rank {self.rank} is above min(in, out) = min({n_in}, {n_out}); lower it or leave the site out"
        for size, what in ((n_in, "inputs"), (n_out, "outputs")):
            if size % self.vector_length:
                return (
                    f"vector_length {self.vector_length} does not divide its {size} {what}; choose a divisor of all "
                    "sizes or leave the site out"
                )
        return None

    def shared(self, key, params, chosen: dict[str, Site]):
        dtype = jnp.result_type(jnp.float32, *(site.dtype for site in chosen.values()))
        shape, bound = (self.num_vectors, self.vector_length), self.bank_bound
        return {"bank": jax.random.uniform(key_for_path(key, "vblora_vector_bank"), shape, dtype, -bound, bound)}

    def wrap(self, key, leaf, site: Site) -> Composed:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)

        def logits(key, *shape):
            return self.logits_std * jax.random.normal(key, (*lead, *shape, self.num_vectors), dtype)

        a_key, b_key = jax.random.split(key)
        a = logits(a_key, self.rank, n_in // self.vector_length)
        b = logits(b_key, n_out // self.vector_length, self.rank)
        return Composed(leaf, a, b, axes=site.axes.lstrip("s"), topk=self.topk, dropout=self.dropout)
