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

    A name is a class's, a published one (`qlora`), the beginning of just one of these, or several joined by `+`, for
    methods one after the other. A field goes to the last of them that has it, `Class.field` to that one.

    Raises:
        UserError: an unknown method; a field that it does not have; a value of another type.
    """
    import jpeft

    parts = [(kind, dict(preset)) for name in options.method.split("+") for kind, preset in _named(name.strip())]
    given: dict[tuple[int, str], Any] = {}

    def give(name: str, value: Any, text: bool = False) -> None:
        owner, dot, field = name.rpartition(".")
        which = [k for k, (kind, _) in enumerate(parts) if not dot or kind.__name__.lower() == owner.lower()]
        having = [k for k in which if field in _fields(parts[k][0])]
        if not having:
            raise UserError(_no_field(name, [kind for kind, _ in parts]))
        k = having[-1]
        if (k, field) in given:
            raise UserError(f"{field} is given twice; give it once")
        kind = parts[k][0]
        given[k, field] = _checked(field, value, _fields(kind)[field], kind) if text else value

    for name in _COMMON:
        value = getattr(options, name)
        if value is not None:
            give(name, value[0] if name == "targets" and len(value) == 1 else value)
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set expects name=value, got {pair!r}")
        give(name.strip().replace("-", "_"), value, text=True)
    own = lambda k: {field: value for (at, field), value in given.items() if at == k}
    return jpeft.chain(*(kind(**{**preset, **own(k)}) for k, (kind, preset) in enumerate(parts)))


def _named(name: str) -> list[tuple[type, dict[str, Any]]]:
    """The classes, each with its fields set, that a name stands for."""
    import jpeft
    from jpeft.methods._recipes import RECIPES
    from jpeft.quant import quantizers

    kinds = {**jpeft.methods(), **quantizers()}
    known: dict[str, Any] = {_folded(n): [(kind, {})] for n, kind in kinds.items()}
    known |= {_folded(n): [(kinds[k], preset) for k, preset in parts] for n, parts in RECIPES.items()}
    begun = [n for n in known if n.startswith(_folded(name))]
    if _folded(name) in known:
        return known[_folded(name)]
    if len(begun) == 1:
        return known[begun[0]]
    names = [*kinds, *RECIPES]
    near = f"; did you mean {' or '.join(begun[:3])}?" if name and begun else _nearest(_folded(name), known)
    raise UserError(f"there is no method {name!r}{near}\nthe methods are: {', '.join(names)}")


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(kind) if f.init}


def _no_field(name: str, kinds: list[type]) -> str:
    if len(kinds) == 1:
        known = list(_fields(kinds[0]))
        return f"{kinds[0].__name__} has no field {name!r}{_nearest(name, known)}\nits fields are: {', '.join(known)}"
    known = [f"{kind.__name__}.{field}" for kind in kinds for field in _fields(kind)]
    near = _nearest(name, [*known, *(k.partition(".")[2] for k in known)])
    return f"none of the methods has a field {name!r}{near}\ntheir fields are: {', '.join(known)}"


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
