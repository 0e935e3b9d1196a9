"""Text to token ids and back: a model folder's own tokenizer, its special tokens and its chat template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jpeft.core.prompts import VIRTUAL
from jpeft.train.records import Record
from jpeft.train.template import DEFAULT_TEMPLATE, ChatTemplate

__all__ = ["Text", "Example", "encode_record", "encode_records", "with_prompt"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids `(length,)`, which of them are learned `(length,)`, the task; `truncated` counts the ids cut off."""

    ids: np.ndarray
    learned: np.ndarray
    truncated: int = 0
    task: int = 0


class Text:
    """The tokenizer of a model folder (`tokenizer.json`, `tokenizer_config.json`, `config.json`).

    Attributes:
        eos: the id that ends a completion.
        stops: every id that ends a generation.
        chat: the folder's chat template, or the plain default one.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"expected a tokenizer at {path}; with transformers, "
                "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes one"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        settings = _json(folder / "tokenizer_config.json")
        names = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        stops = [
            i
            for name in ("generation_config.json", "config.json")
            for i in _as_list(_json(folder / name).get("eos_token_id"))
        ]
        eos = self.tokenizer.token_to_id(names["eos_token"]) if names["eos_token"] else None
        if eos is None and not stops:
            raise ValueError(f"{folder} names no end-of-text token; set eos_token in tokenizer_config.json")
        self.eos = stops[0] if eos is None else eos
        self.stops = tuple(sorted({self.eos, *stops}))
        names["eos_token"] = names["eos_token"] or self.tokenizer.id_to_token(self.eos) or ""
        self.special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special |= set(self.stops)
        self.chat = ChatTemplate(_chat_template(folder, settings), names)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt, with the tokens that the tokenizer puts in front and without an end-of-text token."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=True).ids
        while ids and ids[-1] in self.stops and not prompt.endswith(self.tokenizer.id_to_token(ids[-1]) or ""):
            ids = ids[:-1]
        return ids

    def decode(self, ids) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def encode_record(text: Text, record: Record, length: int) -> Example:
    """A record as ids, of at most `length + 1` (a row of `length` inputs predicts one id more).

    Raises:
        ValueError: where the prompt leaves no room for a completion, with the record's file and line.
    """
    try:
        ids, learned = _chat(text, record) if record.messages else _completion(text, record)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    first = int(np.argmax(learned))
    if first > length:
        raise ValueError(
            f"{record.where}: the prompt has {first} tokens, which leaves no room in a context of {length}; shorten "
            "it, or raise --sequence-length as far as the model's context goes"
        )
    cut = max(0, len(ids) - length - 1)
    kept = np.asarray(ids[: length + 1], np.int32), np.asarray(learned[: length + 1], bool)
    return Example(*kept, cut, record.task)


def encode_records(text: Text, records: Sequence[Record], length: int) -> list[Example]:
    """All records as ids; the records that do not fit are reported together."""
    examples, wrong = [], []
    for record in records:
        try:
            examples.append(encode_record(text, record, length))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong[:8]) + (f"\n... and {len(wrong) - 8} more" if len(wrong) > 8 else ""))
    return examples


def with_prompt(example: Example, method) -> Example:
    """The example with the method's virtual tokens in front, if it has any.

    Raises:
        ValueError: a task that the method does not have.
    """
    if not method.prompt_length:
        return example
    if not example.task < method.num_prompts:
        raise ValueError(
            f"a record has task {example.task}; expected 0 to {method.num_prompts - 1}: the method has "
            f"{method.num_prompts} prompts"
        )
    first = VIRTUAL + example.task * method.prompt_length
    virtual = np.arange(first, first + method.prompt_length, dtype=example.ids.dtype)
    return dataclasses.replace(
        example,
        ids=np.concatenate([virtual, example.ids]),
        learned=np.concatenate([np.zeros(method.prompt_length, bool), example.learned]),
    )


def _completion(text: Text, record: Record) -> tuple[list[int], list[bool]]:
    # Tokenizers that mark word starts encode a lone completion differently from one that follows text, so the two
    # are encoded together wherever that leaves the prompt's own ids, which generation will see, as they are.
    prompt = text.encode_prompt(record.prompt)
    both = text.encode_prompt(record.prompt + record.completion)
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        completion = both[len(prompt) :]
    else:
        completion = text.tokenizer.encode(record.completion, add_special_tokens=False).ids
    if not prompt:
        prompt, completion = completion[:1], completion[1:]  # the first id has nothing to be predicted from
    ids = [*prompt, *completion, text.eos]
    return ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def _chat(text: Text, record: Record) -> tuple[list[int], list[bool]]:
    whole, spans = text.chat.render_with_spans(record.messages or ())
    if not spans:
        raise ValueError("the chat template renders no text of the assistant")
    encoded = text.tokenizer.encode(whole, add_special_tokens=False)
    ids = list(encoded.ids)
    learned = [any(a < end and start < b for a, b in spans) for start, end in encoded.offsets]
    for i in range(1, len(ids)):  # an end-of-turn token that the template wrote outside its generation block
        if learned[i - 1] and not learned[i] and ids[i - 1] not in text.special and ids[i] in text.special:
            learned[i] = True
    if learned[-1] and ids[-1] not in text.special and not any(i in text.special for i in ids[-3:]):
        ids, learned = [*ids, text.eos], [*learned, True]
    learned[0] = False
    return ids, learned


def _chat_template(folder: Path, settings: dict) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
        if template is None:
            raise ValueError(f"{folder}: expected a chat template named 'default', got {sorted(named)}")
    return template or DEFAULT_TEMPLATE


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _token_text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
