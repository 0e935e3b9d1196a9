"""The rows of a PEFT file: which tensor is which field of which Weight, layer by layer, as `core.export` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jpeft.core.export import Export
from jpeft.core.sites import Site, Sites
from jpeft.core.tree import leaves_with_paths
from jpeft.core.weight import Unfrozen, Weight, dense, from_matrix, matrix_sizes, to_matrix
from jpeft.interop.peft.axes import Layout, Window
from jpeft.interop.peft.modules import parameter

__all__ = ["ROOT", "Row", "adapted", "is_whole", "layers_of", "rows_of", "site_of", "whole_array", "whole_row"]

ROOT = "base_model.model."
_WHOLE = {"dense": "oi", "conv": "oi", "embedding": "io"}  # of a leaf that trains as it is; the others are vectors
_FLAX = {"kernel": ("dense", 2), "scale": ("scale", 1), "bias": ("bias", 1)}  # known without sites: name, axes


@dataclass(frozen=True)
class Row:
    """One tensor: its key in the file, and the field that it is.

    `name` is the key with `{}` for the layer, `layer` None for what is no stack, `stacked` whether the field has an
    axis for it. `shared` is the name of an array that the method keeps once.
    """

    key: str
    name: str
    path: str
    field: str
    layout: Layout
    layer: int | None = None
    stacked: bool = False
    shared: str | None = None

    def value(self, leaves: Mapping[str, Weight]) -> Any:
        """The field of this layer; None where the leaf has none."""
        value = field_of(leaves[self.path], self.field)
        return value[self.layer] if self.stacked and value is not None else value

    def shape(self, leaves: Mapping[str, Weight]) -> tuple[int, ...]:
        """The shape of what `value` gives."""
        return shape_of(leaves[self.path], self.field)[self.stacked :]

    def tensor(self, leaves: Mapping[str, Weight]) -> np.ndarray:
        """The tensor as torch has it."""
        return self.layout.to_torch(np.asarray(self.value(leaves)))


def field_of(w: Weight, name: str) -> Any:
    """A field; the base in matrix form without the axes that it lacks."""
    if name != "base" or w.base is None:
        return getattr(w, name)
    return to_matrix(dense(w.base), w.labels).reshape(shape_of(w, name))


def shape_of(w: Weight, name: str) -> tuple[int, ...]:
    """The shape of what `field_of` gives."""
    if name != "base":
        return tuple(getattr(w, name).shape)
    lead, n_in, n_out = matrix_sizes(w.shape, w.labels)
    return (*lead, *(n for n, c in ((n_in, "i"), (n_out, "o")) if c in w.axes))


def _letters(w: Weight, name: str) -> str:
    return w.FIELDS[name] if name != "base" else "".join(c for c in "io" if c in w.axes)


def adapted(bound, export: Export) -> dict[str, Weight]:
    """`{path: Weight}` of the leaves that the method has put Weights in."""
    fields = {field for tensors in export.tensors.values() for field, _ in tensors.values()}
    weights = {path: w for path, w in leaves_with_paths(bound) if isinstance(w, Weight)}
    own = lambda w: {"base"} if isinstance(w, Unfrozen) else fields & w.FIELDS.keys()
    return {path: w for path, w in weights.items() if any(getattr(w, field) is not None for field in own(w))}


def is_whole(w: Weight, kind: str, export: Export) -> bool:
    """Whether the leaf trains as it is beside the method, rather than being what the method trains."""
    own = any(field == "base" for field, _ in export.tensors.get(kind, {}).values())
    return isinstance(w, Unfrozen) and not own


def layers_of(w: Weight) -> int | None:
    """The layers of a stacked leaf; None for one that is no stack."""
    for name, letters in w.FIELDS.items():
        if name not in w.UNSTACKED and (x := getattr(w, name)) is not None:
            return x.shape[0] if x.ndim > len(letters) + w.axes.count("b") else None
    return matrix_sizes(w.shape, w.labels)[0][0] if "s" in w.labels else None


def stack_size(site: Site, default: int) -> int:
    """The layers of a stacked site; a default where its shape is not known."""
    return site.shape[site.axes.index("s")] if site.shape and "s" in site.axes else default


def site_of(path: str, w: Weight, sites: Sites | None, export: Export) -> Site:
    """The one use of a leaf, or that which the method is for.

    Raises:
        ValueError: no use, or several of different kinds that PEFT's adapter does not reach; without `sites` a leaf
            that Flax's names do not explain.
    """
    if sites is None:
        *module, name = path.split("/")
        kind, axes = _FLAX.get(name, ("", 0))
        layers = layers_of(w)
        if len(w.axes) != axes or kind == "dense" and layers is None and len(module) < 2:
            raise ValueError(f"{path}: how the model uses it is not known from its name; write sites=sites")
        return Site(path, kind, (), None, "s" * (layers is not None) + w.axes, 1, 0)
    uses: dict[str, Site] = {}
    for use in sites:
        # A call that its outputs reach is a use of its own only for what acts there.
        if use.path == path and (use.kind == "attention") == ("attention" in export.tensors):
            uses.setdefault(use.kind, use)
    if export.tied and (known := [use for kind, use in uses.items() if kind in export.tensors]):
        return known[0]
    if len(uses) > 1:
        raise ValueError(
            f"{path} is used as {' and '.join(uses)}: an adapter of HF PEFT reaches one module, not all that share a "
            "weight; leave it out, or merge"
        )
    if not uses:
        raise ValueError(f"{path} is none of the sites; call find_sites on this tree")
    return next(iter(uses.values()))


def whole_row(key: str, site: Site, w: Weight, layer: int | None) -> Row:
    """The row of a leaf as it is."""
    has = _letters(w, "base")
    layout = Layout(has, _WHOLE.get(site.kind, f"({has})"), Window.of(site))
    return Row(key, key, site.path, "base", layout, layer, stacked=layers_of(w) is not None)


def whole_array(matrix, w: Weight):
    """The inverse of `field_of(w, "base")`: the leaf's own axes."""
    lead, n_in, n_out = matrix_sizes(w.shape, w.labels)
    return from_matrix(matrix.reshape(*lead, n_in, n_out), w.labels, w.shape)


def rows_of(
    leaves: Mapping[str, Weight], own: Mapping[str, Site], names: Mapping[str, str], export: Export, *, complete: bool
) -> Iterator[Row]:
    """Every tensor of the file. `complete` says that a field which is None does not exist, rather than being frozen.

    Raises:
        ValueError: a kind of site that PEFT's method does not have.
    """
    unknown = []
    for path, w in leaves.items():
        kind = own[path].kind
        if is_whole(w, kind, export):
            tensors = {parameter(path): ("base", whole_row("", own[path], w, None).layout.wants)}
        elif kind in export.tensors:
            tensors = export.tensors[kind]
        else:
            if not w.trainable_fields() <= w.tied().keys():  # else another leaf writes what it shares
                unknown.append(f"{path} ({kind})")
            continue
        window, layers = Window.of(own[path]), layers_of(w)
        module = names[path].rpartition(".")[0] if export.enclosing else names[path]
        below = stack_size(own[path], layers) - layers if export.enclosing and layers is not None else 0
        for layer in [None] if layers is None else range(layers):
            for tensor, (field, wants) in tensors.items():
                if getattr(w, field) is None and (complete or field in w.trainable_fields()):
                    continue
                if unlike := set(_letters(w, field)) - set(wants):
                    unknown.append(f"{path} ({field} with an axis {unlike.pop()})")
                    break
                name = f"{ROOT}{module}.{tensor}"
                stacked = layer is not None and field not in w.UNSTACKED
                layout = Layout(_letters(w, field), wants, window)
                key = name if layer is None else name.format(below + layer)
                yield Row(key, name, path, field, layout, layer, stacked, w.tied().get(field))
    if unknown:
        known = ", ".join(export.tensors)
        raise ValueError(f"HF PEFT's {export.peft_type} is for {known}, not for {', '.join(unknown[:5])}")
    for key, (name, wants) in export.shared.items():
        ties = ((p, field) for p, w in leaves.items() for field, shared in w.tied().items() if shared == name)
        path, field = next(ties)
        yield Row(key, key, path, field, Layout(_letters(leaves[path], field), wants), shared=name)
