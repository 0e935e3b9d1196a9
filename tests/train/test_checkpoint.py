"""Checkpoints: written beside the run, whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.train.checkpoint import Checkpoints
from jpeft.train.step import State


def state_at(step, size=2**24):
    return State(jnp.asarray(step, jnp.int32), {"a": jnp.full(size, float(step))}, {})


def test_saving_returns_before_the_checkpoint_is_written_and_what_comes_after_does_not_change_it(tmp_path):
    state = state_at(1)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {"at": 1}, {"seed": 0}, {"shapes": {}})
        written = (tmp_path / "c/1").is_dir()
        change(state)
        assert checkpoints.latest() == 1
    assert not written and (tmp_path / "c/1").is_dir(), "64 MiB are not on the disk at once"
    with Checkpoints(tmp_path / "c") as checkpoints:
        found, position = checkpoints.restore(state_at(0), {"seed": 0}, {"shapes": {}})
    assert position == {"at": 1} and int(found.step) == 1
    np.testing.assert_array_equal(found.trainable["a"], np.float32(1))


def test_the_newest_two_are_kept_and_the_same_step_is_written_once(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2, 2, 3):
            checkpoints.save(state_at(step, 8), step, {}, {"shapes": {}})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]


def test_what_a_kill_left_half_written_is_not_read(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state_at(1, 8), 1, {}, {"shapes": {}})
    half = tmp_path / "c/2.orbax-checkpoint-tmp-0/state"
    half.mkdir(parents=True)
    (half / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 1
        assert int(checkpoints.restore(state_at(0, 8), {}, {"shapes": {}})[0].step) == 1
