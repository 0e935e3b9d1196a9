import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

import jpeft
from jpeft import models
from jpeft.parallel import layout
from jpeft.train import loop
from jpeft.train.adapter import flatten
from jpeft.train.config import TrainConfig, differences
from jpeft.train.data import deal
from jpeft.train.folder import RunFolder
from jpeft.train.loop import fit, total_steps
from jpeft.train.tokens import Example

METHOD = jpeft.LoRA(rank=2, targets=["q_proj", "down_proj"], dropout=0.1)
LENGTH = 8


@pytest.fixture(scope="module")
def model():
    apply, params = models.init(jax.random.key(0), CONFIG)
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), params)
    return apply, params, jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))


def examples(count, seed=0):
    random = np.random.default_rng(seed)
    sizes = random.integers(3, LENGTH + 2, count)
    return [Example(np.repeat(np.int32(n), n), np.arange(n) >= 1) for n in sizes]


def config(out, **changes):
    settings = {"max_steps": 6, "batch_size": 2, "save_every": 2, "learning_rate": 1e-2, "out": str(out)}
    return TrainConfig(**settings | changes)


def run(model, config, training=None):
    return fit(*model, METHOD, training or examples(20), examples(5, 1), config, LENGTH)


def test_a_run_learns_and_writes_what_it_should(model, tmp_path, capsys):
    result = run(model, config(tmp_path / "a", max_steps=30, evaluate_every=10, learning_rate=0.1))
    assert result.finished and result.steps == 30 and result.heldout_loss_after < result.heldout_loss_before - 0.5
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
    }
    metrics = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 31))
    assert [m["step"] for m in metrics if "heldout_loss" in m] == [0, 10, 20, 30]
    printed = capsys.readouterr().out
    assert "held-out loss before" in printed and "step 10/30" in printed and "tokens/s" in printed


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """`(folder, result)` of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run(model, config(folder))


@pytest.mark.parametrize("at", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(model, whole, tmp_path, monkeypatch, at):
    steps = []
    seen = RunFolder.log

    def log(self, **values):
        seen(self, **values)
        steps.append(values["step"])
        if "loss" in values and values["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "log", log)
    stopped = run(model, config(tmp_path / "parts"))
    assert not stopped.finished and stopped.steps == at
    monkeypatch.undo()
    resumed = run(model, config(tmp_path / "parts", resume=True))
    assert resumed.finished
    for path, array in flatten(whole[1].trainable).items():
        np.testing.assert_array_equal(flatten(resumed.trainable)[path], array)
    for name in ("metrics.jsonl", "adapter/trainable.safetensors"):
        assert (whole[0] / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_with_the_optimizer_in_the_host_it_is_the_same_run_begun_and_resumed(model, whole, tmp_path, monkeypatch):
    seen = RunFolder.log

    def log(self, **values):
        seen(self, **values)
        if "loss" in values and values["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "log", log)
    assert run(model, config(tmp_path / "parts", offload_optimizer=True)).steps == 3
    monkeypatch.undo()
    resumed = run(model, config(tmp_path / "parts", offload_optimizer=True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, resumed.trainable, whole[1].trainable)


def test_a_killed_run_goes_back_to_its_checkpoint(model, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    seen = RunFolder.log

    def log(self, **values):
        seen(self, **values)
        if values["step"] == 5:
            raise Killed

    monkeypatch.setattr(RunFolder, "log", log)
    with pytest.raises(Killed):
        run(model, config(tmp_path / "parts"))
    monkeypatch.undo()
    resumed = run(model, config(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, resumed.trainable, whole[1].trainable)
    assert (whole[0] / "metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_other_settings_data_or_base_are_not_resumed(model, whole):
    out = whole[0]
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 -> 0.02"):
        run(model, config(out, learning_rate=0.02))
    with pytest.raises(ValueError, match="training_checksum"):
        run(model, config(out), examples(20, 7))
    apply, params, sites = model
    other = models.init(jax.random.key(9), CONFIG)[1]
    with pytest.raises(ValueError, match="belongs to another model"):
        run((apply, other, sites), config(out))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(model, tmp_path, monkeypatch):
    real = loop.make_step

    def make_step(*arguments):
        step = real(*arguments)

        def poisoned(state, frozen, batch, key):
            weights = batch["weights"] * (np.nan if int(state.step) == 3 else 1)
            return step(state, frozen, batch | {"weights": weights.astype(np.float32)}, key)

        return poisoned

    monkeypatch.setattr(loop, "make_step", make_step)
    with pytest.raises(ValueError, match="step 4: the loss is nan.*state after step 3"):
        run(model, config(tmp_path / "a"))
    assert (tmp_path / "a/checkpoints/3").is_dir() and (tmp_path / "a/adapter/method.json").is_file()


def test_the_folder_of_a_run_is_protected(tmp_path):
    out = tmp_path / "a"
    assert not RunFolder.plan(config(out)).resuming
    with pytest.raises(ValueError, match="--resume expects a run"):
        RunFolder.plan(config(out, resume=True))
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        RunFolder.plan(config(out))
    (out / "adapter").mkdir()
    RunFolder.plan(config(out, overwrite=True)).begin(config(out, overwrite=True))
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "mine.txt"]
    (out / "checkpoints" / "3").mkdir(parents=True)
    assert RunFolder.plan(config(out)).resuming
    (out / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="it is finished"):
        RunFolder.plan(config(out))
    with pytest.raises(ValueError, match="must be a folder"):
        RunFolder.plan(config(out / "mine.txt"))


def test_steps_are_counted_from_the_epochs():
    made = examples(20)
    rows = -(-sum(len(e.ids) - 1 for e in made) // LENGTH)
    steps = total_steps(TrainConfig(epochs=2, batch_size=2), deal(made), LENGTH)
    assert rows <= steps <= 20
    assert total_steps(TrainConfig(max_steps=3), made, LENGTH) == 3


def test_settings_out_of_range_are_reported_together():
    with pytest.raises(ValueError) as error:
        TrainConfig(
            batch_size=6,
            accumulation=4,
            learning_rate=0.0,
            warmup=1.5,
            max_steps=0,
            seed=-1,
            resume=True,
            overwrite=True,
        ).check()
    assert len(str(error.value).splitlines()) == 7


def test_where_a_run_writes_does_not_matter_to_resuming():
    assert differences(TrainConfig(out="a").to_dict(), TrainConfig(out="b", resume=True).to_dict()) == []


def test_a_run_on_a_mesh_is_the_run_of_one_device_and_goes_on_from_another_mesh(model, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 16)
    method = dataclasses.replace(METHOD, dropout=0.0)
    go = lambda settings: fit(*model, method, examples(40), examples(5, 1), settings, LENGTH)
    alone = go(config(tmp_path / "alone", batch_size=8))
    meshed = go(config(tmp_path / "mesh", batch_size=8, mesh="fsdp=8"))
    assert len(jax.tree.leaves(meshed.trainable)[0].sharding.device_set) == 8
    last = lambda folder: [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(last("alone"), last("mesh"), strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
        assert one.get("heldout_loss", 0) == pytest.approx(other.get("heldout_loss", 0), rel=1e-4)
    shutil.rmtree(tmp_path / "mesh" / "checkpoints" / "6")
    resumed = go(config(tmp_path / "mesh", batch_size=8, mesh="data=2,fsdp=4"))
    assert resumed.heldout_loss_after == pytest.approx(alone.heldout_loss_after, rel=1e-3)
    assert len(jax.tree.leaves(resumed.trainable)[0].sharding.device_set) == 8


def test_a_batch_that_the_mesh_cannot_share_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be split over the 8 devices"):
        run(model, config(tmp_path / "out", mesh="fsdp=8"))
    with pytest.raises(ValueError, match="8 devices, got fsdp=4"):
        run(model, config(tmp_path / "out", mesh="fsdp=4"))
