"""Virtual tokens in a batch, against a loop over rows, sequences and tokens."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft


@dataclass(frozen=True)
class Told:
    """What `prompted` asks of a method."""

    prompt_length: int = 0
    num_prompts: int = 1
    position_shift: int = 0


FILL = {"labels": -100, "mask": 1, "token_type_ids": 0}


def sequences_of(batch, row):
    """`(begin, end)` of each sequence of a row, by a loop."""
    ids = batch.get("segment_ids", batch.get("mask", np.ones_like(batch["tokens"])))[row]
    if "segment_ids" in batch:
        ends = [i for i in range(len(ids)) if ids[i] and (i == 0 or ids[i] != ids[i - 1])]
        return [(b, next((k for k in range(b, len(ids)) if ids[k] != ids[b]), len(ids))) for b in ends]
    real = [i for i in range(len(ids)) if ids[i]]
    return [(real[0], real[-1] + 1)] if real else []


def reference(batch, method, at=(), segments=None):
    """The batch as `prompted` documents it: each row is written out slot by slot."""
    rows, length = batch["tokens"].shape
    count, shift = method.prompt_length, method.position_shift
    if not count and not shift:
        return dict(batch)
    at = at or (0,) * count
    found = [sequences_of(batch, row) for row in range(rows)]
    most = segments or max(1, *map(len, found))
    total = length + most * count
    counts = batch.get("segment_ids", batch.get("mask", np.ones_like(batch["tokens"]))) != 0
    batch = dict(batch)
    if shift:
        made = np.zeros((rows, length), np.int32)
        for row, spans in enumerate(found):
            for begin, end in spans:
                made[row, begin:end] = np.arange(end - begin)
        batch["positions"] = np.where(counts, batch.get("positions", made) + shift, batch.get("positions", 0))

    new = {}
    for entry, x in batch.items():
        if np.shape(x)[:2] == (rows, length):
            new[entry] = np.full((rows, total, *x.shape[2:]), -100 if entry == "labels" else 0, x.dtype)
    for row, spans in enumerate(found):
        slot = index = 0
        for begin, end in [*spans, (length, length)]:
            while index < begin:  # padding
                for entry in new:
                    new[entry][row, slot] = batch[entry][row, index]
                index, slot = index + 1, slot + 1
            if begin == length:
                break
            places, start, size = [min(p, end - begin) for p in at], slot, end - begin
            for inside in range(size + 1):
                for j in range(count):
                    if places[j] != inside:
                        continue
                    task = batch["tasks"][row] if "tasks" in batch else 0
                    values = FILL | {"tokens": jpeft.VIRTUAL + task * count + j}
                    values["segment_ids"] = batch["segment_ids"][row, begin] if "segment_ids" in batch else 0
                    values["positions"] = batch["positions"][row, begin] + slot - start if "positions" in batch else 0
                    for entry in new:
                        if entry not in ("targets", "weights"):
                            new[entry][row, slot] = values[entry]
                    slot += 1
                if inside:  # what the token before learns stands right before this one, or at the end
                    for entry in {"targets", "weights"} & new.keys():
                        new[entry][row, slot - 1] = batch[entry][row, begin + inside - 1]
                if inside < size:
                    for entry in new:
                        if entry not in ("targets", "weights"):
                            new[entry][row, slot] = batch[entry][row, index]
                    if "positions" in new and counts[row, index]:
                        new["positions"][row, slot] += slot - start - inside
                    index, slot = index + 1, slot + 1
    return batch | new


@st.composite
def batches(draw):
    rows, length = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 6]))  # few shapes, few compilations
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    whole = lambda *shape: rng.integers(1, 50, (rows, length, *shape)).astype(np.int32)
    batch = {"tokens": whole()}
    kind = draw(st.sampled_from(["full", "left", "right", "holes", "packed", "both"]))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    place = np.arange(length)[None]
    sizes = np.array(lengths)[:, None]
    if kind in ("left", "right"):
        real = place < sizes if kind == "right" else place >= length - sizes
        batch["mask"] = real.astype(np.int32)
    elif kind == "holes":
        batch["mask"] = rng.random((rows, length)) < 0.6
    elif kind in ("packed", "both"):
        ids = draw(
            st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=rows, max_size=rows)
        )
        batch["segment_ids"] = np.array(ids, np.int32)
        if kind == "both":
            batch["mask"] = (batch["segment_ids"] != 0).astype(np.int32)
    for entry in draw(st.sets(st.sampled_from(["targets", "weights", "labels", "token_type_ids", "positions"]))):
        batch[entry] = whole().astype(np.float32 if entry == "weights" else np.int32)
    batch |= {"of_the_row": rng.normal(size=rows), "name": "a batch"}
    count = draw(st.sampled_from([0, 1, 4]))
    tasks = draw(st.integers(1, 3))
    if tasks > 1:
        batch["tasks"] = rng.integers(0, tasks, rows)
    at = draw(st.just(()) | st.lists(st.integers(0, length + 2), min_size=count, max_size=count).map(sorted).map(tuple))
    return batch, Told(count, tasks, draw(st.sampled_from([0, 0, 3]))), at


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for entry, x in theirs.items():
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(ours[entry], x, err_msg=entry)
        else:
            assert ours[entry] == x


@given(batches())
def test_it_is_what_a_loop_makes(case):
    batch, method, at = case
    assert_same(jpeft.prompted(batch, method, at=at), reference(batch, method, at))


@settings(max_examples=12)
@given(batches(), st.integers(1, 3))
def test_arrays_of_jax_and_jit_make_no_difference(case, more):
    batch, method, at = case
    arrays = {k: jnp.asarray(x) for k, x in batch.items() if isinstance(x, np.ndarray)}
    segments = max(1, *(len(sequences_of(batch, row)) for row in range(len(batch["tokens"])))) + more
    expected = reference({k: np.asarray(x) for k, x in arrays.items()}, method, at, segments)
    run = functools.partial(jpeft.prompted, method=method, at=at, segments=segments)
    assert_same(run(arrays), expected)
    assert_same(jax.jit(run)(arrays), expected)


EXAMPLE = {"tokens": np.array([[5, 6, 7, 0]]), "mask": np.array([[1, 1, 1, 0]])}


def test_a_template_is_as_documented():
    batch = EXAMPLE | {"targets": np.array([[6, 7, 8, 0]]), "weights": np.array([[1.0, 1.0, 1.0, 0.0]])}
    new = jpeft.prompted(batch, Told(4), at=(0, 0, 2, 3))
    virtual = lambda x: [int(t) - jpeft.VIRTUAL if t >= jpeft.VIRTUAL else f"t{t}" for t in x[0]]
    assert virtual(new["tokens"]) == [0, 1, "t5", "t6", 2, "t7", 3, "t0"]
    assert new["targets"].tolist() == [[0, 0, 6, 0, 7, 0, 8, 0]]
    assert new["weights"].tolist() == [[0, 0, 1, 0, 1, 0, 1, 0]]
    assert new["mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]


def test_the_next_token_is_the_target_wherever_the_virtual_ones_stand():
    """A row's targets are its tokens one step on: also after the prompt has been put in, where one is learned."""
    tokens = np.arange(1, 9)[None]
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((1, 7))}
    new = jpeft.prompted(batch, Told(3), at=(0, 4, 4))
    following = np.append(np.asarray(new["tokens"][0, 1:]), 8)
    learned = np.asarray(new["weights"][0]) == 1
    assert learned.sum() == 7
    np.testing.assert_array_equal(following[learned], new["targets"][0][learned])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_virtual_ids_fit_whatever_the_tokens_come_in(dtype):
    new = jpeft.prompted({"tokens": np.array([[3]], dtype), "tasks": np.array([200], np.uint8)}, Told(2, 201))
    assert new["tokens"].tolist() == [[jpeft.VIRTUAL + 400, jpeft.VIRTUAL + 401, 3]]


def test_the_halves_of_an_encoder_decoder_batch_are_apart():
    batch = {"tokens": np.array([[1, 2]]), "decoder_tokens": np.array([[3, 4]]), "labels": np.array([[4, 5]])}
    encoder = jpeft.prompted(batch, Told(1))
    assert encoder["tokens"].shape == (1, 3)
    assert encoder["labels"] is batch["labels"] and encoder["decoder_tokens"] is batch["decoder_tokens"]
    decoder = jpeft.prompted(batch, Told(1, position_shift=2), stream="decoder_")
    assert decoder["tokens"] is batch["tokens"]
    assert decoder["labels"].tolist() == [[-100, 4, 5]]
    assert decoder["decoder_positions"].tolist() == [[2, 3, 4]]
    assert "positions" not in decoder


def test_a_method_without_a_prompt_leaves_the_batch():
    assert jpeft.prompted(EXAMPLE, jpeft.LoRA()) == EXAMPLE


@pytest.mark.parametrize(
    ("method", "batch", "options", "message"),
    [
        (
            Told(2),
            {},
            {"max_length": 5},
            r"4 tokens and 1 · 2 virtual ones are 6, the model holds 5; cut the rows to 3",
        ),
        (Told(9), {}, {"max_length": 5}, r"the model holds 5; use fewer virtual tokens"),
        (Told(2, 1, 4), {}, {"max_length": 9}, r"1 · 2 virtual ones and a prefix of 4 are 10"),
        (Told(0, 1, 4), {}, {"max_length": 7}, r"4 tokens and a prefix of 4 are 8"),
        (
            Told(2),
            {"segment_ids": np.array([[1, 2, 3, 3]])},
            {"segments": 2},
            "at most segments=2 sequences in a row, got 3",
        ),
        (Told(2), {}, {"segments": 0}, "expected segments >= 1, got segments=0"),
        (Told(2), {"scores": np.zeros((1, 4))}, {}, r"got \['scores'\] as well"),
        (Told(2), {"tokens": np.zeros(4)}, {}, r"expected tokens of shape \(rows, length\), got \(4,\)"),
        (Told(2), {}, {"at": (1,)}, "a place for each of 2 virtual tokens"),
        (Told(2), {}, {"at": (2, 1)}, "growing"),
        (Told(2), {}, {"at": (-1, 1)}, "from 0 on"),
        (Told(2), {}, {"at": (0.5, 1)}, "whole"),
        (Told(2, 3), {}, {}, r"expected the batch to have tasks \(rows,\), one of 3"),
        (Told(2, 3), {"tasks": np.array([[1]])}, {}, r"tasks of shape \(rows,\) = \(1,\), got \(1, 1\)"),
        (Told(2, 3), {"tasks": np.array([3])}, {}, r"tasks from 0 to 2, got \[3\]"),
        (Told(2), {"tasks": np.array([1])}, {}, r"tasks from 0 to 0, got \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(method, batch, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.prompted(EXAMPLE | batch, method, **options)


def test_under_jit_the_number_of_packed_sequences_must_be_said():
    run = lambda ids: jpeft.prompted({"tokens": ids, "segment_ids": ids}, Told(2))
    with pytest.raises(ValueError, match="expected segments=, the most sequences in a packed row"):
        jax.jit(run)(np.array([[1, 2]]))
