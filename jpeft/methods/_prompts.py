"""Prompts: rows that the embedding finds under virtual ids. What the methods that train such rows have in common.

    E'[t] = rows[t − VIRTUAL]  where t >= VIRTUAL,        E'[t] = E[t]  elsewhere

The rows enter exactly where the embedding's do, so that a model which scales its embeddings scales them too. Every
other use of the leaf is the base's own: a tied head never sees the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.lift import lift
from jpeft.core.method import Method
from jpeft.core.ops import Gather
from jpeft.core.prompts import VIRTUAL
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets, select
from jpeft.core.weight import Weight, apply, dense, matrix_sizes, static, to_matrix, weight

__all__ = ["SIZES", "STARTS", "Prompt", "Prompted", "lookup"]

# Options of HF PEFT's that repeat what the model says, and that say how a prompt started.
SIZES: dict[str, tuple] = {name: () for name in ("token_dim", "num_layers", "num_attention_heads")}
SIZES["num_transformer_submodules"] = (1,)
STARTS: dict[str, tuple] = {f"tokenizer_{name}": () for name in ("kwargs", "name_or_path")}
STARTS["prompt_tuning_init_text"] = ()
STARTS["prompt_tuning_init"] = (None, "TEXT", "SAMPLE_VOCAB")
STARTS["prompt_tuning_init"] += ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


class Prompted(Weight):
    """`base` with n rows more, under the ids `VIRTUAL` to `VIRTUAL + n - 1`; later ids give NaN. A subclass defines
    `made`, which runs once for every call of the lifted function.
    """

    SLICEABLE = "i"

    def made(self) -> jax.Array:
        """The rows (*stack, n, out)."""
        raise TypeError(f"{type(self).__name__} defines no made")

    def fitted(self) -> Weight:
        base = self.base.fitted() if isinstance(self.base, Weight) else self.base
        return Prompt(base, self.made(), axes=self.axes)

    def apply(self, op, x):
        if not isinstance(op, Gather):
            return apply(op, x, self.base)
        ids = op.rows(x).astype(jnp.int32)
        virtual = ids >= VIRTUAL
        own = apply(op, op.with_rows(x, jnp.where(virtual, 0, ids)), self.base)
        found = self.made().at[jnp.where(virtual, ids - VIRTUAL, 0)].get(mode="fill", fill_value=jnp.nan)
        return op.map_outputs(own, lambda y: jnp.where(virtual[..., None], found.astype(y.dtype), y))

    def dense(self):
        return dense(self.base)

    def why_not_merge(self):
        return (
            "a prompt is no change of the weights; keep the adapter, and put its virtual tokens into the batch with "
            "jpeft.prompted(batch, method)"
        )

    def why_not_wrap(self):
        return "a prompt stands there, and stays outermost; of a chain one method has a prompt, and it comes last there"


@weight
class Prompt(Prompted):
    """The rows themselves, (*stack, n, out)."""

    base: Any
    rows: Any
    axes: str = static()

    FIELDS = {"rows": "no"}
    TRAINABLE = frozenset({"rows"})
    SLICEABLE = "io"

    def made(self):
        return self.rows


def lookup(leaf, ids: jax.Array, axes: str) -> jax.Array:
    """Rows `ids` (*stack, n) of an embedding, (*stack, n, out); nothing else of a Weight is made dense."""

    def rows(table, ids):
        if table.ndim > len(axes):
            return jax.lax.map(lambda layer: rows(*layer), (table, ids))
        taken = jnp.take(table, ids, axis=axes.index("i"))
        return to_matrix(taken, axes)

    return lift(rows)(leaf, ids)


@dataclass(frozen=True)
class _Prompting(Method):
    """What all methods with prompts have in common: one of them, on one embedding.

    Fields:
        num_tokens: virtual tokens of the prompt.
        targets: the token embedding. By default the one whose rows are the outputs of the vocabulary head, else the one
            with the most rows: others look up positions or types.
    """

    num_tokens: int = 20
    targets: Targets = field(default="embedding", kw_only=True)

    KINDS = ("embedding",)
    NO_OP_AT_START = False  # the sequence has tokens that the pretrained model never saw

    def __post_init__(self):
        super().__post_init__()
        self._whole("num_tokens")

    def _whole(self, *names: str) -> None:
        for name in names:
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"expected a whole {name} >= 1, got {name}={value!r}")

    def _one_of(self, name: str, *known: str) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"expected {name} in {known}, got {getattr(self, name)!r}")

    @property
    def prompt_length(self) -> int:
        return self.num_tokens

    def chosen(self, sites: Sites) -> dict[str, Site]:
        chosen = super().chosen(_with_one_embedding(sites) if self.targets == "embedding" else sites)
        if len(chosen) > 1:
            raise ValueError(
                f"{type(self).__name__} puts its prompt into one embedding, targets={self.targets!r} match "
                f"{', '.join(chosen)}; name the one that looks up the tokens"
            )
        kinds = tuple({site.kind for site in sites})
        if self.modules_to_save and (both := chosen.keys() & select(sites, self.modules_to_save, kinds).keys()):
            raise ValueError(
                f"modules_to_save={self.modules_to_save} would take {', '.join(both)} from the prompt; to train both, "
                f"write chain(FullFineTuning(targets=...), {type(self).__name__}(...))"
            )
        return chosen


def _with_one_embedding(sites: Sites) -> Sites:
    """The sites with the token embedding alone of all embeddings."""
    sizes = {s: matrix_sizes(s.shape, s.axes) for s in sites if "?" not in s.axes}
    vocabularies = {out for s, (_, _, out) in sizes.items() if s.head}
    rows = {s: n for s, (_, n, _) in sizes.items() if s.kind == "embedding"}
    if not rows:
        return sites
    token = max(rows, key=lambda s: (rows[s] in vocabularies, rows[s]))
    return Sites(tuple(s for s in sites if s.kind != "embedding" or s.path == token.path))


@dataclass(frozen=True)
class _StartingRows(_Prompting):
    """What the methods that train a prompt's rows themselves have in common: how the rows start.

    Fields:
        init_prompt: `"random"`, U(±0.5); `"normal"`, N(0, 1); `"vocabulary"`, rows of random tokens; `"text"`, the rows
            of `init_text_ids`.
        init_text_ids: for each virtual token a token id, or several whose rows are averaged:
            `init_text_ids=tokenizer.encode(text).ids`.
        fit: of a text of another length: `"exact"` refuses it, `"repeat"` repeats and cuts it as HF PEFT does,
            `"sample"` samples what lacks from the vocabulary.
        sample_from: only the first so many ids are sampled; where ids are sorted by frequency, the commonest.
    """

    init_prompt: Literal["random", "normal", "vocabulary", "text"] = "random"
    init_text_ids: Any = ()
    fit: Literal["exact", "repeat", "sample"] = "exact"
    sample_from: int = 5000

    def __post_init__(self):
        super().__post_init__()
        self._one_of("init_prompt", "random", "normal", "vocabulary", "text")
        self._one_of("fit", "exact", "repeat", "sample")
        self._whole("sample_from")
        if isinstance(self.init_text_ids, str):
            raise ValueError(
                f"expected token ids, got the text init_text_ids={self.init_text_ids!r}; "
                "write init_text_ids=tokenizer.encode(text).ids"
            )
        if self.init_prompt != "text" and (self.init_text_ids or self.fit != "exact"):
            raise ValueError(f"init_text_ids and fit are of init_prompt='text', got init_prompt={self.init_prompt!r}")
        if self.init_prompt == "text":
            self._check_length(len(self.init_text_ids))

    def _check_length(self, given: int) -> None:
        if not given:
            raise ValueError("init_prompt='text' starts from a text; write init_text_ids=tokenizer.encode(text).ids")
        if given == self.num_tokens or self.fit == "repeat" or (self.fit == "sample" and given < self.num_tokens):
            return
        raise ValueError(
            f"the text has {given} tokens, the prompt {self.num_tokens}: each virtual token starts at one of the "
            f"text's; write num_tokens={given}, another text, or fit='repeat', which repeats and cuts the text"
            + ("" if given > self.num_tokens else ", or fit='sample', which samples what lacks from the vocabulary")
        )

    def check(self, site: Site) -> str | None:
        known = matrix_sizes(site.shape, site.axes)[1]
        wrong = [n for group in self._groups() for n in group if not 0 <= n < known]
        return f"init_text_ids has {wrong[0]}, not among its {known} tokens" if wrong else None

    def _groups(self) -> list[tuple[int, ...]]:
        """The ids whose rows are averaged, for each virtual token that starts at some."""
        groups = [tuple(n) if isinstance(n, (tuple, list)) else (n,) for n in self.init_text_ids]
        times = -(-self.num_tokens // max(len(groups), 1)) if self.fit == "repeat" else 1
        return (groups * times)[: self.num_tokens]

    def starting_rows(self, key, leaf, site: Site) -> jax.Array:
        """The rows (*stack, num_tokens, out) at the start."""
        lead, known, width = matrix_sizes(site.shape, site.axes)
        shape, dtype = (*lead, self.num_tokens, width), jnp.promote_types(leaf.dtype, jnp.float32)
        if self.init_prompt == "random":
            return jax.random.uniform(key, shape, dtype, -0.5, 0.5)
        if self.init_prompt == "normal":
            return jax.random.normal(key, shape, dtype)
        axes = site.axes.lstrip("s")
        groups = self._groups()
        ids = np.array([n for group in groups for n in group], np.int32)
        given = lookup(leaf, jnp.broadcast_to(ids, (*lead, len(ids))), axes).astype(dtype)
        ends = np.cumsum([len(group) for group in groups])
        means = [given[..., end - len(group) : end, :].mean(-2) for group, end in zip(groups, ends, strict=True)]
        lacking = self.num_tokens - len(groups)
        population = min(self.sample_from, known)
        draw = lambda key: jax.random.choice(key, population, (lacking,), replace=lacking > population)
        for _ in lead:
            draw = jax.vmap(draw)
        sampled = lookup(leaf, draw(jax.random.split(key, lead) if lead else key), axes).astype(dtype)
        return jnp.concatenate([*(mean[..., None, :] for mean in means), sampled], -2)
