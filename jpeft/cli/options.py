"""From command line and YAML file to dataclasses, and from names to methods; every mistake with the nearest names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

__all__ = ["UserError", "user_errors", "parse", "build_method", "MethodOptions"]

T = TypeVar("T")
_COMMON = ("rank", "alpha", "targets", "dropout")


class UserError(Exception):
    """A mistake that the user can mend; its text is the whole screen."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn this package's own ValueError and OSError into a UserError; those of other packages are bugs and pass."""
    from jpeft.core.lift import DensifyError

    try:
        yield
    except (ValueError, OSError, DensifyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        package = str(Path(__file__).parent.parent)
        if isinstance(error, ValueError) and not frames[-1].filename.startswith(package):
            raise
        raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """A method by name and fields, as `TrainConfig` has them too."""

    method: str
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float | None = None
    set: tuple[str, ...] = ()


def parse(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """The dataclass that the arguments describe; `--config FILE.yaml` supplies what the arguments do not say.

    Raises:
        UserError: a file that is no mapping of the dataclass's fields. Wrong options exit with code 2 by themselves.
    """
    arguments = list(arguments)
    before: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "")
            before = _from_yaml(Path(value), kind)
            del arguments[i : i + (1 if "=" in argument else 2)]
            break
    return tyro.cli(kind, prog=f"jpeft {command}", args=_joined([*before, *arguments]), use_underscores=False)


def build_method(options: Any) -> Any:
    """The method that `options` (with the fields of `MethodOptions`) names, with the fields given and no other.

    Raises:
        UserError: an unknown method; a field that it does not have; a value of another type.
    """
    import jpeft

    kinds = {name.lower(): kind for name, kind in jpeft.methods().items()}
    kind = kinds.get(options.method.lower())
    if kind is None:
        names = [k.__name__ for k in kinds.values()]
        raise UserError(
            f"there is no method {options.method!r}{_nearest(options.method.lower(), kinds)}\n"
            f"the methods are: {', '.join(names)}"
        )
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    given = {name: getattr(options, name) for name in _COMMON if getattr(options, name) is not None}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--set expects name=value, got {pair!r}")
        if name in given:
            raise UserError(f"{name} is given twice; give it once")
        given[name] = _checked(name, value, fields.get(name), kind)
    unknown = [name for name in given if name not in fields]
    if unknown:
        lines = [f"{kind.__name__} has no field {name!r}{_nearest(name, fields)}" for name in unknown]
        raise UserError("\n".join(lines) + f"\nits fields are: {', '.join(fields)}")
    if "targets" in given and len(given["targets"]) == 1:
        given["targets"] = given["targets"][0]
    return kind(**given)


def _checked(name: str, text: str, field: dataclasses.Field | None, kind: type) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {name}={text}: the value is not YAML: {error}") from None
    if field is None:
        return value
    default = field.default
    if isinstance(value, str) and isinstance(default, float):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            value = float(value)
    numbers = (int, float)
    fits = (
        default is dataclasses.MISSING
        or default is None
        or value is None
        or isinstance(value, type(default))
        or isinstance(default, float)
        and isinstance(value, numbers)
        and not isinstance(value, bool)
        or isinstance(default, tuple)
        and isinstance(value, list | dict | str)
        or isinstance(default, str)
        and isinstance(value, list)
    )
    if not fits or isinstance(default, numbers) and isinstance(value, bool) != isinstance(default, bool):
        raise UserError(f"{kind.__name__}.{name} expects a {type(default).__name__} such as {default!r}, got {value!r}")
    return value


def _from_yaml(path: Path, kind: type) -> list[str]:
    if not path.is_file():
        raise UserError(f"--config expects a YAML file, but there is no file {str(path)!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a mapping of option names to values, got a {type(content).__name__}")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [f"{path}: there is no option {name!r}{_nearest(name, fields)}" for name in content if name not in fields]
    if unknown:
        raise UserError("\n".join(unknown))
    return [word for name, value in content.items() for word in _words(name.replace("_", "-"), value)]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, Mapping):
        flow = lambda item: yaml.safe_dump(item, default_flow_style=True).splitlines()[0]
        value = [f"{key}={flow(item)}" for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    return [] if value is None else [f"--{name}", str(value)]


def _joined(arguments: list[str]) -> list[str]:
    """Arguments with all `--set` values behind one `--set`, which is then free to be repeated."""
    rest: list[str] = []
    values: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            inside = name == "--set" and not equals
            if name == "--set":
                values += [value] if equals else []
                continue
        (values if inside else rest).append(argument)
    return rest + (["--set", *values] if values else [])


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
