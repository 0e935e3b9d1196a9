"""An adapter folder: the method as JSON, the trainable arrays as safetensors, and what base they belong to.

Frozen arrays are made again from the seed and the base; those that cannot be (a start taken from data) lie in a second
file, `frozen.safetensors`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file, save_file

from jpeft.core.chain import Chain, chain
from jpeft.core.method import Saved, Tied
from jpeft.core.tree import leaves_with_paths, path_string
from jpeft.core.weight import Weight
from jpeft.parallel.hosts import is_first, whole

__all__ = [
    "encode_method",
    "decode_method",
    "fingerprint",
    "flatten",
    "unflatten",
    "save_adapter",
    "load_adapter",
    "read_adapter",
    "fingerprint_of",
    "refuse_other_base",
    "sampled",
    "write_text",
]


def encode_method(method) -> dict[str, Any]:
    """A method as JSON values: its class's name and its fields; a chain as its methods.

    Raises:
        ValueError: a field that JSON cannot hold, such as a function for `targets`.
    """
    if isinstance(method, Chain):
        return {"method": "chain", "methods": [encode_method(m) for m in method.methods]}
    fields = {f.name: _encode(getattr(method, f.name), f.name) for f in dataclasses.fields(method) if f.init}
    return {"method": type(method).__name__, **fields}


def decode_method(saved: Mapping[str, Any], methods: Mapping[str, type]) -> Any:
    """The method that `encode_method` wrote; `methods` as `jpeft.methods()` gives it."""
    fields = dict(saved)
    name = fields.pop("method", None)
    if name == "chain":
        return chain(*(decode_method(m, methods) for m in fields["methods"]))
    if name not in methods:
        raise ValueError(f"the adapter was made with the method {name!r}; this jpeft has {', '.join(methods)}")
    known = [f.name for f in dataclasses.fields(methods[name])]
    unknown = [f for f in fields if f not in known]
    if unknown:
        near = {f: difflib.get_close_matches(f, known, n=1) for f in unknown}
        raise ValueError(f"{name} of this jpeft has no field {unknown}; nearest: {near}")
    return methods[name](**fields)


def fingerprint(params) -> dict[str, Any]:
    """What tells one base from another: its shapes, and a checksum of some of its values rounded to bfloat16."""
    return fingerprint_of({path: sampled(x) for path, x in flatten(params).items()})


def fingerprint_of(samples: Mapping[str, tuple[list[int], bytes]]) -> dict[str, Any]:
    """The fingerprint of a tree whose leaves, in their order, have these `sampled` values."""
    values = 0
    for path, (_, some) in samples.items():
        values = zlib.crc32(path.encode() + some, values)
    return {"shapes": {path: shape for path, (shape, _) in samples.items()}, "values": values}


def sampled(x) -> tuple[list[int], bytes]:
    """A leaf's shape and some of its values, as a fingerprint needs them. All processes that hold it must call it."""
    some = whole(x[(0,) * (x.ndim - 1)][:64] if x.ndim else x)
    rounded = some.astype(jnp.bfloat16).view(np.uint16) if some.dtype.kind in "fV" else some
    return list(x.shape), rounded.tobytes()


def refuse_other_base(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError that names the differences, unless two fingerprints are the same."""
    if saved == now:
        return
    old, new = saved["shapes"], now["shapes"]
    lines = [
        f"  {p}: {old.get(p, 'absent')} there, {new.get(p, 'absent')} in this model"
        for p in sorted(old.keys() | new.keys())
        if old.get(p) != new.get(p)
    ]
    lines = lines[:5] + ([f"  ... and {len(lines) - 5} more"] if len(lines) > 5 else [])
    lines = lines or ["  the shapes are the same, the values are not"]
    raise ValueError(f"{what} belongs to another model; give the --model that it was made with\n" + "\n".join(lines))


def flatten(tree) -> dict[str, jax.Array]:
    """`{path: array}` of a tree."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any], like, what: str) -> Any:
    """A tree shaped `like` another with the arrays of `flat`.

    Raises:
        ValueError: listing every path that is missing, left over, or of another shape or dtype.
    """
    paths = [(path_string(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)]
    spec = lambda x: f"{np.dtype(x.dtype).name}{list(x.shape)}"
    wrong = [
        f"  {p}: expected {spec(x)}, got {spec(flat[p]) if p in flat else 'nothing'}"
        for p, x in paths
        if p not in flat or spec(flat[p]) != spec(x)
    ]
    wrong += [f"  {p}: not expected" for p in sorted(flat.keys() - {p for p, _ in paths})]
    if wrong:
        more = f"\n  ... and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{what} does not fit this method on this model\n" + "\n".join(wrong[:5]) + more)
    return jax.tree.unflatten(jax.tree.structure(like), [flat[p] for p, _ in paths])


def save_adapter(folder: str | Path, method, trainable, frozen, *, base: str, base_fingerprint, seed: int) -> None:
    """Write `method.json`, `trainable.safetensors` and, where there is need, `frozen.safetensors`.

    Each file appears whole or not at all. `seed` is that of the key given to `method.init`. Of several processes the
    first writes, and all must call it.
    """
    folder = Path(folder)
    kept = {name: whole(x) for name, x in _saved_fields(frozen).items()}
    trained = {name: whole(x) for name, x in flatten(trainable).items()}
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kept:
        _save_arrays(folder / "frozen.safetensors", kept)
    else:
        (folder / "frozen.safetensors").unlink(missing_ok=True)
    _save_arrays(folder / "trainable.safetensors", trained)
    written = {"method": encode_method(method), "base": base, "seed": seed, "fingerprint": base_fingerprint}
    write_text(folder / "method.json", json.dumps(written, indent=1))


def _saved_fields(frozen) -> dict[str, Any]:
    """`{path/field: array}` of the frozen fields that nothing can make again, by the data on each Weight's class."""
    fields = {}
    halves = jax.tree_util.tree_leaves_with_path(frozen, is_leaf=lambda x: isinstance(x, Tied))
    for path, half in halves:
        if isinstance(half, Tied):
            kept = {name for _, w in _weights(half.tree) for field, name in w.tied().items() if field in w.SAVED}
            fields |= {path_string((*path, "arrays", name)): half.arrays.get(name) for name in kept}
    for path, w in _weights(frozen):
        fields |= {f"{path}/{name}": getattr(w, name) for name in w.SAVED}
    return {path: x for path, x in fields.items() if hasattr(x, "dtype")}


def _weights(tree) -> list[tuple[str, Weight]]:
    return [(path, w) for path, w in leaves_with_paths(tree) if isinstance(w, Weight)]


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    ordinary = partial.stat().st_mode
    save_file({name: jnp.asarray(x) for name, x in arrays.items()}, str(partial))
    partial.chmod(ordinary)  # safetensors makes files that only their owner reads
    os.replace(partial, path)


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """The contents of an adapter folder's `method.json`."""
    path = Path(folder) / "method.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected an adapter folder as `jpeft train` writes it, but there is no {path}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        missing = {"method", "base", "seed", "fingerprint"} - saved.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what `jpeft train` writes: {error}") from error
    if missing:
        raise ValueError(f"{path} is not what `jpeft train` writes: it lacks {sorted(missing)}")
    return saved


def load_adapter(folder: str | Path, params, sites, methods: Mapping[str, type]) -> tuple[Any, Any, Any]:
    """`(method, trainable, frozen)` of an adapter folder on its base.

    Raises:
        ValueError: an adapter of another model, an unknown method, or arrays that do not fit.
        FileNotFoundError: no adapter there.
    """
    saved = read_adapter(folder)
    refuse_other_base(saved["fingerprint"], fingerprint(params), f"the adapter in {folder}")
    method = decode_method(saved["method"], methods)
    path, more = Path(folder) / "trainable.safetensors", Path(folder) / "frozen.safetensors"
    arrays = _load_arrays(path, load_file)
    kept = _load_arrays(more, load_file) if more.is_file() else {}
    given = _saved_leaves(method, {**arrays, **kept})
    start, frozen = method.init(jax.random.key(saved["seed"]), params, sites, given)
    return method, unflatten(arrays, start, str(path)), frozen


def _saved_leaves(method, arrays: Mapping[str, Any]) -> Any:
    """The arrays by leaf, as `init` takes them in place of a calibration; for a chain one such mapping a method."""
    if isinstance(method, Chain):
        part = lambda n: {p.removeprefix(f"{n}/"): x for p, x in arrays.items() if p.startswith(f"{n}/")}
        return tuple(_saved_leaves(m, part(n)) for n, m in enumerate(method.methods))
    leaves: dict[str | None, Saved] = {}
    for path, x in arrays.items():
        leaf, _, field = path.removeprefix("tree/").rpartition("/")
        leaves.setdefault(Saved.SHARED if leaf == "arrays" else leaf, Saved())[field] = x
    return leaves


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _load_arrays(path: Path, load: Callable) -> dict[str, jax.Array]:
    if not path.is_file():
        raise FileNotFoundError(f"expected the adapter's arrays at {path}, but there is no such file")
    try:
        return load(str(path))
    except Exception as error:  # safetensors raises its own class, which is no ValueError
        raise ValueError(f"{path} is truncated or not safetensors: {error}") from error


def _encode(value, name: str):
    if isinstance(value, tuple | list):
        return [_encode(v, name) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    try:
        return np.dtype(value).name
    except TypeError:
        raise ValueError(
            f"{name}={value!r} cannot be written to a file; use a value that JSON holds, for targets a regex"
        ) from None
