"""Files as they should be: safetensors headers that tell damage, JSON, folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

__all__ = ["Stored", "header", "raise_together", "renamed_when_complete", "read_json", "write_json", "write_tensors"]


@dataclass(frozen=True)
class Stored:
    """What a safetensors header says of a tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def header(file: Path) -> dict[str, Stored]:
    """A safetensors file is 8 bytes (the header's length), the header in JSON, the tensors' bytes."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > actual:
            raise ValueError(f"{file} is truncated: expected {start} bytes or more, got {actual}; download it again")
        try:
            entries = json.loads(stream.read(start - 8))
        except ValueError:
            raise ValueError(
                f"expected a safetensors header in {file}, got something else; download it again"
            ) from None
    entries.pop("__metadata__", None)
    expected = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if expected != actual:
        what = "truncated" if actual < expected else "damaged"
        raise ValueError(f"{file} is {what}: expected {expected} bytes, got {actual}; download it again")
    return {name: Stored(file, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}


def raise_together(what: str, groups: dict[str, list[str]], most: int = 8) -> None:
    """One error for all differences, each group cut to `most` lines."""
    lines = [what + ":"]
    for title, found in groups.items():
        if found:
            lines += [f"  {len(found)} {title}:", *(f"    {line}" for line in found[:most])]
            lines += [f"    ... and {len(found) - most} more"] if len(found) > most else []
    if len(lines) > 1:
        raise ValueError("\n".join(lines))


@contextmanager
def renamed_when_complete(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end, and is removed where anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        complete = temporary / "new"
        complete.mkdir()  # with ordinary permissions, which mkdtemp does not give
        yield complete
        if overwrite and path.exists():
            os.rename(path, temporary / "old")
        os.rename(complete, path)
    finally:
        if (temporary / "old").exists() and not path.exists():
            os.rename(temporary / "old", path)
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file that torch reads, as readable as other files: safetensors makes them their owner's only."""
    file.touch()
    ordinary = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(ordinary)


def read_json(path: Path) -> dict:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}: {error}") from None


def write_json(path: Path, content: dict) -> None:
    """Indented, in alphabetical order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
