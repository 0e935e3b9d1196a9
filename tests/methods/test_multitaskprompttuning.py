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


def apply(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["embed"].T


PARAMS = {"embed": jnp.asarray(np.random.default_rng(0).normal(size=(7, 6)), jnp.float32)}
SOURCE = jpeft.MultitaskPromptTuning(3, num_tasks=4, num_ranks=2)


def start(method, params=PARAMS):
    return method.init(KEY, params, jpeft.find_sites(apply, params, jnp.array([[3, 1]])))


def test_each_row_gets_the_prompt_of_its_task():
    trainable, frozen = start(SOURCE)
    w = trainable["embed"]
    batch = {"tokens": jnp.array([[3, 1], [3, 1]]), "tasks": jnp.array([3, 1])}
    tokens = jpeft.prompted(batch, SOURCE)["tokens"]
    found = jpeft.lift(lambda p, tokens: p["embed"][tokens])(SOURCE.bind(trainable, frozen), tokens)
    for row, task in enumerate((3, 1)):
        prompt = np.asarray(w.prompt) * (np.asarray(w.columns[task]) @ np.asarray(w.rows[task]))
        np.testing.assert_allclose(found[row, :3], prompt, atol=1e-6)
        np.testing.assert_array_equal(found[row, 3:], PARAMS["embed"][jnp.array([3, 1])])


def test_the_factors_start_small_and_the_prompt_as_it_is_told_to():
    method = jpeft.MultitaskPromptTuning(2, num_tasks=500, num_ranks=9, init_prompt="text", init_text_ids=(5, 2))
    w = start(method)[0]["embed"]
    np.testing.assert_array_equal(w.prompt, PARAMS["embed"][jnp.array([5, 2])])
    assert abs(float(w.columns.std()) - 0.02) < 0.001 and abs(float(w.rows.std()) - 0.02) < 0.001


@pytest.mark.parametrize("source", ["average", "shared", 2])
def test_a_new_task_starts_from_the_others(source):
    trainable, frozen = start(SOURCE)
    trainable = jax.tree.map(lambda x: x + 1, trainable)
    method, started = SOURCE.for_new_task(trainable, source, jax.random.key(5) if source == "shared" else None)
    assert method == jpeft.MultitaskPromptTuning(3, num_tasks=1, num_ranks=2)
    assert jax.tree.structure((started, frozen)) == jax.tree.structure(start(method))
    before, after = trainable["embed"], started["embed"]
    np.testing.assert_array_equal(after.prompt, before.prompt)
    for name in ("columns", "rows"):
        x, y = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        assert y.shape == (1, *x.shape[1:])
        if source == "shared":
            assert 0 < np.abs(y).max() < 0.1
        else:
            np.testing.assert_allclose(y[0], x.mean(0) if source == "average" else x[2], rtol=1e-6)
    tokens = jpeft.prompted({"tokens": jnp.array([[3, 1]])}, method)["tokens"]
    assert np.isfinite(jpeft.lift(apply)(method.bind(started, frozen), tokens)).all()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "init"),
    [("average", "AVERAGE_SOURCE_TASKS"), (1, "EXACT_SOURCE_TASK"), ("shared", "ONLY_SOURCE_SHARED")],
)
def test_a_new_task_starts_as_peft_s(source, init, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    w = jax.tree.map(lambda x: x + 1, start(SOURCE)[0])["embed"]
    names = {"prompt_embeddings": w.prompt, "prefix_task_cols": w.columns, "prefix_task_rows": w.rows}
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in names.items()}, tmp_path / "source.bin")
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_tasks=1,
        num_ranks=2,
        token_dim=6,
        num_transformer_submodules=1,
        prompt_tuning_init=init,
        prompt_tuning_init_state_dict_path=str(tmp_path / "source.bin"),
        prompt_tuning_init_task=1,
    )
    theirs = peft.tuners.MultitaskPromptEmbedding(config, torch.nn.Embedding(7, 6))
    _, started = SOURCE.for_new_task({"embed": w}, source, KEY)
    ours = started["embed"]
    np.testing.assert_allclose(ours.prompt, theirs.embedding.weight.detach(), rtol=1e-6)
    if source != "shared":
        np.testing.assert_allclose(ours.columns, theirs.prefix_task_cols.detach(), rtol=1e-6)
        np.testing.assert_allclose(ours.rows, theirs.prefix_task_rows.detach(), rtol=1e-6)


def test_the_count_is_one_prompt_and_the_factors_of_each_task():
    params = {"embed": jax.ShapeDtypeStruct((32, 64), jnp.float32)}
    method = jpeft.MultitaskPromptTuning(5, num_tasks=3, num_ranks=2)
    trainable, _ = jax.eval_shape(lambda p: start(method, p), params)
    assert sum(x.size for x in jax.tree.leaves(trainable)) == 5 * 64 + 3 * 2 * (5 + 64) == 734


@pytest.mark.parametrize("name", ["num_tasks", "num_ranks"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"expected a whole {name} >= 1, got {name}=0"):
        jpeft.MultitaskPromptTuning(**{name: 0})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("shared", r"expected a key for new factors; write for_new_task\(trainable, 'shared', key\)"),
        (4, "a task below 4, got 4"),
        (-1, "a task below 4, got -1"),
        ("mean", "'average', 'shared' or a task below 4, got 'mean'"),
    ],
)
def test_a_source_that_there_is_not_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        SOURCE.for_new_task(start(SOURCE)[0], source)
