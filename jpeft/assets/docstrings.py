"""The text that every Python installation carries: the standard library's documentation, read from its source files.

Nothing is imported or executed: the files are parsed, so the result depends on the Python version alone. What a
definition belongs to, training or validation, follows from the name of its top-level module, for the pretraining text
(`documents`) and for the fine-tuning task (`summaries`) alike: no module is ever on both sides.
"""

import ast
import functools
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]

# Tests, demonstrations and vendored or generated trees: present in some installations only, or not documentation.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "lib-dynload"}
# One top-level module in nine validates; this bucket mixes many modules evenly (threading, typing, wsgiref, operator).
_BUCKETS, _VALIDATION_BUCKET = 9, 5


class Definition(NamedTuple):
    """A documented module, class or function."""

    module: str  # dotted: "email.utils"
    name: str  # within the module: "Charset.get_body_encoding", "" for the module itself
    arguments: str | None  # "text, width=70, **kwargs" without self and cls; None unless a function
    text: str  # the docstring, dedented


def split_of(module: str) -> Split:
    """The side that a module is on, by a hash of its top-level name.

    A module and its pure-Python twin (`io` and `_pyio`) share their text and so their side, as do a package's parts.

    >>> split_of("email.utils") == split_of("email.mime.text"), split_of("_pydatetime") == split_of("datetime")
    (True, True)
    """
    top = module.split(".")[0].removeprefix("_py").removeprefix("_")
    return "validation" if zlib.crc32(top.encode()) % _BUCKETS == _VALIDATION_BUCKET else "train"


def documents(split: Split, stdlib: pathlib.Path | None = None) -> list[str]:
    """One text per documented module of the split: its definitions in the order of the source, and their docstrings."""
    stdlib = _resolve(split, stdlib)
    modules: dict[str, list[str]] = {}
    for definition in _definitions(stdlib):
        modules.setdefault(definition.module, []).append(_paragraph(definition))
    texts = {module: "\n\n".join(paragraphs) for module, paragraphs in modules.items()}
    texts |= {f"pydoc_data.topics.{topic}": text for topic, text in _topics(stdlib)}
    return [text for module, text in texts.items() if split_of(module) == split]


def summaries(split: Split, stdlib: pathlib.Path | None = None) -> list[dict[str, str]]:
    """The task: from a function's qualified signature to the first sentence of its docstring, as prompt and completion.

    >>> example = summaries("train")[0]
    >>> sorted(example), example["prompt"].startswith("Signature: "), example["completion"].endswith(".")
    (['completion', 'prompt'], True, True)

    A completion is kept once, and the validation split holds none that the training split has.
    """
    stdlib = _resolve(split, stdlib)
    examples: dict[Split, dict[str, str]] = {"train": {}, "validation": {}}  # completion -> prompt
    for definition in _definitions(stdlib):
        if definition.arguments is None or (completion := _summary(definition)) is None:
            continue
        signature = f"{definition.module}.{definition.name}({definition.arguments})"
        if len(signature) <= 160:
            examples[split_of(definition.module)].setdefault(completion, f"Signature: {signature}\nSummary:\n")
    chosen, seen = examples[split], examples["train"] if split == "validation" else {}
    return [{"prompt": prompt, "completion": text} for text, prompt in chosen.items() if text not in seen]


def _resolve(split: str, stdlib: pathlib.Path | None) -> pathlib.Path:
    if split not in ("train", "validation"):
        raise ValueError(f'expected split="train" or split="validation", got {split=}')
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"] if stdlib is None else stdlib)
    if next(_source_files(stdlib), None) is None:
        raise FileNotFoundError(
            f"expected the standard library's source files (*.py) under {stdlib}, found none; the embedded task is "
            "read from them: use a Python installation with sources, or give your own data with --data FILE.jsonl"
        )
    return stdlib


def _source_files(stdlib: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """The importable modules under a standard library folder, as dotted name and file, sorted by name."""
    files = []
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and not _SKIPPED.intersection(parts):
            files.append((".".join(parts).removesuffix(".__init__"), path))
    yield from sorted(files)


@functools.cache
def _definitions(stdlib: pathlib.Path) -> tuple[Definition, ...]:
    """Every documented definition, sorted by module, in the order of its source."""
    return tuple(
        definition
        for module, path in _source_files(stdlib)
        if not module.startswith(("_sysconfigdata", "pydoc_data"))
        for definition in _walk(module, "", ast.parse(path.read_bytes()))
    )


def _walk(module: str, name: str, node: ast.AST) -> Iterator[Definition]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield Definition(module, name, _arguments(node), text.strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(module, f"{name}.{child.name}".lstrip("."), child)
        elif isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _walk(module, name, child)


def _arguments(node: ast.AST) -> str | None:
    """The argument list as source without annotations, which few modules have, and without self and cls."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    every = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    return re.sub(r"^(self|cls|mcls|mcs|metacls)(, (/, )?|$)", "", ast.unparse(node.args))


def _paragraph(definition: Definition) -> str:
    """A definition as it stands in the pretraining text."""
    if not definition.name:
        return f"module {definition.module}\n\n{definition.text}"
    name = definition.name.split(".")[-1]
    line = f"class {name}:" if definition.arguments is None else f"def {name}({definition.arguments}):"
    return line + "\n    " + definition.text.replace("\n", "\n    ").replace("\n    \n", "\n\n")


def _topics(stdlib: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The chapters of the language reference that `help()` shows, as topic and text."""
    path = stdlib / "pydoc_data" / "topics.py"
    for node in ast.parse(path.read_bytes()).body if path.exists() else ():
        if isinstance(node, ast.Assign):
            yield from sorted(ast.literal_eval(node.value).items())


def _summary(definition: Definition) -> str | None:
    """The first sentence, on one line and closed by a full stop; None where it is not a short sentence of words."""
    paragraph = " ".join(re.split(r"\n\s*\n", definition.text)[0].split())
    sentence = re.split(r"(?<=[a-z)'`\"][.!?]) (?=[A-Z])", paragraph)[0]
    sentence = sentence if sentence.endswith((".", "!", "?")) else sentence + "."
    words = re.fullmatch(r"[A-Z][a-z]*[ ,'][ -~]{10,90}", sentence) and sentence.count(" ") >= 2
    return sentence if words and not re.search(r":\.$|>>>|->|=>|[|{}\\@]", sentence) else None
