"""Multitask prompt tuning: HF PEFT's numbers on a whole model, and its second stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_prompts import assert_same_as_peft_prompt

import jpeft

KEY = jax.random.key(0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [1, 2])
def test_the_same_numbers_give_what_peft_gives(rank, tmp_path):
    peft = pytest.importorskip("peft")
    tensors = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    assert_same_as_peft_prompt(
        tmp_path,
        jpeft.MultitaskPromptTuning(4, num_tasks=3, num_ranks=rank),
        peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=rank),
        lambda encoder: [encoder.embedding.weight, encoder.prefix_task_cols, encoder.prefix_task_rows],
        lambda w: [w.prompt, w.columns, w.rows],
        tasks=np.array([2, 0, 2]),
        named=lambda w: dict(zip(tensors, (w.prompt, w.columns, w.rows), strict=True)),
    )
