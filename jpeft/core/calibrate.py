"""calibrate: what a method learns from data before training, gathered by runs of the unmodified function.

A method says by `OBSERVES` what it looks at, site by site, and folds it batch by batch:

    "inputs"      the rows that a matrix is multiplied with, (*stack, *batch, rows, in)
    "gradients"   the gradient of the loss, in the leaf's own shape
    "weights"     the leaf as it was before an earlier method of the chain replaced it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.chain import Chain
from jpeft.core.lift import lift
from jpeft.core.ops import Dot
from jpeft.core.sites import Site, Sites
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.core.weight import Weight, apply, matrix_sizes, static, weight

__all__ = ["calibrate"]


def calibrate(
    fn: Callable, params, sites: Sites, batches: Iterable = (), *, method, loss: Callable | None = None, mask=None
) -> Any:
    """`{path: what the method learns}`, for `method.init(key, params, sites, calibration)`; for a chain a tuple.

    Args:
        fn, params, sites: the function, its pretrained params, and what `find_sites` found.
        batches: the inputs of `fn` after params, a tuple (or one array) a batch. All are run; a few hundred rows a site
            are enough for most methods.
        method: the method, with its targets; a chain asks for each of its methods.
        loss: `loss(params, *inputs) -> scalar`, for methods that look at gradients.
        mask: `mask(*inputs) -> booleans`, the rows that count (no padding), in the order of the rows that the matrices
            see; all of them where None.

    Raises:
        ValueError: no batches, or no loss, where the method looks at data; a matrix that one run uses more than once.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> params, x = {"kernel": jnp.ones((8, 6))}, jax.random.normal(jax.random.key(0), (16, 8))
        >>> sites = jpeft.find_sites(apply, params, x)
        >>> jpeft.calibrate(apply, params, sites, [x], method=jpeft.LoRA(rank=2))
        {}
    """
    if isinstance(method, Chain):
        batches = list(batches) if any(m.CALIBRATION for m in method.methods) else ()
        each = partial(calibrate, fn, params, sites, batches, loss=loss, mask=mask)
        return tuple(each(method=m) for m in method.methods)
    if not method.CALIBRATION:
        return {}
    chosen = method.chosen(sites)
    name = type(method).__name__
    if method.OBSERVES == "weights":
        return {path: leaf for path, leaf in leaves_with_paths(params) if path in chosen}
    batches = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not batches:
        raise ValueError(f"{name} starts from {method.CALIBRATION}; expected at least one batch, got none")
    if method.OBSERVES == "gradients" and loss is None:
        raise ValueError(f"{name} starts from {method.CALIBRATION}; write calibrate(..., loss=lambda params, x: ...)")
    if method.OBSERVES == "inputs":
        look = _inputs_of(fn, params, chosen, sites)
    else:
        look = _gradients_of(loss, params, chosen)
    states: dict[str, Any] = dict.fromkeys(chosen)
    for inputs in batches:
        seen = look(*inputs)
        rows = None if mask is None else jnp.asarray(mask(*inputs)).ravel()
        for path, site in chosen.items():
            x = seen[path]
            if rows is not None and method.OBSERVES == "inputs":
                if x.shape[-2] != rows.size:
                    raise ValueError(f"{path}: the mask is for {rows.size} rows, the matrix sees {x.shape[-2]}")
                x = x[..., rows, :]
            states[path] = method.observe(states[path], x, site)
    return method.conclude(states, chosen)


def _gradients_of(loss, params, chosen: dict[str, Site]):
    """`look(*inputs) -> {path: gradient}` of the chosen leaves alone."""
    leaves = {path: leaf for path, leaf in leaves_with_paths(params) if path in chosen}

    @jax.jit
    def grads(leaves, params, *inputs):
        within = lambda leaves: map_with_paths(lambda path, leaf: leaves.get(path, leaf), params)
        return jax.grad(lambda leaves: loss(within(leaves), *inputs))(leaves)

    return lambda *inputs: grads(leaves, params, *inputs)


def _inputs_of(fn, params, chosen: dict[str, Site], sites: Sites):
    """`look(*inputs) -> {path: rows}`: what each matrix is multiplied with, read off the backward pass of one run."""
    for path, site in chosen.items():
        layers = math.prod(n for n, c in zip(site.shape, site.axes, strict=True) if c == "s")
        calls = sum(s.calls for s in sites if s.path == path and s.kind == site.kind)
        if calls > layers:
            raise ValueError(f"{path}: one run uses it {calls} times; its inputs cannot be told apart; leave it out")

    def run(probes, params, *inputs):
        made = lambda path, leaf, axes: _Recorder(leaf, probes[path], axes=axes)
        out = lift(fn)(_with(params, chosen, made), *inputs)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in floats)

    grads = jax.jit(jax.grad(run))

    def look(*inputs):
        rows: dict[str, int] = {}
        measured = _with(params, chosen, lambda path, leaf, axes: _Rows(leaf, axes=axes, found=_Found(rows, path)))
        jax.eval_shape(lambda p: lift(lambda *a: fn(*a))(p, *inputs), measured)
        unseen = [path for path in chosen if path not in rows]
        if unseen:
            raise ValueError(
                f"the inputs of {', '.join(unseen[:5])} cannot be seen: no plain product there; leave it out"
            )
        shapes = {path: matrix_sizes(site.shape, site.axes) for path, site in chosen.items()}
        probes = {path: jnp.zeros((*lead, rows[path], n)) for path, (lead, n, _) in shapes.items()}
        return grads(probes, params, *inputs)

    return look


def _with(params, chosen: dict[str, Site], make):
    return map_with_paths(
        lambda path, leaf: make(path, leaf, chosen[path].axes.lstrip("s")) if path in chosen else leaf, params
    )


class _Found:
    """Where a `_Rows` notes, while it is traced, how many rows its matrix sees."""

    def __init__(self, rows: dict[str, int], path: str):
        self.rows, self.path = rows, path


@weight
class _Rows(Weight):
    base: Any
    axes: str = static()
    found: Any = static()

    def apply(self, op, x):
        if isinstance(op, Dot) and not op.transposed:
            batch = matrix_sizes(self.shape, self.labels)[0]
            self.found.rows[self.found.path] = math.prod(op.inputs(x).shape[len(batch) : -1])
        return apply(op, x, self.base)


@weight
class _Recorder(Weight):
    """The base; the gradient with respect to `probe` is the matrix's input."""

    base: Any
    probe: Any
    axes: str = static()

    FIELDS = {"probe": "ri"}

    def apply(self, op, x):
        if not isinstance(op, Dot) or op.transposed:  # another use of a tied leaf
            return apply(op, x, self.base)
        seen = lambda h: _record(h.astype(jnp.float32).reshape(self.probe.shape), self.probe)
        return apply(op, op.map_inputs(x, lambda h: seen(h).reshape(h.shape).astype(h.dtype)), self.base)


@jax.custom_vjp
def _record(x, probe):
    return x


_record.defvjp(lambda x, probe: (x, x), lambda x, g: (g, x))
