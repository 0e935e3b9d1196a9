"""`adapter_config.json`: PEFT's options to a method's class and fields, and back, as the class's `EXPORT` says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.core.export import Export
from jpeft.core.method import Method
from jpeft.core.targets import first_match
from jpeft.interop.files import raise_together, read_json

__all__ = ["CONFIG", "TENSORS", "choose", "exactly", "listed", "options_of", "read_config", "values_of"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What says where the adapter is from and which modules it has, which its tensors' names say too.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
_ABOUT |= {"task_type", "fan_in_fan_out", "target_modules", "exclude_modules", "modules_to_save"}
_ABOUT |= {"layers_to_transform", "layers_pattern"}


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `adapter_config.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON mapping.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected an adapter folder of HF PEFT, but there is no {path}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"expected a mapping in {path}, got a {type(config).__name__}")
    return config


def choose(config: Mapping[str, Any], methods: Mapping[str, type[Method]]) -> tuple[type[Method], Export]:
    """The class that reads a folder, and its `EXPORT`: the most particular of that `peft_type` and fixed options.

    A class that inherits its `EXPORT` is written with it and read as the class that it is from.

    Raises:
        ValueError: a method, or a variant of one, that there is none for.
    """
    exports = [(kind, export) for kind in methods.values() if (export := vars(kind).get("EXPORT")) is not None]
    name = config.get("peft_type")
    of_type = [(kind, export) for kind, export in exports if name in (export.peft_type, *export.reads)]
    if not of_type:
        known = sorted({name for _, export in exports for name in (export.peft_type, *export.reads)})
        raise ValueError(f"the adapter is of peft_type {name!r}; this jpeft reads {', '.join(known)}")
    fits = lambda e, k, v: _same(config.get(k), v) or config.get(k) in e.neutral.get(k, ())
    different = lambda e: {k: v for k, v in e.fixed.items() if not fits(e, k, v)}
    fitting = [(kind, export) for kind, export in of_type if not different(export)]
    if not fitting:
        lines = [
            f"{kind.__name__} has " + ", ".join(f"{k}={v!r} (here {config.get(k)!r})" for k, v in different(e).items())
            for kind, e in of_type
        ]
        raise ValueError(f"no method computes this {name} adapter\n" + "\n".join(lines))
    return max(fitting, key=lambda found: len(found[1].fixed))


def _off(value: Any) -> bool:
    return not value or value == "none"


def _same(value: Any, wanted: Any) -> bool:
    return value == wanted or _off(value) and _off(wanted)


def options_of(
    kind: type[Method], export: Export, config: Mapping[str, Any], names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The method's fields; `names` are the modules of each adapted path.

    Raises:
        ValueError: options that the folder lacks, or that the method does not compute, all together.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    options: dict[str, Any] = dict(export.required)
    missing = []
    for name, entry in export.config.items():
        if not isinstance(entry, str):
            field, value = entry
            if config.get(name):
                options[field] = value
        elif name not in config:
            missing.append(name)
        else:
            value = config[name]
            to_float = isinstance(fields[entry].default, float) and isinstance(value, int)
            options[entry] = float(value) if to_float else value
    for name, (field, default) in export.patterns.items():
        to_number = type(fields[default].default)
        pattern = config.get(name) or {}
        values = {path: _agreed(pattern, modules, options.get(default)) for path, modules in names.items()}
        differing = {path: to_number(value) for path, value in values.items() if value != options.get(default)}
        options[field] = tuple((exactly(path), value) for path, value in differing.items())
    for name, (field, _, _) in export.modules.items():
        paths = [path for path, modules in names.items() if any(listed(m, config.get(name) or ()) for m in modules)]
        options[field] = tuple(map(exactly, paths))
    known = _ABOUT | {*export.config, *export.patterns, *export.modules, *export.fixed}
    allowed = lambda name, value: name in export.neutral and (not export.neutral[name] or value in export.neutral[name])
    unknown = [f"{k}: {v!r}" for k, v in config.items() if k not in known and not _off(v) and not allowed(k, v)]
    what = f"{CONFIG} is not that of a {kind.__name__}"
    raise_together(what, {"missing": missing, "options that this jpeft does not compute": unknown})
    return options


def _agreed(pattern: Mapping[str, Any], modules: Sequence[str], default: Any) -> Any:
    """The value that PEFT takes for modules which are layers of one stack.

    Raises:
        ValueError: the layers differ.
    """
    find = lambda module: next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)
    values = {module: find(module) for module in modules}
    if len(set(values.values())) > 1:
        raise ValueError(
            f"the layers of a stack share one value, here {', '.join(f'{m}: {v}' for m, v in values.items())}; "
            "load the adapter into a model with its layers apart"
        )
    return values[modules[0]]


def exactly(path: str) -> str:
    """A target that matches this path alone."""
    return f"^{re.escape(path)}$"


def listed(module: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT finds a module by `target_modules` or a list like it: a regex, or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def values_of(method: Method, export: Export, names: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's options of a method but for its lists of modules; `names` are the modules' templates by path.

    Raises:
        ValueError: a method with a field's value that PEFT does not compute.
    """
    wrong = [f"{k}={getattr(method, k)!r}" for k, v in export.required.items() if getattr(method, k) != v]
    if wrong:
        only = ", ".join(f"{k}={v!r}" for k, v in export.required.items())
        raise ValueError(f"HF PEFT computes {type(method).__name__} with {only} only, got {', '.join(wrong)}")
    values: dict[str, Any] = {}
    for name, entry in export.config.items():
        field, *flag = (entry,) if isinstance(entry, str) else entry
        value = getattr(method, field)
        values[name] = value == flag[0] if flag else _plain(value)
    for name, (field, default) in export.patterns.items():
        elsewhere = getattr(method, default)
        found = {template: first_match(getattr(method, field), path, elsewhere) for path, template in names.items()}
        key = lambda template: re.escape(template).replace(r"\{\}", r"\d+")
        values[name] = {key(template): _plain(v) for template, v in found.items() if v != elsewhere}
    return {**values, **export.fixed}


def _plain(value: Any) -> Any:
    """Whole numbers without a point, as PEFT writes them; tuples as lists."""
    if isinstance(value, float) and value and value.is_integer():
        return int(value)
    return list(value) if isinstance(value, tuple) else value
