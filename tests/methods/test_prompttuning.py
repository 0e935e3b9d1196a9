"""Prompt tuning: HF PEFT's numbers on a whole model, starts, a cached decode, heads, and other Weights beneath."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_prompts import assert_same_as_peft_prompt

import jpeft

KEY = jax.random.key(0)
TOKENS = np.array([[3, 1, 4], [1, 5, 2]])
TABLE = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def tied(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["embed"].T


def start(method, fn=tied, params=None, tokens=TOKENS):
    params = {"embed": jnp.asarray(TABLE)} if params is None else params
    return method.init(KEY, params, jpeft.find_sites(fn, params, tokens))


def test_nothing_may_be_put_around_a_prompt():
    prompt = jpeft.PromptTuning(2)
    for outer in (jpeft.LoRA(rank=1, targets="embed"), jpeft.FullFineTuning(targets="embed"), jpeft.PromptTuning(3)):
        with pytest.raises(ValueError, match="of a chain one method has a prompt, and it comes last"):
            start(jpeft.chain(prompt, outer))
    beneath = jpeft.LoRA(rank=1, targets="embed")
    trainable, _ = start(jpeft.chain(beneath, prompt))
    assert trainable[1]["embed"].rows.shape == (2, 5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(tmp_path):
    peft = pytest.importorskip("peft")
    assert_same_as_peft_prompt(
        tmp_path,
        jpeft.PromptTuning(4, init_prompt="normal"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        lambda encoder: [encoder.embedding.weight],
        lambda w: [w.rows],
        named=lambda w: {"prompt_embeddings": w.rows},
    )
