"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, arXiv 2303.10512).

    W' = W + s·Q·Λ·P,        s = alpha / init_rank

with Q (*stack, *batch, in, rank), the diagonal Λ (*stack, *batch, rank) and P (*stack, *batch, rank, out): the paper's
P Λ Q, transposed as kernels are here. Q and P start from N(0, 0.02²), Λ at zero. Nothing is ever decomposed: a penalty
pulls P and Q to orthogonality, and the triplets of all matrices (a column of Q, its λ, a row of P) compete for a budget
that falls from `init_rank` to `target_rank` a matrix; `_allocation.py` has both as optax transformations.

HF PEFT divides by init_rank + 1e-5, a factor of 1 - 1e-5 / init_rank in the update.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.targets import first_match, refuse_unmatched
from jpeft.core.tree import map_with_paths
from jpeft.core.weight import matrix_sizes, static, weight
from jpeft.methods._allocation import FORMS, add_orthogonal_regularization, rank_allocator
from jpeft.methods.lora import LoRA, LowRank

__all__ = ["AdaLoRA", "Triplets"]


@weight
class Triplets(Factored):
    """`base + scale · q @ diag(singular_values) @ p`. The update is never formed but by `dense`.

    Shapes: q (*stack, *batch, in, rank), singular_values (*stack, *batch, rank), p (*stack, *batch, rank, out), key
    (*stack, *batch) or None.
    """

    base: Any
    q: Any
    singular_values: Any
    p: Any
    key: Any = None
    axes: str = static()
    scale: float = static(1.0)
    dropout: float = static(0.0)

    FIELDS = {"q": "ir", "singular_values": "r", "p": "ro", "key": ""}
    TRAINABLE = frozenset({"q", "singular_values", "p"})
    SLICEABLE = "io"
    UP = frozenset({"p"})
    TRIPLETS = ("q", "singular_values", "p")
    """What the budget is allocated to: the inputs' vectors, their values, the outputs' vectors."""

    def factors(self):
        return self.q, self.singular_values[..., None] * self.p


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Low-rank adaptation whose ranks are allocated while it trains. Mergeable; starts at the pretrained function.

    `optimizer(tx)` does all of it around the user's own transformation: it adds the gradient of the orthogonality term
    and then allocates. `penalty` is therefore zero: the term counts once. `pruned`, after training, takes away what the
    allocation has set to zero.

    Fields:
        init_rank, target_rank: of a matrix at first, and on average at last. The paper starts at 1.5 times the target.
        alpha: numerator of the update's scale, alpha / init_rank however many triplets are left.
        total_steps: of the run; `jpeft train` fills it in.
        tinit, tfinal: steps at first with the whole budget, and at last with a fixed allocation; in between it falls.
        delta_t: steps between two allocations; in between, what was set to zero may come back.
        beta1, beta2: smoothing of the sensitivity and of its uncertainty.
        sensitivity: |w·∇w| with w `"before"` the step (the paper) or `"after"` it (the authors' code, HF PEFT).
        orth_reg_weight: the orthogonality term's factor, the paper's γ.
        orthogonality: `"squared"`, Σ ‖PPᵀ - I‖² + ‖QᵀQ - I‖² (the paper), or `"norm"`, the mean of the unsquared norms
            over all P and Q (the authors' code; HF PEFT, with a factor of 0.5).
        dropout: rate on the input of Q, on only while `bind` is given a key.
        rank_pattern: `{regex: rank}` on paths, first match wins: ranks other than `init_rank`, as `pruned` writes them.

    Raises:
        ValueError: from the constructor: ranks, steps or rates that make no schedule; from `init`: a rank above min(in,
            out) of a site, a pattern that matches no adapted site; from `for_steps` and `optimizer`: no total_steps, or
            a schedule that is longer than the run.

    Example:
        >>> import jpeft, optax
        >>> method = jpeft.AdaLoRA(init_rank=12, target_rank=8, tinit=100, tfinal=300, total_steps=1000)
        >>> tx = method.optimizer(optax.adamw(1e-3))
        >>> [method.budget(step, first=24, last=16) for step in (100, 400, 700, 1000)]
        [24, 17, 16, 16]
    """

    init_rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    total_steps: int | None = None
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    sensitivity: Literal["before", "after"] = "before"
    orth_reg_weight: float = 0.1
    orthogonality: Literal["squared", "norm"] = "squared"
    dropout: float = 0.0
    rank_pattern: Any = ()

    SMALL = {"init_rank": 3, "target_rank": 2, "total_steps": 10}
    EXPORT = Export(
        "ADALORA",
        tensors={
            "dense": {"lora_A": ("q", "ri"), "lora_E": ("singular_values", "r1"), "lora_B": ("p", "or")},
            "conv": {"lora_A": ("q", "r(i)"), "lora_E": ("singular_values", "r1"), "lora_B": ("p", "or")},
        },
        config={
            "init_r": "init_rank",
            "target_r": "target_rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "tinit": "tinit",
            "tfinal": "tfinal",
            "deltaT": "delta_t",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orth_reg_weight",
            "total_step": "total_steps",
        },
        fixed={"init_lora_weights": True, "bias": "none"},
        neutral={
            "init_lora_weights": (False,),
            "r": (),
            "megatron_core": (),
            "qalora_group_size": (),
            "runtime_config": (),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        whole = {"target_rank": 1, "init_rank": 1, "total_steps": 1, "tinit": 0, "tfinal": 0, "delta_t": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least or name == "total_steps" and value is None):
                raise ValueError(f"expected a whole {name} >= {least}, got {name}={value}")
        if self.init_rank < self.target_rank:
            raise ValueError(
                f"the budget falls from init_rank to target_rank, but init_rank={self.init_rank} is below "
                f"target_rank={self.target_rank}; the paper has init_rank = 1.5 * target_rank"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected 0 < {name} < 1, got {name}={getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")
        if self.orth_reg_weight < 0:
            raise ValueError(f"expected orth_reg_weight >= 0, got orth_reg_weight={self.orth_reg_weight}")
        for name, known in (("sensitivity", ("before", "after")), ("orthogonality", FORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} in {known}, got {getattr(self, name)!r}")
        if self.total_steps is not None and self.tinit + self.tfinal >= self.total_steps:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_steps={self.total_steps} to lower "
                "the budget in; write a smaller tinit or tfinal"
            )
        wrong = [f"{pattern!r}: {rank}" for pattern, rank in self.rank_pattern if not isinstance(rank, int) or rank < 1]
        if wrong:
            raise ValueError(f"expected whole ranks >= 1 in rank_pattern, got {', '.join(wrong)}")

    def chosen(self, sites):
        chosen = super().chosen(sites)
        refuse_unmatched("rank_pattern", self.rank_pattern, list(chosen))
        return chosen

    def rank_of(self, path: str) -> int:
        """The rank at a path, by `rank_pattern`."""
        return first_match(self.rank_pattern, path, self.init_rank)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        rank = self.rank_of(site.path)
        if rank > min(n_in, n_out):
            return (
                f"rank {rank} is above min(in, out) = min({n_in}, {n_out}); write a smaller init_rank or leave it out"
            )
        return None

    def wrap(self, key, leaf, site: Site) -> Triplets:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        rank, dtype = self.rank_of(site.path), jnp.promote_types(leaf.dtype, jnp.float32)
        q_key, p_key = jax.random.split(key)
        return Triplets(
            leaf,
            0.02 * jax.random.normal(q_key, (*lead, n_in, rank), dtype),
            jnp.zeros((*lead, rank), dtype),
            0.02 * jax.random.normal(p_key, (*lead, rank, n_out), dtype),
            axes=site.axes.lstrip("s"),
            scale=self.alpha / self.init_rank,
            dropout=self.dropout,
        )

    @property
    def final_phase(self) -> int:
        """The step after which the allocation is fixed."""
        if self.total_steps is None:
            raise ValueError("AdaLoRA plans its budget by the run's length; write AdaLoRA(total_steps=...)")
        return self.total_steps - self.tfinal

    def budget(self, step: int, first: int, last: int) -> int:
        """b(t), the triplets that all matrices keep together after so many steps, from `first` down to `last`.

            b(t) = ⌊last + (first - last)·(1 - (t - tinit) / (total_steps - tinit - tfinal))³⌋

        between the two phases that keep it: the paper's section 3.3, in exact integers.
        """
        span = self.final_phase - self.tinit
        left = min(max(self.final_phase - step, 0), span)
        return last + (first - last) * left**3 // span**3

    def for_steps(self, steps: int) -> AdaLoRA:
        if self.total_steps is None:
            return replace(self, total_steps=steps)
        if self.total_steps > steps:
            raise ValueError(
                f"the schedule has total_steps={self.total_steps}, but the run ends after {steps}, above the budget; "
                "leave total_steps out, or train that long"
            )
        return self

    def optimizer(self, tx):
        import optax

        orthogonal = add_orthogonal_regularization(self.orth_reg_weight, self.orthogonality)
        return optax.chain(orthogonal, rank_allocator(self, tx))

    def after_training(self, trainable, frozen):
        return self.pruned(trainable, frozen)

    def pruned(self, trainable, frozen) -> tuple[AdaLoRA, Any, Any]:
        """`(method, trainable, frozen)` of the same function without the triplets whose λ is zero.

        A stacked leaf shrinks to the largest rank that one of its matrices keeps, the others' missing triplets being
        zero; a rank is at least one, so that no array is empty. Not under `jit`: shapes follow from the numbers.
        """
        ranks: dict[str, int] = {}

        def shrink(path, leaf):
            if not isinstance(leaf, Triplets) or leaf.singular_values is None:
                return leaf
            zero = np.asarray(leaf.singular_values) == 0
            ranks[path] = max(1, int((~zero).sum(-1).max()))
            kept = np.argsort(zero, axis=-1, kind="stable")[..., : ranks[path]]
            return leaf.replace(
                q=jnp.take_along_axis(leaf.q, kept[..., None, :], -1),
                singular_values=jnp.take_along_axis(leaf.singular_values, kept, -1),
                p=jnp.take_along_axis(leaf.p, kept[..., :, None], -2),
            )

        smaller = map_with_paths(shrink, trainable)
        patterns = tuple((f"^{re.escape(path)}$", rank) for path, rank in ranks.items())
        return replace(self, rank_pattern=patterns), smaller, frozen

    def exported(self, trainable, frozen):
        """Pruned, it is a LoRA with Λ in its B, which every library can use; before, AdaLoRA as HF PEFT trains it."""
        if not self.rank_pattern:
            self.final_phase  # noqa: B018  HF PEFT reads no schedule without its length
            return self, trainable

        def low_rank(leaf):
            if not isinstance(leaf, Triplets):
                return leaf
            kept = {"axes": leaf.axes, "scale": leaf.scale, "dropout": leaf.dropout}
            return LowRank(leaf.base, *leaf.factors(), **kept, freeze_a=False)

        is_triplets = lambda x: isinstance(x, Triplets)
        alphas = tuple((pattern, self.alpha * rank / self.init_rank) for pattern, rank in self.rank_pattern)
        method = LoRA(
            rank=self.init_rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_pattern=self.rank_pattern,
            alpha_pattern=alphas,
            targets=self.targets,
            modules_to_save=self.modules_to_save,
        )
        return method, jax.tree.map(low_rank, trainable, is_leaf=is_triplets)
