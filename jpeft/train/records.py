"""Reading training records: one JSON object a line, every bad line reported with its file and number."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Record", "read_jsonl", "from_dicts", "split"]

_SHOWN = 8
_ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Record:
    """One example: a prompt with its completion, or the messages of a chat; `task` chooses among several prompts.

    `where` says `file:line`.
    """

    where: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Mapping[str, Any], ...] | None = None
    task: int = 0


def read_jsonl(path: str | Path) -> list[Record]:
    """The records of a JSONL file; blank lines are skipped.

    Raises:
        ValueError: listing the bad lines by file and line number, or saying that the file holds no record.
        FileNotFoundError: naming the files of the same folder that are nearest.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3)
        hint = f"; did you mean {' or '.join(str(folder / n) for n in near)}?" if near else ""
        raise FileNotFoundError(f"expected a JSONL file, but there is no file {path}{hint}")
    records, wrong = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            records.append(_record(json.loads(line), where))
        except UnicodeDecodeError as error:
            wrong.append(f"{where}: expected UTF-8 text, got {error.reason} at byte {error.start}")
        except json.JSONDecodeError as error:
            wrong.append(f"{where}: expected a JSON object, got {_short(line)} ({error.msg} at column {error.colno})")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise _bad_lines(wrong)
    if not records:
        raise ValueError(f'{path} holds no record; write one {{"prompt": ..., "completion": ...}} object a line')
    return records


def from_dicts(rows: Iterable[Mapping[str, Any]], name: str) -> list[Record]:
    """Records from dictionaries that are in memory, `name` standing for the file in errors."""
    return [_record(row, f"{name}:{number}") for number, row in enumerate(rows, start=1)]


def split(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """`(training, held out)`: at least one record in each, chosen by the seed, each part in the file's order."""
    if len(records) < 2:
        raise ValueError(
            f"expected at least 2 records to hold one out, got {len(records)} ({records[0].where}); add records or "
            "give --validation FILE.jsonl"
        )
    count = min(max(1, round(fraction * len(records))), len(records) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    return (
        [r for i, r in enumerate(records) if i not in held_out],
        [r for i, r in enumerate(records) if i in held_out],
    )


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a JSON object, got {_short(json.dumps(row).encode())}")
    task = row.get("task", 0)
    if not isinstance(task, int) or isinstance(task, bool) or task < 0:
        raise ValueError(f"expected 'task' to be a whole number from 0 on, got {task!r}")
    if "messages" in row:
        return Record(where, messages=_messages(row["messages"]), task=task)
    missing = [name for name in ("prompt", "completion") if name not in row]
    if missing:
        near = [
            f"{got!r} looks like {name!r}"
            for name in (*missing, "messages")
            for got in difflib.get_close_matches(name, [str(k) for k in row], n=1, cutoff=0.7)
        ]
        hint = f"; {', '.join(near)}" if near else ""
        raise ValueError(f"expected the fields 'prompt' and 'completion', or 'messages', got {sorted(row)}{hint}")
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            raise ValueError(f"expected {name!r} to be a string, got {type(row[name]).__name__}")
    if not row["completion"]:
        raise ValueError("expected a completion to learn, got an empty string")
    return Record(where, prompt=row["prompt"], completion=row["completion"], task=task)


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected 'messages' to be a list of {'role', 'content'} objects")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"expected message {i} to be an object with 'role' and 'content', got {message!r}")
        if message["role"] not in _ROLES:
            near = difflib.get_close_matches(str(message["role"]), _ROLES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected the role of message {i} to be one of {_ROLES}, got {message['role']!r}{hint}")
        if not isinstance(message["content"], str):
            raise ValueError(f"expected the content of message {i} to be a string, got {message['content']!r}")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("expected an assistant message to learn, got roles " + str([m["role"] for m in messages]))
    return tuple(messages)


def _bad_lines(wrong: list[str]) -> ValueError:
    more = f"\n... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return ValueError("\n".join(wrong[:_SHOWN]) + more)


def _short(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 40 else text[:37] + "...")
