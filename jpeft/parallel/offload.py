"""An optimizer whose state stays in the host's memory and passes through the device a piece at a time ("paged").

The idea of a paged optimizer is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314, section 3); there pages move when the
device is short of memory, here always, so that the device never holds more of the state than a few pieces.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core.tree import path_string
from jpeft.parallel.elementwise import Equation, NotElementwise, Part, Program, compute, parts_of, trace

if TYPE_CHECKING:
    import optax

__all__ = ["in_host", "offload", "results_in_host"]

Space = jax.memory.Space
_leaves = jax.tree_util.tree_leaves_with_path

PIECE = 2**18
"""Numbers of an array that are on the device at once, unless one layer has more: 1 MiB in float32."""
SMALL = 2**14
"""An array of no more numbers passes whole."""


def offload(optimizer: optax.GradientTransformation, *, fallback: bool = False) -> optax.GradientTransformation:
    """`optimizer` with its state in pinned host memory.

    The state has the optimizer's own structure. Arrays that belong to a parameter (they have its path and its shape)
    lie in the host's memory, sharded as it is; counters and keys stay on the device. `update` takes them through the
    device a piece at a time, layer by layer where parameters are stacked and array by array where they are not, and
    writes each piece back into its place: a step that donates the state needs neither a second copy of it in the host's
    memory nor more than a few pieces on the device. Gradients, parameters and updates are on the device as always.

    The operations and the numbers are those of `optimizer`, to the last bit. Only where a compiler contracts a product
    and a sum into one rounding, as XLA does on CPUs and GPUs by what it happens to fuse, may a last bit differ, as it
    does between any two programs.

    An array can be updated in pieces where the optimizer works number by number on its state, as AdamW, Lion or SGD
    with momentum do. `offload` reads that from the optimizer's jaxpr and refuses others. Gradients and parameters may
    be looked at as a whole, as for clipping by the global norm.

    Arrays in the host's memory cannot be selected with `jnp.where`: a loop that keeps its state where a gradient is not
    finite says `update(gradients, state, params, finite=...)`, and where that is False the state stays as it was and
    the updates are zero. Donate parameters and state together and return them in the order in which they came: JAX
    pairs donated arrays with results by shape alone where an argument is not committed to its device.

    Args:
        optimizer: the transformation, with any schedules and masks.
        fallback: keep the state on the device where the platform has no pinned host memory, instead of raising.

    Raises:
        ValueError: at `init`: a platform without pinned host memory; an array of the state that is shaped like a
            parameter without being any's. At `init` or `update`: an optimizer that takes its state as a whole. At
            `update`: state that has left the host's memory.

    Example:
        >>> import jax.numpy as jnp, jpeft, optax
        >>> params = {"kernel": jnp.ones((4, 8, 2))}
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), jpeft.offload(optax.adamw(1e-3)))
        >>> state = tx.init(params)
        >>> optax.tree.get(state, "mu")["kernel"].sharding.memory_kind
        'pinned_host'
        >>> updates, state = tx.update(params, state, params)
    """
    import optax

    inner = optax.with_extra_args_support(optimizer)

    def init(params) -> Any:
        lacking = _lacking(params)
        if lacking is not None:
            if fallback:
                return optimizer.init(params)
            raise ValueError(
                f"expected devices with pinned host memory, but {lacking}; leave the state on the device with "
                "jpeft.offload(..., fallback=True), or do without offload"
            )
        shapes = jax.eval_shape(optimizer.init, params)
        owners = _owners(shapes, params)
        with contextlib.suppress(TypeError):  # an optimizer that needs keywords; `update` has them, and checks
            like = _abstract(params)
            _plan(lambda *args: _step(inner, *args), (like, _abstract(shapes), like, None), owners)
        return _placed(optimizer, params, shapes, owners)

    def update(updates, state, params=None, *, finite=None, **extra) -> tuple[Any, Any]:
        owners = _owners(state, updates)
        kept = [(path, x) for (path, x), owner in zip(_leaves(state), owners, strict=True) if owner is not None]
        away = [path_string(path) for path, x in kept if not in_host(x)]
        if away and (len(away) < len(kept) or not fallback):
            raise ValueError(
                f"expected the optimizer's state in the host's memory, but {', '.join(away[:3])} is on the device; "
                "put it back by jax.device_put(x, jax.memory.Space.Host), also where its sharding says pinned_host, as "
                "it does after Orbax has restored it"
            )
        step = lambda *args: _step(inner, *args, **extra)
        if len(away) == len(kept):
            return step(updates, state, params, finite)
        return _streamed(step, (updates, state, params, finite), owners)

    return optax.GradientTransformationExtraArgs(init, update)


def in_host(x) -> bool:
    """Whether an array, or the one that a tracer stands for, is in the host's memory."""
    return _space(x) == Space.Host


def results_in_host(fn: Callable, *args) -> Any:
    """For every array of `fn(*args)` whether it is in the host's memory; from shapes, nothing is computed."""
    found = []

    def noting(*args):
        result = fn(*args)
        found.append(jax.tree.map(in_host, result))
        return result

    jax.eval_shape(noting, *args)
    return found[0]


def _step(inner, updates, state, params, finite, **extra) -> tuple[Any, Any]:
    new, after = inner.update(updates, state, params, **extra)
    if finite is None:
        return new, after
    keep = lambda old, changed: jnp.where(finite, changed, old)
    return jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new), jax.tree.map(keep, state, after)


def _abstract(tree):
    """The tree as if it were on the device."""
    avals = jax.tree.map(jax.typeof, tree)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), avals)


def _lacking(params) -> str | None:
    """Which device has no pinned host memory; None where all have."""
    for device in _devices(params):
        kinds = sorted(memory.kind for memory in device.addressable_memories())
        if "pinned_host" not in kinds:
            return f"{device.device_kind} of platform {device.platform!r} has {', '.join(kinds) or 'none'}"
    return None


def _devices(params) -> list[Any]:
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    return list({d for s in shardings for d in getattr(s, "device_set", ())}) or jax.devices()[:1]


def _owners(state, params) -> list[int | None]:
    """For each leaf of the state the parameter whose shape it has and with whose path its own ends."""
    leaves = _leaves(params)
    known = {(tuple(path), leaf.shape): k for k, (path, leaf) in enumerate(leaves) if leaf.ndim}
    owners: list[int | None] = []
    for path, leaf in _leaves(state):
        ends = [tuple(path[start:]) for start in range(len(path) + 1)]
        owner = next((known[end, leaf.shape] for end in ends if (end, leaf.shape) in known), None)
        if owner is None and leaf.ndim and any(leaf.shape == shape for _, shape in known):
            raise ValueError(
                f"the optimizer's state {path_string(path)} {leaf.shape} is shaped like a parameter, but its path ends "
                "like none's: offload cannot tell how it is sharded; wrap the transformations whose state it is not"
            )
        owners.append(owner)
    return owners


def _placed(optimizer, params, shapes, owners) -> Any:
    """The optimizer's first state, each array where it belongs; abstract where the parameters are."""
    leaves = jax.tree.leaves(params)
    shardings = [None if owner is None else _host_sharding(leaves[owner]) for owner in owners]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        rest = next((NamedSharding(s.mesh, PartitionSpec()) for s in shardings if isinstance(s, NamedSharding)), None)
        made = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s or rest, weak_type=x.weak_type)
            for x, s in zip(jax.tree.leaves(shapes), shardings, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(shapes), made)

    def first(params):
        values = jax.tree.leaves(optimizer.init(params))
        return [x if o is None else jax.device_put(x, Space.Host) for x, o in zip(values, owners, strict=True)]

    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        values = first(params)
    else:
        values = jax.jit(first, out_shardings=shardings)(params)
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _host_sharding(leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or isinstance(leaf, jax.core.Tracer):
        return None
    return sharding.with_memory_kind("pinned_host")


class _Plan(NamedTuple):
    """A step as equations: what is computed as it stands, and the parts that are computed on pieces."""

    program: Program
    whole: list[Equation]
    parts: list[Part]
    structure: Any


def _plan(step, args, owners) -> _Plan:
    """The step at abstract `(updates, state, params, finite)`, all on the device.

    Raises:
        ValueError: a step that is not elementwise, or that changes shapes or dtypes of its state.
    """
    updates, state, params, _ = args
    program, structure = trace(step, *args)
    kinds = [(program.avals[n].shape, program.avals[n].dtype) for n in program.outputs]
    count = len(jax.tree.leaves(updates))
    before = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    if structure != jax.tree.structure((updates, state)) or kinds[count:] != before:
        raise ValueError(
            "expected an optimizer that gives back its state in the structure, shapes and dtypes it came in"
        )
    belongs = [*range(count), *owners, *range(len(jax.tree.leaves(params)))]
    chosen = [n for n, owner in zip(program.inputs, belongs, strict=False) if owner is not None]
    chosen = [n for n in chosen if program.avals[n].ndim]
    paged = [n for n, owner in zip(program.inputs[count:], owners, strict=False) if owner is not None]
    ties = zip(program.inputs, program.outputs, strict=False)  # a result is written over the argument in its place
    try:
        return _Plan(program, *parts_of(program, chosen, paged, ties), structure)
    except NotElementwise as error:
        raise ValueError(
            "offload updates its state in pieces, for which an optimizer must use it number by number, but "
            f"{error} takes {program.avals[error.value].str_short()}, which comes from the state, as a whole; wrap the "
            "elementwise part of it alone, as in optax.chain(transformation, jpeft.offload(optax.adamw(1e-3)))"
        ) from None


def _streamed(step, args, owners) -> tuple[Any, Any]:
    """`step(*args)`, every part of it computed on pieces, one after the other."""
    plan = _plan(step, _abstract(args), owners)
    program = plan.program
    values, scalars = compute(program, plan.whole, dict(zip(program.inputs, jax.tree.leaves(args), strict=True)))
    results = [values.get(number) for number in program.outputs]
    for part in plan.parts:
        for k, array in _through(program, part, values, scalars).items():
            results[k] = array
    updates, state = jax.tree.unflatten(plan.structure, results)
    leaves = [
        x if owner is None else _to(Space.Host, x) for x, owner in zip(jax.tree.leaves(state), owners, strict=True)
    ]
    return updates, jax.tree.unflatten(jax.tree.structure(state), leaves)


def _through(program: Program, part: Part, values: dict[int, Any], scalars: dict[int, Any]) -> dict[int, Any]:
    """The results that a part computes, by their place, each written over the argument in the same place."""
    made = {number for equation in part.equations for number in equation.outputs}
    written = {k: number for k, number in enumerate(program.outputs) if number in made}
    over = {k: program.inputs[k] for k in written if _same_dtype(program, program.inputs[k], written[k])}
    buffers = {k: values[over[k]] if k in over else jnp.zeros_like(program.avals[n]) for k, n in written.items()}
    place = {number: k for k, number in over.items()}

    def piece(buffers, start, size: int):
        def read(number: int):
            if number in scalars:
                return scalars[number]
            x = buffers[place[number]] if number in place else values[number]
            return _to(Space.Device, lax.dynamic_slice_in_dim(x, start, size)) if x.ndim else x

        new = part.run(program.avals, read, written.values())
        put = lambda k, x: lax.dynamic_update_slice_in_dim(x, _to(_space(x), new[written[k]]), start, 0)
        return {k: put(k, x) for k, x in buffers.items()}

    if not written:
        return {}
    shape = program.avals[next(iter(written.values()))].shape
    if math.prod(shape) <= SMALL or not any(map(in_host, buffers.values())):
        return piece(buffers, 0, shape[0])
    size = _rows(shape)
    count, left = divmod(shape[0], size)
    if count == 1:  # a loop that XLA cannot see through: it would fetch the arrays of all parameters at once
        count = lax.optimization_barrier(jnp.int32(1))
    buffers = lax.fori_loop(0, count, lambda i, b: piece(b, i * size, size), buffers)
    return piece(buffers, shape[0] - left, left) if left else buffers


def _rows(shape: tuple[int, ...]) -> int:
    """How much of the leading axis is on the device at once. The last two axes are tiled on a TPU and are not cut."""
    leading, *rest = shape
    return leading if len(rest) < 2 else max(1, min(leading, PIECE // math.prod(rest)))


def _same_dtype(program: Program, a: int, b: int) -> bool:
    return program.avals[a].dtype == program.avals[b].dtype


def _space(x) -> Space:
    return jax.typeof(x).memory_space


def _to(space: Space, x):
    return x if _space(x) == space else jax.device_put(x, space)
