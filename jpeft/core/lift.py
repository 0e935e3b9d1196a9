"""lift: run an unmodified function on a parameter tree that holds Weights.

The function is traced once with every Weight replaced by the abstract dense array that it stands for; the jaxpr is then
evaluated, and an equation that consumes a Weight asks that Weight what to do. `fn(merge(params))` is the oracle.
"""

from __future__ import annotations

import functools
import math
import re
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax

from jpeft.core import compat, ops
from jpeft.core.layout import Layout
from jpeft.core.shards import field_specs
from jpeft.core.tree import path_string
from jpeft.core.weight import Unfrozen, Weight

__all__ = ["lift", "DensifyError"]


class DensifyError(TypeError):
    """A matrix Weight met an operation that would need it dense."""


def lift(fn: Callable, densify: str | None = None) -> Callable:
    """Run the unmodified `fn` on trees that hold Weights: `lift(fn)(params', *inputs)`.

    Equals `fn(merge(params'), *inputs)`, without a dense copy of any adapted matrix. Products, grouped products,
    convolutions and row lookups compute on the Weight; transposes, reshapes, casts and slices stay lazy; `scan`,
    `remat`, `jit`, `cond`, `while`, `shard_map` are entered. Vectors may become dense freely. The trace is kept by tree
    structure and shapes, so that a second call is no retrace.

    Args:
        fn: any pure function; Weights may stand anywhere in its arguments.
        densify: a regex on paths; a matrix whose path it finds may become dense where an operation needs it.

    Raises:
        DensifyError: a matrix Weight meets any other operation; the message names the leaf, the operation and the line.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> method = jpeft.LoRA(rank=2)
        >>> halves = method.init(jax.random.key(0), params, jpeft.find_sites(apply, params, x))
        >>> jpeft.lift(apply)(method.bind(*halves), x).shape
        (2, 3)
    """
    traces = _traces_of(fn)
    pattern = re.compile(densify) if densify is not None else None

    @functools.wraps(fn)
    def lifted(*args, **kwargs):
        with_paths, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_weight)
        leaves = [leaf.base if isinstance(leaf, Unfrozen) else leaf for _, leaf in with_paths]
        if not any(map(_is_weight, leaves)):
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return fn(*args, **kwargs)
        dynamic = [_is_weight(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in leaves]
        static = tuple(None if d else leaf for leaf, d in zip(leaves, dynamic, strict=True))
        told_apart = tuple((type(x), repr(x) if isinstance(x, (float, complex)) else x) for x in static)  # 1, 1.0, -0.0
        inputs = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
        abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_weight(x) else x for x in inputs]

        def flat_fn(*values):
            values = iter(values)
            full = [next(values) if d else s for d, s in zip(dynamic, static, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, full)
            return fn(*args, **kwargs)

        kinds = tuple(_kind(x) for x in inputs)
        key = (structure, tuple(dynamic), told_apart, kinds, compat.trace_context())
        try:
            kept = traces.get(key)
        except TypeError:  # a static argument that cannot be hashed
            key, kept = None, None
        if kept is None:
            kept = compat.trace(flat_fn, *abstract)
            if key is not None and not any(isinstance(c, jax.core.Tracer) for c in kept[1]):
                traces[key] = kept
        jaxpr, consts, out_structure = kept
        paths = [path_string(p[2:]) for (p, _), d in zip(with_paths, dynamic, strict=True) if d]
        values = [View.of(x, p) if _is_weight(x) else x for x, p in zip(inputs, paths, strict=True)]
        run = _Interpreter(pattern)
        return jax.tree.unflatten(out_structure, [run.settle(v) for v in run.jaxpr(jaxpr, consts, values)])

    return lifted


_TRACES: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()


def _traces_of(fn: Callable) -> dict[Any, tuple]:
    """The kept traces of one function, forgotten with it: what it closes over (a tracer, say) is not kept alive."""
    owner, part = (fn.__self__, fn.__func__) if isinstance(fn, types.MethodType) else (fn, None)
    try:
        return _TRACES.setdefault(owner, {}).setdefault(part, {})
    except TypeError:  # neither hashable nor weakly referable
        return {}


def _is_weight(x) -> bool:
    return isinstance(x, Weight)


def _kind(x) -> tuple:
    if _is_weight(x):
        return x.shape, str(x.dtype)
    return (jax.typeof(x),)


@dataclass(frozen=True)
class View:
    """A Weight as the function sees it: through a lazy layout and a lazy cast."""

    weight: Weight
    layout: Layout
    dtype: Any
    path: str

    @classmethod
    def of(cls, weight: Weight, path: str) -> View:
        return cls(weight, Layout.identity(weight.shape), weight.dtype, path)

    def through(self, layout: Layout | None) -> View | None:
        return None if layout is None else View(self.weight, layout, self.dtype, self.path)

    def cut(self, axis: int, fn: Callable, *, drop: bool = False) -> View | None:
        """Slice (or index, with `drop`) every field along a view axis; None where the Weight cannot."""
        base_axis = self.layout.base_axis(axis)
        if base_axis is None or len(self.layout.cuts[base_axis]) != 1:
            return None
        weight = self.weight.along(base_axis, fn, drop=drop)
        if weight is None:
            return None
        if drop:
            layout = self.layout.squeeze([axis]).without(base_axis)
        else:
            cuts = list(self.layout.cuts)
            cuts[base_axis] = (weight.shape[base_axis],)
            layout = Layout(tuple(cuts), self.layout.axes)
        return View(weight, layout, self.dtype, self.path)

    def shards(self, entries, sizes: dict[str, int]) -> tuple[Weight, Layout]:
        """How each field is split where view axis k is split over the mesh axes `entries[k]`, and one shard's layout.

        Raises:
            ValueError: a split axis is no whole axis of the leaf, or one that the fields do not show.
        """
        cuts = list(self.layout.cuts)
        split: list[Any] = [None] * len(cuts)
        for axis, names in enumerate(entries):
            if not names:
                continue
            base_axis = self.layout.base_axis(axis)
            if base_axis is None or len(cuts[base_axis]) != 1:
                raise ValueError(f"axis {axis} is split over the mesh after it was merged or cut")
            count = math.prod(sizes[n] for n in ((names,) if isinstance(names, str) else names))
            cuts[base_axis], split[base_axis] = (cuts[base_axis][0] // count,), names
        return field_specs(self.weight, split), Layout(tuple(cuts), self.layout.axes)

    def op_arguments(self) -> tuple[Layout, str, Any]:
        return self.layout, self.weight.labels, self.dtype

    def dense(self) -> jax.Array:
        return self.layout.apply(self.weight.dense()).astype(self.dtype)


class _Interpreter:
    """Evaluates jaxprs whose values may be Views."""

    def __init__(self, densify: re.Pattern | None):
        self.densify = densify

    def jaxpr(self, jaxpr, consts, values) -> list:
        env: dict = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        read = lambda atom: atom.val if isinstance(atom, compat.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(isinstance(v, View) for v in operands):
                with compat.context(eqn):
                    outs = self.equation(eqn, operands)
            else:
                outs = compat.bind(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn, operands) -> list:
        name = eqn.primitive.name
        if name in _LAZY and (view := _LAZY[name](operands[0], eqn, operands[1:])) is not None:
            return view if isinstance(view, list) else [view]
        if name in _OPS:
            return self.operation(eqn, operands)
        if name in _ENTERED:
            return getattr(self, f"enter_{_ENTERED[name]}")(eqn, operands)
        return compat.bind(eqn, [self.settle(v, eqn) for v in operands])

    def operation(self, eqn, operands) -> list:
        try:
            op, x, view = _OPS[eqn.primitive.name](eqn, operands)
            return [view.weight.apply(op, x)]
        except ops.NotAnOp as reason:
            return compat.bind(eqn, [self.settle(v, eqn, str(reason)) for v in operands])

    def settle(self, value, eqn=None, reason: str = ""):
        """A value as an array: a vector, or a matrix that the caller allowed, becomes dense; others are refused."""
        if not isinstance(value, View):
            return value
        matrix = sum(c != "s" and n != 1 for c, n in zip(value.weight.labels, value.weight.shape, strict=True)) > 1
        if matrix and not (self.densify and self.densify.search(value.path)):
            met = f"`{eqn.primitive.name}` at {compat.source_line(eqn)}" if eqn is not None else "the function's result"
            raise DensifyError(
                f"{value.path!r} holds a {type(value.weight).__name__} of shape {value.weight.shape} and meets {met},\n"
                f"which would need it dense{': ' + reason if reason else ''}.\n"
                "Expected a product, a convolution or a row lookup. "
                f"To allow a dense copy of this leaf: jpeft.lift(fn, densify={re.escape(value.path)!r}); to leave it "
                "unadapted, take it out of `targets`."
            )
        return value.dense()

    def enter_jit(self, eqn, operands):
        jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
        return self.jaxpr(jaxpr, consts, operands)

    def enter_remat(self, eqn, operands):
        jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
        arrays, rebuild = _unpack(operands)
        passed: dict[int, int] = {}

        def fn(arrays):
            inside = rebuild(arrays)
            return self.without_passed(self.jaxpr(jaxpr, consts, inside), inside, passed)

        remat = jax.checkpoint(fn, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return [operands[passed[k]] if k in passed else out for k, out in enumerate(remat(arrays))]

    def enter_scan(self, eqn, operands):
        jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = compat.scan_split(eqn)
        fixed, carry = operands[:n_consts], [self.settle(v, eqn) for v in operands[n_consts : n_consts + n_carry]]
        scanned = operands[n_consts + n_carry :]
        arrays, rebuild = _unpack([self._scanned(v, eqn) for v in scanned])
        layers = [a.without_unstacked() if _is_weight(a) else a for a in arrays]
        passed: dict[int, int] = {}

        def body(carry, layer):
            whole = [w.with_unstacked(a) if _is_weight(w) else w for w, a in zip(layer, arrays, strict=True)]
            slices = rebuild(whole)
            outs = self.jaxpr(jaxpr, consts, [*fixed, *carry, *slices])
            carry = [self.settle(v) for v in outs[:n_carry]]
            return carry, self.without_passed(outs[n_carry:], slices, passed)

        keep = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        carry, stacked = lax.scan(body, carry, layers, **keep)
        return [*carry, *(scanned[passed[k]] if k in passed else out for k, out in enumerate(stacked))]

    def without_passed(self, outs, inside, passed: dict[int, int]) -> list:
        """`outs` for a transform to return; a View that only passes through is None there, and noted in `passed`."""
        places = {id(v): k for k, v in enumerate(inside) if isinstance(v, View)}
        passed.update({k: places[id(v)] for k, v in enumerate(outs) if id(v) in places})
        return [None if k in passed else self.settle(v) for k, v in enumerate(outs)]

    def _scanned(self, value, eqn):
        """A View whose fields all have the scanned axis first, its layout that of one slice."""
        if not isinstance(value, View):
            return value
        axis = value.layout.base_axis(0)
        if axis is None or value.weight.labels[axis] not in "sb":
            return self.settle(value, eqn, "it is scanned over an axis that is not a stack of layers")
        layout = value.layout.squeeze([0]).without(axis)
        return View(value.weight.stack_first(axis), layout, value.dtype, value.path)

    def enter_shard_map(self, eqn, operands):
        jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
        in_specs, options = compat.shard_map_parameters(eqn)
        locals_, specs = list(operands), list(in_specs)
        for k, value in enumerate(operands):
            if isinstance(value, View):
                try:
                    specs[k], layout = value.shards(tuple(in_specs[k]), dict(options["mesh"].shape))
                except ValueError as reason:
                    operands[k] = locals_[k] = self.settle(value, eqn, str(reason))
                else:
                    locals_[k] = value.through(layout)
        arrays, _ = _unpack(operands)
        _, rebuild = _unpack(locals_)

        def fn(arrays):
            return [self.settle(v) for v in self.jaxpr(jaxpr, consts, rebuild(arrays))]

        return jax.shard_map(fn, in_specs=(specs,), **options)(arrays)

    def enter_cond(self, eqn, operands):
        index, *rest = operands
        branches = [compat.open_jaxpr(b) for b in eqn.params["branches"]]
        run = lambda jaxpr, consts: [self.settle(v) for v in self.jaxpr(jaxpr, consts, rest)]
        return lax.switch(index, [functools.partial(run, *b) for b in branches])

    def enter_while(self, eqn, operands):
        cond, cond_consts = compat.open_jaxpr(eqn.params["cond_jaxpr"])
        body, body_consts = compat.open_jaxpr(eqn.params["body_jaxpr"])
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        init = [self.settle(v, eqn) for v in operands[n + m :]]
        return lax.while_loop(
            lambda carry: self.settle(self.jaxpr(cond, cond_consts, [*operands[:n], *carry])[0]),
            lambda carry: [self.settle(v) for v in self.jaxpr(body, body_consts, [*operands[n : n + m], *carry])],
            init,
        )


def _unpack(values: list) -> tuple[list, Callable]:
    """Views as pytrees that JAX can pass through a transform, and the function that makes Views of them again."""
    arrays = [v.weight if isinstance(v, View) else v for v in values]

    def rebuild(arrays):
        return [
            View(a, v.layout, v.dtype, v.path) if isinstance(v, View) else a
            for a, v in zip(arrays, values, strict=True)
        ]

    return arrays, rebuild


# Equations that leave a View lazy: (view, equation, other operands) -> View, or None where they cannot.


def _cast(view, eqn, _):
    return View(view.weight, view.layout, eqn.params["new_dtype"], view.path)


def _reshape(view, eqn, _):
    return None if eqn.params["dimensions"] is not None else view.through(view.layout.reshape(eqn.params["new_sizes"]))


def _squeeze(view, eqn, _):
    return _squeezed(view, eqn.params["dimensions"])


def _squeezed(view, dims):
    for axis in sorted((d % len(view.layout.axes) for d in dims), reverse=True):
        base_axis = view.layout.base_axis(axis)
        if base_axis is not None and view.weight.labels[base_axis] in "sb":
            view = view.cut(axis, lambda a, k: a.squeeze(k), drop=True)
        else:
            view = view.through(view.layout.squeeze([axis]))
        if view is None:
            return None
    return view


def _slice(view, eqn, _):
    strides = eqn.params["strides"] or [1] * len(view.layout.axes)
    for axis, cut in enumerate(zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)):
        if view is not None and cut != (0, view.layout.shape[axis], 1):
            view = view.cut(axis, lambda a, k, cut=cut: lax.slice_in_dim(a, *cut, axis=k))
    return view


def _dynamic_slice(view, eqn, starts):
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if view is not None and size != view.layout.shape[axis]:
            cut = lambda a, k, s=starts[axis], n=size: lax.dynamic_slice_in_dim(a, s, n, k)
            view = view.cut(axis, cut)
    return view


def _expand(view, eqn, _):
    """New axes of size one; a true broadcast is not lazy."""
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    kept = tuple(shape[d] for d in dims) == view.layout.shape and math.prod(shape) == math.prod(view.layout.shape)
    return view.through(view.layout.reshape(shape)) if kept else None


def _split(view, eqn, _):
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])
    return _pieces(
        view, axis, [(int(end) - int(n), int(end)) for n, end in zip(eqn.params["sizes"], ends, strict=True)]
    )


def _unstack(view, eqn, _):
    axis = eqn.params["axis"]
    pieces = _pieces(view, axis, [(n, n + 1) for n in range(view.layout.shape[axis])])
    return pieces and [_squeezed(piece, [axis]) for piece in pieces]


def _pieces(view, axis: int, bounds) -> list[View] | None:
    """The view cut along an axis; None where it cannot be."""
    pieces = [view.cut(axis, lambda a, k, b=b: lax.slice_in_dim(a, *b, axis=k)) for b in bounds]
    return None if None in pieces else pieces


_LAZY: dict[str, Callable] = {
    "broadcast_in_dim": _expand,
    "split": _split,
    "unstack": _unstack,
    "transpose": lambda view, eqn, _: view.through(view.layout.transpose(eqn.params["permutation"])),
    "reshape": _reshape,
    "convert_element_type": _cast,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": lambda view, eqn, rest: _dynamic_slice(view, eqn, rest) if isinstance(view, View) else None,
    "sharding_constraint": lambda view, eqn, _: view,
    "copy": lambda view, eqn, _: view,
    "copy_p": lambda view, eqn, _: view,
    "name": lambda view, eqn, _: view,
    "stop_gradient": lambda view, eqn, _: replace(view, weight=jax.tree.map(lax.stop_gradient, view.weight)),
    "pvary": lambda view, eqn, _: view,  # inserted again where the fields are used
}


# Equations that compute on a Weight: (equation, operands) -> (op, other operand, View).


def _one_view(operands) -> tuple[View, int]:
    views = [k for k, v in enumerate(operands) if isinstance(v, View)]
    if len(views) != 1:
        raise ops.NotAnOp("both operands are Weights")
    return operands[views[0]], views[0]


def _dot(eqn, operands):
    view, side = _one_view(operands)
    x = operands[1 - side]
    return ops.Dot(*view.op_arguments(), params=dict(eqn.params), side=side, x_ndim=x.ndim), x, view


def _ragged(eqn, operands):
    view, side = _one_view(operands)
    if side != 1:
        raise ops.NotAnOp("the leaf is the left operand of a grouped product")
    return (
        ops.RaggedDot(*view.op_arguments(), params=dict(eqn.params), sizes=operands[2], rows=operands[0].shape[0]),
        operands[0],
        view,
    )


def _gather(eqn, operands):
    view, side = _one_view(operands)
    if side != 0:
        raise ops.NotAnOp("the leaf holds row numbers")
    return ops.Gather(*view.op_arguments(), params=dict(eqn.params), x_ndim=operands[1].ndim), operands[1], view


def _conv(eqn, operands):
    view, side = _one_view(operands)
    if side != 1:
        raise ops.NotAnOp("the leaf is the input of a convolution")
    return ops.Conv(*view.op_arguments(), params=dict(eqn.params), x_ndim=operands[0].ndim), operands[0], view


_OPS = {"dot_general": _dot, "ragged_dot_general": _ragged, "gather": _gather, "conv_general_dilated": _conv}

_ENTERED = {
    "jit": "jit",
    "pjit": "jit",
    "closed_call": "jit",
    "remat2": "remat",
    "checkpoint": "remat",
    "remat": "remat",
    "scan": "scan",
    "cond": "cond",
    "while": "while",
    "shard_map": "shard_map",
}
