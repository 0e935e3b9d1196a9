"""The folder of a run: whether it may be written, and the files in it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from jpeft.train.adapter import write_text
from jpeft.train.config import TrainConfig, differences

__all__ = ["RunFolder"]

_OURS = ("adapter", "checkpoints", "config.yaml", "metrics.jsonl", "loss.png", "samples.md", "summary.json")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder, checked. `resuming` says that an unfinished run with the same settings is in it."""

    path: Path
    resuming: bool

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
        checkpoints = path / "checkpoints"
        begun = checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())
        if not begun or not (path / "config.yaml").is_file():
            raise ValueError(
                f"{path} is not empty and holds no checkpoint to go on from; give another --out, or --overwrite to "
                f"replace {', '.join(_OURS)} in it"
            )
        changed = differences(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")), config.to_dict())
        if changed:
            raise ValueError(
                f"{path} holds a run with other settings; give those again to go on with it, or another --out, or "
                "--overwrite\n  " + "\n  ".join(changed)
            )
        if (path / "summary.json").is_file():
            raise ValueError(
                f"{path} holds this run, and it is finished; give another --out, or --overwrite to run it again"
            )
        return cls(path, resuming=True)

    def begin(self, config: TrainConfig) -> None:
        """Make the folder ready: an earlier run's files are removed when replacing, anything else stays."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.resuming:
            return
        for name in _OURS:
            old = self.path / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Drop the lines after a step: a resumed run writes them again, the same."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(kept))

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        write_text(self.path / name, text)
