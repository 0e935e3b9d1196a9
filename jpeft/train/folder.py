"""The folder of a run: whether it may be written, and the files in it. Of several processes the first writes them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import yaml

from jpeft.parallel import hosts
from jpeft.train.adapter import write_text
from jpeft.train.config import TrainConfig, differences

__all__ = ["RunFolder"]

_OURS = ("adapter", "checkpoints", "config.yaml", "metrics.jsonl", "loss.png", "samples.md", "summary.json")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder, checked.

    Attributes:
        resuming: whether an unfinished run with the same settings is in it, with a checkpoint to go on from.
        data_shards: of that run.
    """

    path: Path
    resuming: bool
    data_shards: int | None = None

    @classmethod
    def plan(cls, config: TrainConfig) -> RunFolder:
        """Decide, writing nothing, whether the run starts anew or goes on.

        Raises:
            ValueError: a folder that holds something, unless it is to be replaced or is this run, unfinished.
        """
        path = Path(config.out)
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out must be a folder, but {path} is a file")
        if not path.exists() or not any(path.iterdir()) or config.overwrite:
            if config.resume:
                raise ValueError(f"--resume expects a run in {path}, but there is none; leave it out to start one")
            return cls(path, resuming=False)
        if not (path / "config.yaml").is_file():
            raise ValueError(
                f"{path} is not empty and holds no run to go on with; give another --out, or --overwrite to "
                f"replace {', '.join(_OURS)} in it"
            )
        saved = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        now = config.to_dict()
        if config.data_shards is None:
            now["data_shards"] = saved.get("data_shards")
        changed = differences(saved, now)
        if changed:
            raise ValueError(
                f"{path} holds a run with other settings; give those again to go on with it, or another --out, or "
                "--overwrite\n  " + "\n  ".join(changed)
            )
        if (path / "summary.json").is_file():
            raise ValueError(
                f"{path} holds this run, and it is finished; give another --out, or --overwrite to run it again"
            )
        checkpoints = path / "checkpoints"
        begun = checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())
        if config.resume and not begun:
            raise ValueError(f"--resume expects a checkpoint in {path}, but there is none; leave it out to start anew")
        return cls(path, begun, saved.get("data_shards"))

    def settled(self, config: TrainConfig) -> TrainConfig:
        """The settings with what depends on the processes filled in: `data_shards`, as this run has it, and `mesh`."""
        shards = config.data_shards or self.data_shards or math.gcd(jax.process_count(), config.batch_size)
        mesh = config.mesh or (f"fsdp={jax.device_count()}" if jax.process_count() > 1 else None)
        return dataclasses.replace(config, data_shards=shards, mesh=mesh)

    def begin(self, config: TrainConfig) -> None:
        """Make the folder ready: an earlier run's files are removed when replacing, anything else stays.

        All processes must call it.

        Raises:
            ValueError: where the folder that the first process made is not there for this one.
        """
        hosts.meet("everyone has looked into the run's folder")
        if hosts.is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resuming:
                for name in _OURS:
                    old = self.path / name
                    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
                write_text(self.path / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        hosts.meet("the run's folder is ready")
        apart = [k for k, there in enumerate(hosts.everywhere((self.path / "config.yaml").is_file())) if not there]
        if apart:
            raise ValueError(
                f"--out must be a folder that all processes share, but what process 0 wrote in {self.path} is not "
                f"there for process {', '.join(map(str, apart))}; give one on a network file system or a mounted bucket"
            )

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if not hosts.is_first():
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Drop the lines after a step: a resumed run writes them again, the same."""
        if not hosts.is_first():
            return
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(kept))

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        if hosts.is_first():
            write_text(self.path / name, text)
