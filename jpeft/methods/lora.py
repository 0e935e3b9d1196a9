"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    W' = W + s·A·B,        s = alpha / rank         (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732: alpha / √rank)

with A (*stack, *batch, in, rank) and B (*stack, *batch, rank, out). A starts Kaiming-uniform with a = √5, that is
U(±1/√in), and B at zero, as in HF PEFT and the authors' code (the paper says Gaussian). For an embedding A starts at
zero and B from N(0, 1). For a convolution `in` is window × channels: A is a convolution to `rank` channels, B is 1×1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.factored import Factored
from jpeft.core.method import Method
from jpeft.core.sites import Site
from jpeft.core.targets import first_match, refuse_unmatched
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import Weight, matrix_sizes, static, weight

if TYPE_CHECKING:
    import optax

__all__ = ["LoRA", "LowRank", "lora_plus"]


@weight
class LowRank(Factored):
    """`base + scale · a @ b`. The update is never formed but by `dense`.

    Shapes: a (*stack, *batch, in, rank), b (*stack, *batch, rank, out), key (*stack, *batch) or None.
    """

    base: Any
    a: Any
    b: Any
    key: Any = None
    axes: str = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    freeze_a: bool = static(default=False)

    FIELDS = {"a": "ir", "b": "ro", "key": ""}
    TRAINABLE = frozenset({"a", "b"})
    SLICEABLE = "io"
    UP = frozenset({"b"})

    def trainable_fields(self) -> frozenset[str]:
        return frozenset({"b"}) if self.freeze_a else self.TRAINABLE

    def factors(self):
        return self.a, self.b


@dataclass(frozen=True)
class _LowRankMethod(Method):
    """What the methods that train `s·A·B` have in common, whatever they start from.

    Fields:
        rank, alpha: the update's rank and its scale's numerator.
        scaling: `"standard"` (alpha / rank) or `"rslora"` (alpha / √rank).
        dropout: rate on the input of A, on only while `bind` is given a key.
        rank_pattern, alpha_pattern: `{regex: value}` on paths, first match wins; each must match an adapted site.
        dtype: of A and B; by default float32 for bases of 16 bits or fewer, else the base's.
    """

    rank: int = 8
    alpha: float = 8.0
    scaling: Literal["standard", "rslora"] = "standard"
    dropout: float = 0.0
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for rank in (self.rank, *(value for _, value in self.rank_pattern)):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"expected a whole rank >= 1, got {rank=} in rank={self.rank}, {self.rank_pattern=}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")
        self._one_of("scaling", "standard", "rslora")
        if self.dtype is not None:
            try:
                object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
            except TypeError as error:
                raise ValueError(f"expected dtype as 'float32' or 'bfloat16', got {self.dtype!r}") from error

    def _one_of(self, name: str, *known: str) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"expected {name} in {known}, got {getattr(self, name)!r}")

    def chosen(self, sites):
        chosen = super().chosen(sites)
        for name in ("rank_pattern", "alpha_pattern"):
            refuse_unmatched(name, getattr(self, name), list(chosen))
        return chosen

    def rank_of(self, path: str) -> int:
        """The rank at a path, by `rank_pattern`."""
        return first_match(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """The update's factor at a path."""
        rank = self.rank_of(path)
        return first_match(self.alpha_pattern, path, self.alpha) / (rank if self.scaling == "standard" else rank**0.5)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = matrix_sizes(site.shape, site.axes)
        rank = self.rank_of(site.path)
        if rank > min(n_in, n_out):
            return (
                f"rank {rank} is above min(in, out) = min({n_in}, {n_out}); write rank_pattern={{{site.path!r}: ...}}"
            )
        return None

    def _dtype(self, leaf):
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        return jnp.promote_types(leaf.dtype, jnp.float32)

    def _as_lora(self, paths, **changes) -> LoRA:
        """The plain LoRA of these very paths with this method's other fields, some of them changed."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(_LowRankMethod)}
        return LoRA(**{**fields, "targets": tuple(map(_only, paths)), **changes})


def _only(path: str) -> str:
    """The regex of one path."""
    return f"^{re.escape(path)}$"


PEFT_LORA = Export(
    "LORA",
    tensors={
        "dense": {"lora_A.weight": ("a", "ri"), "lora_B.weight": ("b", "or")},
        "embedding": {"lora_embedding_A": ("a", "ri"), "lora_embedding_B": ("b", "or")},
        "conv": {"lora_A.weight": ("a", "ri"), "lora_B.weight": ("b", "orw")},
    },
    config={
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": ("scaling", "rslora"),
    },
    patterns={"rank_pattern": ("rank_pattern", "rank"), "alpha_pattern": ("alpha_pattern", "alpha")},
    fixed={"init_lora_weights": True, "use_dora": False, "bias": "none"},
    neutral={
        "init_lora_weights": (False, "gaussian", "orthogonal", "eva", "mica"),  # the others change the base
        "eva_config": (),
        "megatron_core": (),
        "qalora_group_size": (),
        "runtime_config": (),
    },
)


@dataclass(frozen=True)
class LoRA(_LowRankMethod):
    """Low-rank adaptation. Mergeable; exactly the pretrained function at the start.

    Fields:
        rank, alpha: the update's rank and its scale's numerator.
        scaling: `"standard"` (alpha / rank) or `"rslora"` (alpha / √rank).
        dropout: rate on the input of A, on only while `bind` is given a key.
        rank_pattern, alpha_pattern: `{regex: value}` on paths, first match wins; each must match an adapted site.
        dtype: of A and B; by default float32 for bases of 16 bits or fewer, else the base's.
        init_a: A's start: `"kaiming"`, `"gaussian"` (std 1/rank), or `"orthogonal"` (A·B = 0 with both nonzero).
        freeze_a: train B alone (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303).

    Raises:
        ValueError: from the constructor: a rank below 1, dropout outside [0, 1), an unknown scaling, init_a or dtype;
            from `init`: a rank above min(in, out) of a site, a pattern that matches no adapted site.

    Example:
        >>> import jpeft
        >>> jpeft.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}).rank
        16
    """

    init_a: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    freeze_a: bool = False

    EXPORT = PEFT_LORA

    def __post_init__(self):
        super().__post_init__()
        self._one_of("init_a", "kaiming", "gaussian", "orthogonal")

    def check(self, site: Site) -> str | None:
        rank = self.rank_of(site.path)
        if self.init_a == "orthogonal" and (rank % 2 or site.kind == "embedding"):
            return f"init_a='orthogonal' needs an even rank and no embedding, got rank {rank} on a {site.kind} site"
        return super().check(site)

    def wrap(self, key, leaf, site: Site) -> LowRank:
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        rank, dtype = self.rank_of(site.path), self._dtype(leaf)
        a_key, b_key = jax.random.split(key)
        b = jnp.zeros((*lead, rank, n_out), dtype)
        if site.kind == "embedding":
            a, b = jnp.zeros((*lead, n_in, rank), dtype), jax.random.normal(b_key, b.shape, dtype)
        elif self.init_a == "kaiming":
            bound = 1 / math.sqrt(n_in)
            a = jax.random.uniform(a_key, (*lead, n_in, rank), dtype, -bound, bound)
        elif self.init_a == "gaussian":
            a = jax.random.normal(a_key, (*lead, n_in, rank), dtype) / rank
        else:
            q = jax.random.orthogonal(jax.random.fold_in(key, 2), rank, lead, jnp.float32)
            left = jax.random.normal(a_key, (*lead, n_in, rank // 2), jnp.float32) @ q[..., 0::2, :] / 10
            a = left.astype(dtype)
            b = (q[..., 1::2, :].mT @ jax.random.normal(b_key, (*lead, rank // 2, n_out), jnp.float32) / 10).astype(
                dtype
            )
        axes = site.axes.lstrip("s")
        scale = self.scale_of(site.path)
        return LowRank(leaf, a, b, axes=axes, scale=scale, dropout=self.dropout, freeze_a=self.freeze_a)

    def exported(self, trainable, frozen):
        if not self.freeze_a:
            return self, trainable
        halves = dict(leaves_with_paths(frozen))
        whole = lambda path, w: w.replace(a=halves[path].a, freeze_a=False) if isinstance(w, LowRank) else w
        return dataclasses.replace(self, freeze_a=False), map_with_paths(whole, trainable)


def lora_plus(optimizer: optax.GradientTransformation, ratio: float = 16.0) -> optax.GradientTransformation:
    """LoRA+: B learns `ratio` times as fast as A (Hayou et al. 2024, arXiv 2402.12354).

    The optimizer's updates of the fields that map up from the rank (`Weight.UP`) times `ratio`, all others as they are:
    the same as two learning rates, weight decay included. HF PEFT's `create_loraplus_optimizer` also gives vectors
    (DoRA's magnitude, biases) the rate of B, and adapted embeddings one of their own.

    Raises:
        ValueError: a ratio that is not above zero.

    Example:
        >>> import jpeft, optax
        >>> tx = jpeft.lora_plus(optax.adamw(1e-4), ratio=16.0)
    """
    import optax

    if not ratio > 0:
        raise ValueError(f"expected a ratio > 0 of B's learning rate to A's, got {ratio=}")
    return optax.chain(optimizer, optax.stateless(lambda updates, _: _scaled_up(updates, ratio)))


def _scaled_up(updates, ratio: float):
    def scaled(_, leaf):
        if not isinstance(leaf, Weight):
            return leaf
        up = {name: jax.tree.map(lambda u: u * ratio, getattr(leaf, name)) for name in leaf.UP}
        return leaf.replace(base=_scaled_up(leaf.base, ratio), **up)

    return map_with_paths(scaled, updates)
