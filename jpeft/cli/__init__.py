"""The `jpeft` command: `jpeft train`, `generate`, `merge`, `export`, `inspect`, `plan`, each imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = {
    "train": "fine-tune a model; with no options, a small embedded model on an embedded task",
    "generate": "complete a prompt, with or without an adapter",
    "merge": "write a model folder with the adapter merged into the weights",
    "export": "write an adapter as HF PEFT does, for programs that read its folders",
    "plan": "say what a training step takes on a TPU slice, without weights and without the TPU",
    "inspect": "show where a model can be adapted, what a method matches and how much would train",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What the user can mend is one screen on stderr and exit code 2; a bug keeps its traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        import jpeft

        print(jpeft.__version__)
        return
    name = arguments[0]
    if name not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, _COMMANDS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        _fail(f"expected one of the commands {', '.join(_COMMANDS)}, got {name!r}{hint}")
    from jpeft.cli.options import UserError, user_errors

    try:
        with user_errors():
            _command(name)(arguments[1:])
    except UserError as error:
        _fail(str(error))


def _command(name: str):
    import importlib

    return importlib.import_module(f"jpeft.cli.{name}").run


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in _COMMANDS.items()]
    lines = ["usage: jpeft COMMAND [OPTIONS]", "", *lines, "", "jpeft COMMAND --help lists a command's options."]
    return "\n".join(lines)


def _fail(message: str) -> None:
    print(f"jpeft: {message}", file=sys.stderr)
    sys.exit(2)
