"""A function whose results depend, number by number, on the same places of its arguments, run piece by piece.

The proof is read from the function's jaxpr: from the arguments that may never be whole, every equation is one of
`ELEMENTWISE` on arrays of one shape. What depends on none of them (a schedule, a bias correction, the norm of all
gradients) may be anything, and is computed once, as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from jpeft.core import compat

__all__ = ["ELEMENTWISE", "NotElementwise", "Equation", "Part", "Program", "compute", "parts_of", "trace"]

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj convert_element_type copy copy_p "
    "cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le log log1p logistic lt "
    "max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_SAME_SHAPE = ("broadcast_in_dim", "reshape")  # elementwise where they change nothing


class NotElementwise(ValueError):
    """An equation that looks at more than one place; `value` is one that it reads."""

    def __init__(self, eqn, value: int):
        line = compat.source_line(eqn)  # empty where no frame but JAX's own led to it
        super().__init__(f"`{eqn.primitive.name}`{line and f' at {line}'}")
        self.value = value


class Equation(NamedTuple):
    """An equation between numbered values."""

    eqn: Any
    inputs: list[int]
    outputs: list[int]


@dataclasses.dataclass
class Program:
    """A jaxpr with its calls inlined; values are numbered, `known` holds the constants among them."""

    avals: list[Any] = dataclasses.field(default_factory=list)
    known: dict[int, Any] = dataclasses.field(default_factory=dict)
    inputs: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)
    equations: list[Equation] = dataclasses.field(default_factory=list)

    def new(self, aval) -> int:
        """The number of a further value."""
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, aval, value) -> int:
        """The number of a further value that is known."""
        self.known[number := self.new(aval)] = value
        return number

    def inline(self, jaxpr, constants, inputs: list[int]) -> list[int]:
        """Add a jaxpr's equations, its arguments being the values `inputs`; the numbers of its results."""
        number = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, constants, strict=True):
            number[variable] = self.constant(variable.aval, value)

        def of(atom) -> int:
            return (
                self.constant(atom.aval, np.asarray(atom.val, atom.aval.dtype))
                if isinstance(atom, compat.Literal)
                else number[atom]
            )

        for eqn in jaxpr.eqns:
            given = [of(atom) for atom in eqn.invars]
            called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _CALLS and called is not None:
                results = self.inline(*compat.open_jaxpr(called), given)
            else:
                results = [self.new(variable.aval) for variable in eqn.outvars]
                self.equations.append(Equation(eqn, given, results))
            number.update(zip(eqn.outvars, results, strict=True))
        return [of(atom) for atom in jaxpr.outvars]


def trace(fn: Callable, *args) -> tuple[Program, Any]:
    """`(program, output structure)` of `fn` at abstract or concrete `args`, whose leaves are the program's inputs."""
    jaxpr, constants, structure = compat.trace(fn, *args)
    program = Program()
    program.inputs = [program.new(variable.aval) for variable in jaxpr.invars]
    program.outputs = program.inline(jaxpr, constants, program.inputs)
    return program, structure


@dataclasses.dataclass
class Part:
    """Equations on arrays of one shape, connected by them, and all values of that shape among what they touch."""

    values: set[int]
    equations: list[Equation]

    def run(self, avals: list[Any], read: Callable[[int], Any], wanted: Iterable[int]) -> dict[int, Any]:
        """The wanted values at some places, from `read(value)`: at those places, or without axes where equal at all."""
        values: dict[int, Any] = {}
        made = {out for equation in self.equations for out in equation.outputs}

        def get(number: int):
            if number not in values:
                assert number not in made, "equations come in order"
                values[number] = read(number)
            return values[number]

        for eqn, inputs, outputs in self.equations:
            if eqn.primitive.name in _SAME_SHAPE:
                values[outputs[0]] = get(inputs[0])
                continue
            given = [get(number) for number in inputs]
            shape = next(x.shape for n, x in zip(inputs, given, strict=True) if n in self.values)
            whole = [avals[n].ndim and not x.ndim for n, x in zip(inputs, given, strict=True)]
            given = [lax.broadcast(x, shape) if flat else x for flat, x in zip(whole, given, strict=True)]
            values.update(zip(outputs, compat.bind(eqn, given), strict=True))
        return {number: get(number) for number in wanted}


def parts_of(
    program: Program, chosen: Iterable[int], paged: Iterable[int], ties: Iterable[tuple[int, int]]
) -> tuple[list[Equation], list[Part]]:
    """`(equations to compute as they stand, parts)` of a program whose `chosen` values are taken in pieces.

    An equation that takes a chosen value as a whole is computed as it stands, and what leads to it twice, unless it
    depends on one of the `paged`, which never exist as a whole. Tied values come into one part.

    Raises:
        NotElementwise: what depends on a paged value, used otherwise than number by number.
    """
    group = {number: number for number in chosen}
    hosted = set(paged)

    def root(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    pieces: list[Equation] = []
    whole: set[int] = set()
    needed: set[int] = set()
    for k, equation in enumerate(program.equations):
        touched = [number for number in equation.inputs if number in group]
        if hosted.intersection(equation.inputs):
            hosted.update(equation.outputs)
        if touched and _elementwise(program, equation, touched):
            for number in (*touched[1:], *equation.outputs):
                group[root(group.setdefault(number, number))] = root(touched[0])
            pieces.append(equation)
        elif hosted.intersection(equation.inputs):
            raise NotElementwise(equation.eqn, next(n for n in equation.inputs if n in hosted))
        else:
            whole.add(k)
            needed.update(equation.inputs)
    for k, equation in reversed(list(enumerate(program.equations))):
        if needed.intersection(equation.outputs):
            whole.add(k)
            needed.update(equation.inputs)
    for a, b in ties:
        if a in group and b in group:
            group[root(a)] = root(b)
    parts = {number: Part(set(), []) for number in group if root(number) == number}
    for number in group:
        parts[root(number)].values.add(number)
    for equation in pieces:
        parts[root(equation.outputs[0])].equations.append(equation)
    return [equation for k, equation in enumerate(program.equations) if k in whole], list(parts.values())


def _elementwise(program: Program, equation: Equation, touched: list[int]) -> bool:
    shape = program.avals[touched[0]].shape
    return (
        equation.eqn.primitive.name in (*ELEMENTWISE, *_SAME_SHAPE)
        and all(program.avals[n].shape == shape for n in (*touched, *equation.outputs))
        and all(program.avals[n].shape in ((), shape) for n in equation.inputs)
    )


def compute(
    program: Program, equations: list[Equation], given: dict[int, Any]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """`(values, scalars)` of equations as they stand; `scalars` are those of a shape that are one number throughout."""
    values, scalars = {**program.known, **given}, {}
    for eqn, inputs, outputs in equations:
        operands = [values[number] for number in inputs]
        values.update(zip(outputs, compat.bind(eqn, operands), strict=True))
        if eqn.primitive.name == "broadcast_in_dim" and not program.avals[inputs[0]].ndim:
            scalars[outputs[0]] = operands[0]
    return values, scalars
