"""Reading an adapter folder of HF PEFT: names matched to sites, everything checked, then the arrays put in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jpeft.core.export import Export
from jpeft.core.method import Method, Tied
from jpeft.core.sites import Site, Sites
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import Unfrozen, Weight
from jpeft.interop.files import Stored, header, raise_together
from jpeft.interop.peft import prompts
from jpeft.interop.peft.config import TENSORS, choose, exactly, listed, options_of, read_config
from jpeft.interop.peft.modules import match, module_name, parameter
from jpeft.interop.peft.rows import ROOT, Row, adapted, layers_of, rows_of, site_of, whole_array, whole_row
from jpeft.methods import methods

__all__ = ["load"]

_BASE_COPY = ".base_layer.weight"  # PEFT stores an adapted embedding's own weight too
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


def load(path: str | Path, params, sites: Sites) -> tuple[Method, Any, Any]:
    """`(method, trainable, frozen)` of an adapter folder of HF PEFT, on the params that it was made for.

    Modules are matched to sites by the ends of their names; the arrays keep their values to the bit. The method's
    targets are exactly the modules of the folder.

    Raises:
        FileNotFoundError: no adapter there, or its tensors in torch's pickle format.
        ValueError: a peft_type or an option that no method here computes; a damaged file; tensors that are missing,
            left over, or of another shape, all together.
    """
    folder = Path(path)
    config = read_config(folder)
    kind, export = choose(config, methods())
    if export.whole:
        method = kind(**options_of(kind, export, config, {}))
        return method, *prompts.read(_file(folder), method, export, params, sites)
    stored = header(_file(folder))
    found = _matched(stored, export, config, sites)
    what = f"the tensors in {folder} are not those of a {export.peft_type} adapter for these params"
    if not found.own:
        raise_together(what, {"left over": found.left_over or ["nothing: the file has no tensor of the method"]})
    modules = {p: [template.format(n) for n in range(_layers(site))] for p, (site, template) in found.own.items()}
    targets = [exactly(p) for p, (site, _) in found.own.items() if site.kind in kind.KINDS]
    whole = tuple(exactly(p) for p in found.whole)
    method = kind(targets=targets, modules_to_save=whole, **options_of(kind, export, config, modules))

    def start(p):
        return method.init(jax.random.key(0), p, sites)

    def plan() -> tuple[dict[str, Weight], list[Row]]:
        leaves = adapted(jax.eval_shape(lambda p: method.bind(*start(p)), params), export)
        own = {p: site_of(p, w, sites, export) for p, w in leaves.items()}
        return leaves, list(rows_of(leaves, own, found.templates, export, complete=True))

    leaves, rows = plan()
    if dtype := _other_dtype(method, rows, leaves, stored):
        method = dataclasses.replace(method, dtype=dtype)
        leaves, rows = plan()
    with safetensors.safe_open(_file(folder), framework="numpy") as file:
        groups = _differences(rows, leaves, stored, found)
        groups["missing"] += _unlisted(found, config, export, sites)
        groups["left over"] += _foreign(found, sites, params, file)
        raise_together(what, groups)
        values, shared = _read(rows, leaves, file)
    trainable, frozen = start(params)
    return method, _put(trainable, values, shared), _put(frozen, values, shared)


def _file(folder: Path) -> Path:
    path = folder / TENSORS
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        hint = f"; {others} may run code when read: save the adapter again as safetensors" if others else ""
        raise FileNotFoundError(f"expected the adapter's arrays at {path}, but there is no such file{hint}")
    return path


# ---- whose tensors they are ----


@dataclass
class _Found:
    """What the tensors' names say. `own` are the leaves that the method adapts, `whole` those that train as they are,
    both `{path: (site, template)}`; `keys` are the tensors that belong to them, `copies` those of the base itself,
    `second` those of a module that has only a second name of a leaf."""

    own: dict[str, tuple[Site, str]] = field(default_factory=dict)
    whole: dict[str, tuple[Site, str]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    @property
    def templates(self) -> dict[str, str]:
        return {path: template for path, (_, template) in {**self.own, **self.whole}.items()}


def _matched(stored: Mapping[str, Stored], export: Export, config: Mapping[str, Any], sites: Sites) -> _Found:
    """Which leaf every tensor belongs to.

    Raises:
        ValueError: a module that may be several sites, or a site that may be several modules.
    """
    found = _Found()
    known = sorted({name for kind in export.tensors.values() for name in kind}, key=len, reverse=True)
    problems = []
    for key in [key for key in stored if key not in export.shared]:
        name = key.removeprefix(ROOT) if key.startswith(ROOT) else ""
        tensor = next((t for t in known if name.endswith(f".{t}")), None)
        if tensor is not None:
            module, group = name.removesuffix(f".{tensor}"), found.own
            usable = [s for s in sites if tensor in export.tensors.get(s.kind, ())]
        elif name.endswith(_BASE_COPY):
            found.copies.append(key)
            continue
        else:
            module, _, tensor = name.rpartition(".")
            group = found.whole
            to_save = any(listed(outer, config.get("modules_to_save") or ()) for outer in _outer(module))
            usable = [s for s in sites if to_save and parameter(s.path) == tensor]
        try:
            hit = _enclosed(module, usable) if export.enclosing else match(module, usable)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        if hit is None and export.tied and group is found.own:
            found.second.append(key)
        elif hit is None:
            found.left_over.append(f"{key} {list(stored[key].shape)}")
        elif group.setdefault(hit[0].path, hit)[1] != hit[1]:
            problems.append(f"{key}: {hit[0].path} is {group[hit[0].path][1]} already")
        else:
            found.keys.append(key)
    raise_together("these names may mean several modules", {"ambiguous": sorted(problems)})
    return found


def _enclosed(module: str, usable: list[Site]) -> tuple[Site, str] | None:
    """As `match`, of the module around a site's own."""
    hits = (match(f"{module}.{site.path.split('/')[-2]}", [site]) for site in usable if site.path.count("/") > 1)
    found = [hit for hit in hits if hit is not None]
    if len(found) > 1:
        raise ValueError(f"{module} may hold {' or '.join(site.path for site, _ in found)}")
    return found[0] if found else None


def _outer(module: str) -> list[str]:
    """A module and all that it lies in: `a.b`, `a`."""
    parts = module.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _layers(site: Site) -> int:
    return next((n for n, c in zip(site.shape, site.axes, strict=True) if c == "s"), 1)


def _unlisted(found: _Found, config: Mapping[str, Any], export: Export, sites: Sites) -> list[str]:
    """Modules that `target_modules` names and of which the file has nothing."""
    targets, without = config.get("target_modules") or (), config.get("exclude_modules") or ()
    if config.get("layers_to_transform") is not None:
        return []
    site, template = next(iter(found.own.values()))
    prefix = template.removesuffix(module_name(site, sites, ""))
    rest = {s.path: s for s in sites if s.kind in export.tensors and s.path not in found.templates}
    absent = []
    for path, site in rest.items():
        if site.axes.count("s") < min(2, path.count("/")):
            module = module_name(site, sites, prefix).format(0)
            absent += [module] if listed(module, targets) and not listed(module, without) else []
    return [f"{module}, which target_modules names" for module in absent]


def _foreign(found: _Found, sites: Sites, params, file) -> list[str]:
    """Copies of the base's weights in the file that are not those of this base, and second names of other tensors."""
    leaves = dict(leaves_with_paths(params))
    known = [file.get_tensor(key) for key in found.keys] if found.second else []
    lines = [key for key in found.second if not any(np.array_equal(file.get_tensor(key), x) for x in known)]
    for key in found.copies:
        module = key.removeprefix(ROOT).removesuffix(_BASE_COPY)
        hit = match(module, [s for s in sites if s.kind in ("dense", "embedding") and s.path in found.own])
        if hit is None:
            lines.append(key)
            continue
        site, template = hit
        w = Unfrozen(leaves[site.path], axes=site.axes.lstrip("s"))
        number = next((n for n in range(layers_of(w) or 1) if template.format(n) == module), None)
        tensor = whole_row(key, site, w, number).tensor({site.path: w})
        same = np.array_equal(file.get_tensor(key).astype(np.float32), tensor.astype(np.float32))
        lines += [] if same else [f"{key}: other values than this model has"]
    return lines


# ---- whether they fit ----


def _dtype(row: Row, leaves: Mapping[str, Weight]):
    return getattr(leaves[row.path], row.field).dtype


def _other_dtype(method: Method, rows: list[Row], leaves, stored: Mapping[str, Stored]) -> str | None:
    """The file's dtype of what trains, where the method has an option for it and would choose another."""
    tuned = [r for r in rows if r.field in leaves[r.path].trainable_fields() and r.field != "base" and r.key in stored]
    there = {_DTYPES.get(stored[row.key].dtype) for row in tuned}
    here = {str(_dtype(row, leaves)) for row in tuned}
    has_option = "dtype" in {f.name for f in dataclasses.fields(method)}
    return there.pop() if has_option and len(there) == 1 and there != here else None


def _differences(rows: list[Row], leaves, stored: Mapping[str, Stored], found: _Found) -> dict[str, list[str]]:
    expected = {row.key: row.layout.shape(row.shape(leaves)) for row in rows}
    missing: dict[str, list[int | None]] = {}
    other, wider = [], []
    for row in rows:
        got, shape, dtype = stored.get(row.key), list(expected[row.key]), _dtype(row, leaves)
        if got is None:
            missing.setdefault(row.name, []).append(row.layer)
        elif list(got.shape) != shape:
            other.append(f"{row.key}: expected {shape}, got {list(got.shape)}")
        elif jnp.promote_types(_DTYPES.get(got.dtype, "complex64"), dtype) != dtype:
            wider.append(f"{row.key}: {got.dtype} into {dtype}")
    numbers = lambda layers: "" if layers == [None] else f" of the layers {', '.join(map(str, layers))}"
    extra = [f"{key} {list(stored[key].shape)}" for key in found.keys if key not in expected]
    return {
        "missing": [f"{name}{numbers(layers)}" for name, layers in missing.items()],
        "left over": sorted(found.left_over + extra),
        "of another shape": other,
        "of a dtype that would lose digits": wider,
    }


# ---- into their places ----


def _read(rows: list[Row], leaves: Mapping[str, Weight], file) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """`({path: {field: array}}, {name: array kept once})`, layers stacked."""
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    for row in rows:
        one = row.layout.from_torch(file.get_tensor(row.key), row.shape(leaves))
        parts.setdefault((row.path, row.field), []).append(one)
    values: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    differing = []
    for row in {(row.path, row.field): row for row in rows}.values():
        found, w = parts[row.path, row.field], leaves[row.path]
        whole, copies = (np.stack(found), []) if row.stacked else (found[0], found[1:])
        array = jnp.asarray(whole, _dtype(row, leaves))
        if row.shared is not None:
            copies.append(shared.setdefault(row.shared, array))
        else:
            values.setdefault(row.path, {})[row.field] = whole_array(array, w) if row.field == "base" else array
        differing += [] if all(np.array_equal(array, copy) for copy in copies) else [row.name]
    raise_together("one array serves all of these, but their tensors differ", {"differing": differing})
    return values, shared


def _put(half, values: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]):
    """A half with the arrays in place of its own."""
    if isinstance(half, Tied):
        arrays = {name: x if x is None else shared.get(name, x) for name, x in half.arrays.items()}
        return Tied(_put(half.tree, values, shared), arrays)

    def placed(path, leaf):
        mine = values.get(path, {}) if isinstance(leaf, Weight) else {}
        mine = {name: x for name, x in mine.items() if getattr(leaf, name) is not None}
        return leaf.replace(**mine) if mine else leaf

    return map_with_paths(placed, half)
