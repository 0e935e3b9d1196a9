"""Chat templates: messages to text, and the exact spans of the text that the assistant wrote."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

__all__ = ["DEFAULT_TEMPLATE", "ChatTemplate"]

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
"""For a model that brings none: a `### role` line, then the content; the assistant's ends in the EOS token."""

_OPEN, _CLOSE = "\U0010f0f0", "\U0010f0f1"  # private-use characters, refused in the messages

_FIX = (
    "put {% generation %} and {% endgeneration %} around the assistant's text and its end-of-turn token in the "
    "chat template"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}body{% endgeneration %}`: the body between two marks that never occur in text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return _OPEN + caller() + _CLOSE


class ChatTemplate:
    """A compiled Jinja chat template, run in a sandbox.

    Args:
        source: the template; it sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and `tools`.
        tokens: the special tokens' texts by name.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The messages as the model reads them."""
        return self._render(messages, add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def render_with_spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """`(text, [(start, end), ...])`: the spans are what the assistant wrote, its end-of-turn token included.

        The spans come from the template's generation blocks. Without any, the text is rendered up to and including
        each assistant message, and each rendering must be a prefix of the whole.

        Raises:
            ValueError: where the spans cannot be found for certain.
        """
        marked = self._render(messages, False)
        if _OPEN not in marked:
            return self._spans_from_prefixes(messages, marked)
        text, spans = "", []
        for piece in marked.split(_OPEN):
            inside, closed, after = piece.partition(_CLOSE)
            if closed:
                spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, [span for span in spans if span[0] < span[1]]

    def _spans_from_prefixes(self, messages, whole: str):
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True)
            upto = self._render(messages[: i + 1], False)
            if not (whole.startswith(upto) and upto.startswith(before) and len(before) < len(upto)):
                raise ValueError(
                    f"cannot tell which text of message {i} the assistant wrote: the chat template has no generation "
                    f"block and renders a conversation differently from its beginning; {_FIX}"
                )
            spans.append((len(before), len(upto)))
        return whole, spans

    def _render(self, messages, add_generation_prompt: bool) -> str:
        if any(mark in str(m["content"]) for m in messages for mark in (_OPEN, _CLOSE)):
            raise ValueError("a message holds U+10F0F0 or U+10F0F1, which jpeft marks the assistant's text with")
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, **self._tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def _raise(message: str):
    raise jinja2.TemplateError(message)
