"""Runs of several real processes on this machine, stopped, killed, and going on: two of four devices each, by gloo."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_llama import tiny  # noqa: F401

STEPS, EVERY = 24, 4
LIMIT = 240  # seconds, far beyond what any of these takes


class Run:
    """The processes of one `jpeft train`, their output in files."""

    def __init__(self, out: Path, *arguments, processes: int = 2, devices: int = 4, outs=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = dict(
            os.environ,
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
            JAX_PLATFORMS="cpu",
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        )
        self.out = out
        self.logs = [out.with_name(f"{out.name}.{time.monotonic_ns()}.{k}") for k in range(processes)]
        self.processes = []
        for k, log in enumerate(self.logs):
            command = [sys.executable, "-m", "jpeft", "train", "--out", str(outs[k] if outs else out), *arguments]
            if processes > 1:
                command += ["--coordinator", address, "--processes", str(processes), "--process-id", str(k)]
            with open(f"{log}.out", "w") as said, open(f"{log}.err", "w") as wrong:
                self.processes.append(subprocess.Popen(command, stdout=said, stderr=wrong, env=environment))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def ended(self) -> list[int]:
        """The exit codes, once all have ended."""
        end = time.monotonic() + LIMIT
        return [process.wait(max(1, end - time.monotonic())) for process in self.processes]

    def reach(self, step: int) -> None:
        """Wait until a step's line is in metrics.jsonl."""
        end = time.monotonic() + LIMIT
        while not any(m["step"] >= step for m in metrics(self.out)):
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.01)

    def said(self, k: int | None = None, kind: str = "*") -> str:
        chosen = self.logs if k is None else [self.logs[k]]
        kinds = ("out", "err") if kind == "*" else (kind,)
        text = "".join(Path(f"{log}.{end}").read_text() for log in chosen for end in kinds)
        return "\n".join(line for line in text.splitlines() if not line.startswith("[Gloo]"))


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def adapter(out: Path) -> bytes:
    return (out / "adapter/trainable.safetensors").read_bytes()


@pytest.fixture(scope="module")
def arguments(tiny, tmp_path_factory):  # noqa: F811
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = f"--max-steps {STEPS} --save-every {EVERY} --samples 1 --sample-tokens 2 --learning-rate 0.01 --rank 2"
    return ["--model", str(tiny), "--data", str(data), *settings.split(), "--sequence-length", "32"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The folder of two processes' run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with Run(out, *arguments) as run:
        assert run.ended() == [0, 0], run.said()
        assert "held-out loss before" in run.said(0, "out") and run.said(1, "out") == ""
    return out


def test_two_processes_train_what_one_trains_with_the_same_shards_of_the_data(whole, arguments, tmp_path):
    with Run(tmp_path / "one", *arguments, "--mesh", "fsdp=8", "--data-shards", "2", processes=1, devices=8) as run:
        assert run.ended() == [0], run.said()
    values = lambda out: [[m.get(name, 0) for name in ("loss", "heldout_loss", "tokens")] for m in metrics(out)]
    np.testing.assert_allclose(values(tmp_path / "one"), values(whole), rtol=1e-5)
    assert (whole / "samples.md").is_file() and (whole / "loss.png").is_file()
    state = {path.name for path in (whole / "checkpoints" / str(STEPS) / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= state, "each process has written its own part"


def test_sigterm_to_one_saves_and_ends_all_and_the_run_goes_on_to_the_same_bits(whole, arguments, tmp_path):
    at, which = random.randint(1, STEPS - 8), random.randrange(2)
    print(f"SIGTERM to process {which} after step {at}")
    with Run(tmp_path / "out", *arguments) as run:
        run.reach(at)
        run.processes[which].send_signal(signal.SIGTERM)
        assert run.ended() == [0, 0], run.said()
        assert "all is saved" in run.said(0, "out")
    stopped = metrics(tmp_path / "out")[-1]["step"]
    assert at <= stopped < STEPS and (tmp_path / f"out/checkpoints/{stopped}").is_dir()
    with Run(tmp_path / "out", *arguments) as run:
        assert run.ended() == [0, 0], run.said()
        assert f"going on from step {stopped}" in run.said(0, "out")
    assert adapter(tmp_path / "out") == adapter(whole)
    assert metrics(tmp_path / "out") == metrics(whole)


def test_sigkill_of_all_loses_no_more_than_the_last_interval(whole, arguments, tmp_path):
    at = random.randint(0, STEPS - 8)
    wait = random.random() / 4
    print(f"SIGKILL {wait:.3f} s after step {at}")
    with Run(tmp_path / "out", *arguments) as run:
        run.reach(at)
        time.sleep(wait)
        for process in run.processes:
            process.kill()
        run.ended()
    reached = metrics(tmp_path / "out")[-1]["step"]
    with Run(tmp_path / "out", *arguments) as run:
        assert run.ended() == [0, 0], run.said()
        found = re.search(r"going on from step (\d+)", run.said(0, "out"))
    # A checkpoint is written beside the steps that follow: the last whole one is at most two intervals back.
    assert (int(found[1]) if found else 0) >= reached - 2 * EVERY
    assert adapter(tmp_path / "out") == adapter(whole)
    assert metrics(tmp_path / "out") == metrics(whole)


def test_the_loss_of_one_ends_the_other_and_one_process_alone_goes_on(whole, arguments, tmp_path):
    with Run(tmp_path / "out", *arguments) as run:
        run.reach(random.randint(EVERY + 1, STEPS - 8))
        which = random.randrange(2)
        run.processes[which].kill()
        begun = time.monotonic()
        assert run.ended()[1 - which] not in (0, -signal.SIGKILL)
        assert time.monotonic() - begun < 90, "HEARTBEAT_SECONDS and as much again as half of it"
        assert re.search("lost another one|another task died|leader task was preempted", run.said(1 - which, "err"))
    with Run(tmp_path / "out", *arguments, "--mesh", "data=2,fsdp=4", processes=1, devices=8) as run:
        assert run.ended() == [0], run.said()
        assert "going on from step" in run.said(0, "out")
    one, other = (load_file(out / "adapter/trainable.safetensors") for out in (tmp_path / "out", whole))
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=1e-4, atol=1e-5)


def test_processes_that_share_no_folder_are_told_so(arguments, tmp_path):
    outs = tmp_path / "a", tmp_path / "b"
    with Run(tmp_path / "run", *arguments, outs=outs) as run:
        assert run.ended() == [2, 2], run.said()
        assert "--out must be a folder that all processes share" in run.said(1, "err")
