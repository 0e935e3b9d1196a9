"""Writing an adapter folder of HF PEFT: leaves named, tensors laid out, options said; whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jpeft.core.chain import Chain
from jpeft.core.export import Export
from jpeft.core.method import Method, Tied
from jpeft.core.sites import Sites
from jpeft.core.tree import leaves_with_paths, path_string
from jpeft.core.weight import Weight, labels_of, matrix_sizes
from jpeft.interop.files import raise_together, renamed_when_complete, write_json, write_tensors
from jpeft.interop.peft import prompts
from jpeft.interop.peft.config import CONFIG, TENSORS, values_of
from jpeft.interop.peft.modules import minimal, module_name
from jpeft.interop.peft.rows import adapted, is_whole, layers_of, rows_of, site_of
from jpeft.methods import methods

__all__ = ["save"]


def save(
    path: str | Path,
    method,
    trainable,
    base: Any = None,
    frozen: Any = None,
    *,
    sites: Sites | None = None,
    prefix: str = "model.",
    names: Mapping[str, str] | None = None,
    task_type: str | None = "CAUSAL_LM",
    overwrite: bool = False,
) -> None:
    """Write an adapter as HF PEFT does, so that `peft.PeftModel.from_pretrained(model, path)` computes the same.

    Args:
        path: the folder; it appears complete or not at all.
        method, trainable: the method, or a chain of which one method trains, and its trainable half.
        base: the base model's name or folder, written into the configuration; or its params, to check the shapes with.
        frozen: the other half; only where frozen arrays belong into the file, or the method changes the base.
        sites: what `find_sites` found; without it only kernels of two axes and vectors can be written, under Flax's
            names, stacked (if they are) after the first part of their paths.
        prefix: what stands before our modules' names in torch, the vocabulary's head excepted.
        names: torch's names of parameters by path, `{}` for the layer, where they do not follow from path and prefix.
        task_type: PEFT's word for what the model is for.
        overwrite: whether an existing folder may be replaced.

    Raises:
        FileExistsError: a folder that holds something, unless `overwrite`.
        ValueError: a method or a site that PEFT does not have; arrays that are missing without `frozen`; params of
            other shapes.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft, tempfile
        >>> apply = lambda params, x: x @ params["mlp"]["up"]["kernel"]
        >>> params = {"mlp": {"up": {"kernel": jnp.ones((8, 6))}}}
        >>> sites = jpeft.find_sites(apply, params, jnp.ones((1, 8)))
        >>> method = jpeft.LoRA(rank=2)
        >>> trainable, frozen = method.init(jax.random.key(0), params, sites)
        >>> folder = tempfile.mkdtemp()
        >>> jpeft.interop.peft.save(folder, method, trainable, base="my-model")
        >>> jpeft.interop.peft.load(folder, params, sites)[0].targets
        ('^mlp/up/kernel$',)
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or allow it with overwrite=True")
    method, trainable, frozen = _exported(method, trainable, frozen)
    export = _export_of(method)
    bound = method.bind(trainable, jax.tree.map(lambda _: None, trainable) if frozen is None else frozen)
    if export.whole:
        _save_whole(path, method, bound, export, base, sites, task_type)
        return
    leaves = adapted(bound, export)
    name = str(base) if isinstance(base, str | os.PathLike) else ""
    if base is not None and not name:
        _check_shapes(leaves, base)
    own = {p: site_of(p, w, sites, export) for p, w in leaves.items()}
    given = {p: name.rpartition(".")[0] for p, name in (names or {}).items()}
    names = {p: given.get(p) or module_name(site, sites, prefix) for p, site in own.items()}
    rows = list(rows_of(leaves, own, names, export, complete=frozen is not None))
    if lacking := [row.key for row in rows if row.value(leaves) is None]:
        raise ValueError(f"{', '.join(lacking[:3])} is of the frozen half; write save(..., frozen=frozen)")

    written = {row.path for row in rows}
    whole = {p: n for p, n in names.items() if p in written and is_whole(leaves[p], own[p].kind, export)}
    tuned = {p: n for p, n in names.items() if p in written and p not in whole}
    tree = trainable.tree if isinstance(trainable, Tied) else trainable
    paths = [path_string(p) for p, _ in jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is None or _is_weight(x))]
    listed = lambda names: minimal(names, {p: layers_of(leaves[p]) or 1 for p in names}, paths)
    has = lambda p, field, letter: letter in leaves[p].FIELDS.get(field, "")
    config = {
        "peft_type": export.peft_type,
        "base_model_name_or_path": name,
        "task_type": task_type,
        "inference_mode": True,
        "target_modules": None if export.enclosing else listed(tuned),
        "modules_to_save": listed(_outermost(whole, leaves, paths)) or None,
        **values_of(method, export, tuned),
        **{
            key: listed({p: n for p, n in tuned.items() if has(p, *which)})
            for key, (_, *which) in export.modules.items()
        },
    }
    tensors = {row.key: row.tensor(leaves) for row in rows}
    with renamed_when_complete(path, overwrite=True) as folder:
        write_json(folder / CONFIG, config)
        write_tensors(folder / TENSORS, tensors)


def _save_whole(path: Path, method: Method, bound, export: Export, base, sites: Sites | None, task_type) -> None:
    tensors = prompts.tensors_of(bound, export, sites)
    config = {
        "peft_type": export.peft_type,
        "base_model_name_or_path": str(base) if isinstance(base, str | os.PathLike) else "",
        "task_type": task_type,
        "inference_mode": True,
        **values_of(method, export, {}),
        **prompts.sizes_of(tensors, bound, export),
    }
    with renamed_when_complete(path, overwrite=True) as folder:
        write_json(folder / CONFIG, config)
        write_tensors(folder / TENSORS, tensors)


def _outermost(whole: Mapping[str, str], leaves: Mapping[str, Weight], paths: Sequence[str]) -> dict[str, str]:
    """The modules of leaves that train as they are, those outside any stack named by the largest that trains in full.

    PEFT knows a classifier of several modules by the name of the whole.
    """
    found = {}
    for path, module in whole.items():
        parts = path.split("/")[:-1]
        inside = lambda depth, parts=parts: [p for p in paths if p.split("/")[:depth] == parts[:depth]]
        full = [d for d in range(1, len(parts) + 1) if all(p in whole for p in inside(d))]
        inner = len(parts) - full[0] if full and not layers_of(leaves[path]) else 0
        found[path] = module.rsplit(".", inner)[0] if inner else module
    return found


def _is_weight(x) -> bool:
    return isinstance(x, Weight)


def _exported(method, trainable, frozen):
    """The method, of a chain the one that trains, and halves that compute the same on the original params."""
    if isinstance(method, Chain):
        method, trainable, frozen = method.trained(trainable, frozen)
    try:
        plain, trainable = method.exported(trainable, frozen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if frozen is not None:
            raise
        name = type(method).__name__
        raise ValueError(
            f"what {name} amounts to on the base follows from both halves; write save(..., frozen=frozen)"
        ) from error
    return plain, trainable, frozen if plain is method else None


def _export_of(method: Method):
    if method.EXPORT is None:
        has = ", ".join(name for name, kind in methods().items() if kind.EXPORT is not None)
        raise ValueError(
            f"HF PEFT does not have {type(method).__name__} (it has {has}); merge instead, with jpeft.merge"
        )
    return method.EXPORT


def _check_shapes(leaves: dict[str, Weight], params) -> None:
    arrays = dict(leaves_with_paths(params))
    wrong = []
    for path, w in leaves.items():
        if path not in arrays or arrays[path].ndim < len(w.axes):
            wrong.append(f"{path}: no such leaf")
            continue
        shape = tuple(arrays[path].shape)
        _, n_in, n_out = matrix_sizes(shape, labels_of(len(shape), w.axes))
        for field, letters in w.FIELDS.items():
            if (x := getattr(w, field)) is not None and field not in w.UNSTACKED:
                sizes = dict(zip(letters, x.shape[x.ndim - len(letters) :], strict=True))
                if sizes.get("i", n_in) != n_in or sizes.get("o", n_out) != n_out:
                    wrong.append(f"{path}: the params have {list(shape)}, {field} has {list(x.shape)}")
    raise_together("the adapter belongs to other params", {"unlike them": wrong})
