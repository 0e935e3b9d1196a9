"""lift: run an unmodified function on a parameter tree that holds Weights.

The function is traced once with every Weight replaced by the abstract dense array that it stands for; the jaxpr is then
evaluated, and an equation that consumes a Weight asks that Weight what to do. `fn(merge(params))` is the oracle.
"""

from __future__ import annotations

import functools
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
from jpeft.core.attention import MARKER, Call
from jpeft.core.tree import path_string
from jpeft.core.views import LAZY, View
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
class _Noted:
    """An array on its way through the function, and what Weights that made it leave for the uses that it reaches."""

    array: Any
    notes: tuple[Any, ...]


def _plain(value):
    return value.array if isinstance(value, _Noted) else value


def _noted(value, notes: tuple):
    return _Noted(value, notes) if notes and not isinstance(value, View) else value


def _notes_of(values) -> tuple:
    """The notes of all values, each once."""
    notes = {id(note): note for v in values if isinstance(v, _Noted) for note in v.notes}
    return tuple({_identity(note): note for note in notes.values()}.values()) if len(notes) > 1 else (*notes.values(),)


def _identity(note) -> tuple:
    """What tells notes apart: two of the same arrays are one, as where a leaf is cut and each piece leaves it."""
    leaves, structure = jax.tree.flatten(note)
    return structure, *map(id, leaves)


class _Interpreter:
    """Evaluates jaxprs whose values may be Views, or arrays with notes."""

    def __init__(self, densify: re.Pattern | None):
        self.densify = densify

    def jaxpr(self, jaxpr, consts, values) -> list:
        env: dict = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        read = lambda atom: atom.val if isinstance(atom, compat.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(isinstance(v, (View, _Noted)) for v in operands):
                with compat.context(eqn):
                    outs = self.equation(eqn, operands)
            else:
                outs = compat.bind(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn, operands) -> list:
        name, notes = eqn.primitive.name, _notes_of(operands)
        if notes and _is_attention(eqn):
            return self.attention(eqn, [self.settle(v) for v in operands], notes)
        seen = any(isinstance(v, View) for v in operands)
        if name in _ENTERED and (seen or _calls_attention(eqn)):
            return getattr(self, f"enter_{_ENTERED[name]}")(eqn, operands)
        operands = [_plain(v) for v in operands]
        if name in LAZY and isinstance(operands[0], View):
            view = LAZY[name](operands[0], eqn, operands[1:])
            if view is not None:
                return view if isinstance(view, list) else [view]
        if seen and name in _OPS:
            return self.operation(eqn, operands, notes)
        return [_noted(out, notes) for out in compat.bind(eqn, [self.settle(v, eqn) for v in operands])]

    def operation(self, eqn, operands, notes: tuple) -> list:
        try:
            op, x, view = _OPS[eqn.primitive.name](eqn, operands)
            op = replace(op, operand=x, reached=notes)
            out = view.weight.added(op, x) if isinstance(op, ops.Add) else view.weight.apply(op, x)
            notes = view.weight.notes(op, notes)
            reason = ""
        except ops.NotAnOp as why:
            out, reason = None, str(why)
        if out is None:
            (out,) = compat.bind(eqn, [self.settle(v, eqn, reason) for v in operands])
        return [_noted(out, notes)]

    def attention(self, eqn, operands, notes: tuple) -> list:
        """The call as the model makes it, then everything that the notes say of it."""
        out, lse = compat.bind(eqn, operands)
        query, key, _, _, scale, *_ = operands
        call = Call(query, key.shape[-2], scale, out, lse, notes)
        for note in notes:
            if hasattr(note, "attend"):
                call = note.attend(call)
        further = tuple(note for note in notes if getattr(note, "beyond_attention", False))
        return [_noted(call.out, further), call.lse]

    def settle(self, value, eqn=None, reason: str = ""):
        """A value as an array: a vector, or a matrix that the caller allowed, becomes dense; others are refused."""
        if not isinstance(value, View):
            return _plain(value)
        sizes = [(c, n) for c, n in zip(value.weight.labels, value.weight.shape, strict=True) if c != "s" and n != 1]
        matrix = len(sizes) > 1 and any(c == "i" for c, _ in sizes)  # a bias of heads has two axes, and no inputs
        allowed = value.weight.may_be_dense() or self.densify and self.densify.search(value.path)
        if matrix and not allowed:
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
        noted: dict[int, list[int]] = {}  # which notes each output has

        def fn(arrays):
            inside = rebuild(arrays)
            outs = self.without_passed(self.jaxpr(jaxpr, consts, inside), inside, passed, notes=True)
            notes = _notes_of(outs)
            places = {_identity(note): n for n, note in enumerate(notes)}
            own = {k: v.notes for k, v in enumerate(outs) if isinstance(v, _Noted)}
            noted.update({k: [places[_identity(note)] for note in found] for k, found in own.items()})
            return [_plain(v) for v in outs], notes

        remat = jax.checkpoint(fn, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        outs, notes = remat(arrays)
        outs = [_noted(out, tuple(notes[n] for n in noted.get(k, ()))) for k, out in enumerate(outs)]
        return [operands[passed[k]] if k in passed else out for k, out in enumerate(outs)]

    def enter_scan(self, eqn, operands):
        n_consts, n_carry = compat.scan_split(eqn)
        fixed, carry = operands[:n_consts], [self.settle(v, eqn) for v in operands[n_consts : n_consts + n_carry]]
        scanned, length = [_plain(v) for v in operands[n_consts + n_carry :]], eqn.params["length"]
        ends = sorted({length, *(cut for v in scanned if isinstance(v, View) for cut in v.layers_differ_at())} - {0})
        parts = list(zip([0, *ends], ends, strict=False))
        passed: dict[int, int] = {}
        pieces = {}
        for start, stop in reversed(parts) if eqn.params["reverse"] else parts:
            layers = scanned if len(parts) == 1 else [self._layers(v, start, stop, eqn) for v in scanned]
            carry, pieces[start] = self.scan(eqn, fixed, carry, layers, stop - start, passed)
        outs = zip(*(pieces[start] for start, _ in parts), strict=True)
        return [*carry, *(scanned[passed[k]] if k in passed else _joined(out) for k, out in enumerate(outs))]

    def scan(self, eqn, fixed, carry, scanned, length: int, passed: dict[int, int]):
        """`(carry, stacked)` of a scan equation over these layers."""
        jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
        n_carry = len(carry)
        arrays, rebuild = _unpack([self._scanned(v, eqn) for v in scanned])
        layers = [a.layerwise() if _is_weight(a) else a for a in arrays]

        def body(carry, step):
            number, layer = step
            whole = [w.layer_of(a, number) if _is_weight(w) else w for w, a in zip(layer, arrays, strict=True)]
            slices = rebuild(whole)
            outs = self.jaxpr(jaxpr, consts, [*fixed, *carry, *slices])
            carry = [self.settle(v) for v in outs[:n_carry]]
            return carry, self.without_passed(outs[n_carry:], slices, passed)

        unroll = min(eqn.params["unroll"], length)
        return lax.scan(body, carry, (np.arange(length, dtype=np.int32), layers), length, eqn.params["reverse"], unroll)

    def _layers(self, value, start: int, stop: int, eqn):
        """Some layers of a value that is scanned."""
        if not isinstance(value, View):
            return value[start:stop]
        piece = value.cut(0, lambda a, k: lax.slice_in_dim(a, start, stop, axis=k))
        return self.settle(value, eqn, "its layers cannot be told apart")[start:stop] if piece is None else piece

    def without_passed(self, outs, inside, passed: dict[int, int], notes: bool = False) -> list:
        """`outs` for a transform to return; a View that only passes through is None there, and noted in `passed`."""
        places = {id(v): k for k, v in enumerate(inside) if isinstance(v, View)}
        passed.update({k: places[id(v)] for k, v in enumerate(outs) if id(v) in places})
        keep = lambda v: v if notes and isinstance(v, _Noted) else self.settle(v)
        return [None if k in passed else keep(v) for k, v in enumerate(outs)]

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
        operands = [_plain(v) for v in operands]
        locals_, specs = list(operands), list(in_specs)
        for k, value in enumerate(operands):
            if isinstance(value, View):
                try:
                    operands[k], specs[k], layout = value.shards(tuple(in_specs[k]), dict(options["mesh"].shape))
                except ValueError as reason:
                    operands[k] = locals_[k] = self.settle(value, eqn, str(reason))
                else:
                    locals_[k] = operands[k].through(layout)
        arrays, _ = _unpack(operands)
        _, rebuild = _unpack(locals_)

        def fn(arrays):
            return [self.settle(v) for v in self.jaxpr(jaxpr, consts, rebuild(arrays))]

        return jax.shard_map(fn, in_specs=(specs,), **options)(arrays)

    def enter_cond(self, eqn, operands):
        index, *rest = (_plain(operands[0]), *operands[1:])
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


def _joined(pieces):
    """What the parts of a scan put out, one after the other."""
    return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, 0)


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


def _add(eqn, operands):
    view, side = _one_view(operands)
    ndim = len(eqn.invars[1 - side].aval.shape)
    return ops.Add(*view.op_arguments(), params=dict(eqn.params), x_ndim=ndim), operands[1 - side], view


def _conv(eqn, operands):
    view, side = _one_view(operands)
    if side != 1:
        raise ops.NotAnOp("the leaf is the input of a convolution")
    return ops.Conv(*view.op_arguments(), params=dict(eqn.params), x_ndim=operands[0].ndim), operands[0], view


_OPS = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "add": _add,
}

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


def _is_attention(eqn) -> bool:
    return eqn.params.get("name") == MARKER


def _calls_attention(eqn) -> bool:
    """Whether an equation's own jaxprs call attention."""
    return any(
        _is_attention(inner) or _calls_attention(inner) for jaxpr in compat.jaxprs_of(eqn) for inner in jaxpr.eqns
    )
