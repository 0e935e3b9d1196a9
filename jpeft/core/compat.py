"""The one file that knows which JAX release is running.

Jaxprs are public, but the way an equation keeps its parameters changes between releases. Everything that
the interpreter (`lift`) and the tracer (`find_sites`) need from an equation is asked here.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

__all__ = [
    "Literal",
    "bind",
    "context",
    "jaxprs_of",
    "scan_split",
    "open_jaxpr",
    "shard_map_parameters",
    "source_line",
    "trace",
    "trace_context",
]


def trace(fn, *args) -> tuple[Any, list[Any], Any]:
    """`(jaxpr, constants, output structure)` of `fn` at abstract or concrete `args`."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts = open_jaxpr(closed)
    return jaxpr, consts, jax.tree.structure(shape)


def open_jaxpr(jaxpr) -> tuple[Jaxpr, list[Any]]:
    """An equation's sub-jaxpr and its constants: JAX 0.10 keeps two classes, JAX 0.12 has merged them."""
    if isinstance(jaxpr, ClosedJaxpr):  # on JAX 0.12 every jaxpr is one, its own `.jaxpr`, and holds its constants
        inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
        return inner, list(jaxpr.consts)
    return jaxpr, []


def jaxprs_of(eqn: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs among an equation's parameters: a body, branches, a condition."""
    values = [x for v in eqn.params.values() for x in (v if isinstance(v, (tuple, list)) else (v,))]
    return [open_jaxpr(x)[0] for x in values if isinstance(x, (Jaxpr, ClosedJaxpr))]


def scan_split(eqn: JaxprEqn) -> tuple[int, int]:
    """`(number of constants, number of carried values)` among a scan's operands."""
    if "ft_in" in eqn.params:  # JAX 0.12: a flat tree of (constants, carry, scanned)
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts.vals), len(carry.vals)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def shard_map_parameters(eqn: JaxprEqn) -> tuple[list[Any], dict[str, Any]]:
    """A shard_map's specs of its operands, and the other keywords of `jax.shard_map` that make it again."""
    params = eqn.params
    options = {"mesh": params["mesh"], "out_specs": list(params["out_specs"]), "check_vma": params["check_vma"]}
    return list(params["in_specs"]), {**options, "axis_names": params["newly_manual_axes"]}


def context(eqn: JaxprEqn):
    """A context manager under which what is traced carries the equation's source line and name scope."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)


def bind(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """Evaluate one equation on ordinary values; its outputs as a list."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions: tuple = ()
    if isinstance(params, tuple):  # before JAX 0.10.1: (functions, parameters)
        functions, params = params
    with context(eqn), eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def source_line(eqn: JaxprEqn) -> str:
    """Where in the user's code the equation comes from: `file:line (function)`."""
    return source_info_util.summarize(eqn.source_info)


def trace_context() -> tuple:
    """What besides its arguments decides how a function is traced: part of the key under which traces are kept."""
    config = jax.config
    flags = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    return (*(getattr(config, flag) for flag in flags), jax.sharding.get_abstract_mesh())
