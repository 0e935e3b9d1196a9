"""Multitask prompt tuning, MPT: one prompt for all tasks, times a low-rank one for each (Wang, Panda, Karlinsky, Feris,
Sun and Kim 2023, arXiv 2303.02861).

    P_k = P ∘ (C_k·R_k)        for task k

P (*stack, num_tokens, out), C (*stack, num_tasks, num_tokens, num_ranks), R (*stack, num_tasks, num_ranks, out). The
paper's rank is one: an outer product. C and R start from N(0, 0.02²), as in HF PEFT. The batch says by `tasks` which
prompt a row gets, the ids of task k's being `VIRTUAL + k · num_tokens + j`.

Two stages: the source tasks train together; then `for_new_task` starts the prompt of one more from theirs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jpeft.core.export import Export
from jpeft.core.sites import Site
from jpeft.core.tree import map_with_paths
from jpeft.core.weight import matrix_sizes, static, weight
from jpeft.methods._prompts import SIZES, STARTS, Prompted, _StartingRows

__all__ = ["MultitaskPromptTuning", "TaskPrompts"]

_STD = 0.02


@weight
class TaskPrompts(Prompted):
    """One prompt a task: `prompt` (*stack, n, out) times `columns` (*stack, tasks, n, r) @ `rows` (*stack, tasks, r,
    out), task after task.
    """

    base: Any
    prompt: Any
    columns: Any
    rows: Any
    axes: str = static()

    FIELDS = {"prompt": "no", "columns": "tnr", "rows": "tro"}
    TRAINABLE = frozenset(FIELDS)
    SLICEABLE = "io"

    def made(self):
        each = self.prompt[..., None, :, :] * (self.columns @ self.rows)
        return each.reshape(*each.shape[:-3], -1, each.shape[-1])


@dataclass(frozen=True)
class MultitaskPromptTuning(_StartingRows):
    """Virtual tokens that tasks share, scaled by factors of each. Not mergeable: they are tokens, not weights.

    Fields:
        num_tokens: virtual tokens of a task's prompt.
        num_tasks: how many tasks; a batch has `tasks` (rows,) from 0 on.
        num_ranks: rank of what the shared prompt is multiplied with.
        init_prompt: the shared prompt's start, as `PromptTuning`'s: `"random"`, `"normal"`, `"vocabulary"`, `"text"`.
        init_text_ids, fit, sample_from: as `PromptTuning`'s.
        targets: the token embedding, as `PromptTuning`'s.

    Raises:
        ValueError: as `PromptTuning`'s; from the constructor also num_tasks or num_ranks below 1.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> method = jpeft.MultitaskPromptTuning(num_tokens=2, num_tasks=3)
        >>> batch = {"tokens": jnp.array([[5, 6], [7, 8]]), "tasks": jnp.array([0, 2])}
        >>> jpeft.prompted(batch, method)["tokens"] - jpeft.VIRTUAL >= 0
        Array([[ True,  True, False, False],
               [ True,  True, False, False]], dtype=bool)
    """

    num_tasks: int = 1
    num_ranks: int = 1

    SMALL = {"num_tokens": 3, "num_tasks": 2, "num_ranks": 2}
    EXPORT = Export(
        peft_type="MULTITASK_PROMPT_TUNING",
        whole={"prompt_embeddings": ("prompt",), "prefix_task_cols": ("columns",), "prefix_task_rows": ("rows",)},
        config={"num_virtual_tokens": "num_tokens", "num_tasks": "num_tasks", "num_ranks": "num_ranks"},
        fixed={"prompt_tuning_init": "RANDOM"},
        neutral=SIZES | STARTS | {f"prompt_tuning_init_{name}": () for name in ("task", "state_dict_path")},
    )

    def __post_init__(self):
        super().__post_init__()
        self._whole("num_tasks", "num_ranks")

    @property
    def num_prompts(self) -> int:
        return self.num_tasks

    def wrap(self, key, leaf, site: Site) -> TaskPrompts:
        lead, _, width = matrix_sizes(site.shape, site.axes)
        prompt = self.starting_rows(key, leaf, site)
        normal = lambda n, *shape: _STD * jax.random.normal(jax.random.fold_in(key, n), (*lead, *shape), prompt.dtype)
        columns = normal(1, self.num_tasks, self.num_tokens, self.num_ranks)
        rows = normal(2, self.num_tasks, self.num_ranks, width)
        return TaskPrompts(leaf, prompt, columns, rows, axes=site.axes.lstrip("s"))

    def for_new_task(self, trainable, source: int | Literal["average", "shared"] = "average", key=None):
        """`(method, trainable)` of one new task, started from what was trained on several; the frozen half stays.

        Args:
            trainable: of the source tasks.
            source: where the task's own factors start: at the mean of the tasks' (HF PEFT's `AVERAGE_SOURCE_TASKS`), at
                one task's (`EXACT_SOURCE_TASK`), or anew, `"shared"` (`ONLY_SOURCE_SHARED`), which needs a `key`.

        Raises:
            ValueError: a task that there is not, `"shared"` without a key.

        Example:
            >>> import jax, jax.numpy as jnp, jpeft
            >>> apply, params = lambda params, tokens: params["embed"][tokens], {"embed": jnp.ones((9, 4))}
            >>> sites = jpeft.find_sites(apply, params, jnp.array([[1, 2]]))
            >>> method = jpeft.MultitaskPromptTuning(num_tokens=2, num_tasks=3)
            >>> trainable, frozen = method.init(jax.random.key(0), params, sites)
            >>> method, trainable = method.for_new_task(trainable)  # and train on
            >>> method.num_tasks, trainable["embed"].rows.shape
            (1, (1, 1, 4))
        """
        if source == "shared" and key is None:
            raise ValueError("expected a key for new factors; write for_new_task(trainable, 'shared', key)")
        if source not in ("average", "shared", *range(self.num_tasks)):
            raise ValueError(f"expected source as 'average', 'shared' or a task below {self.num_tasks}, got {source!r}")

        def one(n, x):
            """What the new task has of a field (*stack, tasks, _, _)."""
            if source == "average":
                return x.mean(-3, keepdims=True)
            if source == "shared":
                assert key is not None
                return _STD * jax.random.normal(jax.random.fold_in(key, n), x[..., :1, :, :].shape, x.dtype)
            return x[..., source : source + 1, :, :]

        def started(_, w):
            return w.replace(columns=one(1, w.columns), rows=one(2, w.rows)) if isinstance(w, TaskPrompts) else w

        return dataclasses.replace(self, num_tasks=1), map_with_paths(started, trainable)
