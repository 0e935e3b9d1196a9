import numpy as np
import pytest

from jpeft.train.config import TrainConfig
from jpeft.train.data import Batches, deal, fixed_batches, rows_in_an_epoch
from jpeft.train.tokens import Example

LENGTH = 12


def examples(count=40, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        size = int(random.integers(3, LENGTH + 2))
        ids = np.arange(size, dtype=np.int32) + 100 * i
        made.append(Example(ids, np.arange(size) >= size // 2))
    return made


def segments(batch):
    """`{first token: (tokens, targets, weights)}` of every packed example."""
    found = {}
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max(initial=0) + 1):
            inside = batch["segment_ids"][row] == segment
            parts = tuple(batch[name][row][inside] for name in ("tokens", "targets", "weights", "positions"))
            found[int(parts[0][0])] = parts
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_comes_once_whole_and_predicts_its_own_next_token(packing):
    made = examples()
    found = {}
    for batch in fixed_batches(made, LENGTH, 4, packing):
        assert all(x.shape == (4, LENGTH) for x in batch.values())
        assert not batch["weights"][batch["segment_ids"] == 0].any()
        assert packing or batch["segment_ids"].max() <= 1
        found |= segments(batch)
    assert len(found) == len(made)
    for example in made:
        tokens, targets, weights, positions = found[int(example.ids[0])]
        np.testing.assert_array_equal(tokens, example.ids[:-1])
        np.testing.assert_array_equal(targets, np.where(example.learned, example.ids, 0)[1:])
        np.testing.assert_array_equal(weights, example.learned[1:])
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))


def test_packing_fills_fewer_rows():
    made = examples()
    assert rows_in_an_epoch(made, LENGTH, packing=False) == len(made) > rows_in_an_epoch(made, LENGTH)


def test_the_seed_decides_the_order():
    first, same, other = (next(Batches(deal(examples()), LENGTH, 4, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["tokens"], same["tokens"])
    assert not np.array_equal(first["tokens"], other["tokens"])


@pytest.mark.parametrize("taken", [0, 1, 7, 30])
def test_a_restored_position_goes_on_with_the_same_batches(taken):
    iterator = Batches(deal(examples()), LENGTH, 2, seed=3)
    for _ in range(taken):
        next(iterator)
    position = iterator.get_state()
    wanted = [next(iterator) for _ in range(12)]
    resumed = Batches(deal(examples()), LENGTH, 2, seed=3)
    resumed.set_state(position)
    for batch in wanted:
        for name, array in next(resumed).items():
            np.testing.assert_array_equal(array, batch[name])


def test_shards_are_dealt_and_fill_their_own_rows_whoever_reads_them():
    made = examples()
    every = Batches(deal(made, 4), LENGTH, 8, seed=3)
    first, second = (Batches(deal(made, 4, held), LENGTH, 8, seed=3) for held in ({0, 1}, {2, 3}))
    assert every.rows == list(range(8)) and first.rows == [0, 1, 2, 3] and second.rows == [4, 5, 6, 7]
    for _ in range(5):
        batch, parts = next(every), (next(first), next(second))
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    owners = {int(e.ids[0]): k % 4 for k, e in enumerate(made)}
    for row in range(8):
        inside = segments({name: x[row : row + 1] for name, x in batch.items()})
        assert {owners[token] for token in inside} == {row // 2}
    resumed = Batches(deal(made, 4, {1, 2}), LENGTH, 8, seed=3)
    resumed.set_state({**first.get_state(), **second.get_state()})
    batch, middle = next(every), next(resumed)
    np.testing.assert_array_equal(middle["tokens"], batch["tokens"][2:6])


def test_shards_that_cannot_be_filled_are_refused():
    with pytest.raises(ValueError, match="at least one record for each of 3 shards, got 2"):
        deal(examples(2), 3)
    with pytest.raises(ValueError, match="shards that divide a batch of 4 rows, got 3"):
        Batches(deal(examples(), 3), LENGTH, 4, seed=0)
    with pytest.raises(ValueError, match="data_shards must divide batch_size, got 3 and 8"):
        TrainConfig(data_shards=3).check()
