"""What a compiled program takes: memory, collectives, floating-point operations. Read, not measured: nothing runs."""

from __future__ import annotations

import collections
import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from jpeft.core import compat

__all__ = ["Collective", "Memory", "collectives", "flops", "memory", "per_device"]

_BITS = {"pred": 8, "token": 0}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: arguments, results (those in the arguments' place not counted), temporaries, the program
    itself; `peak` of all at once; `host` what lies in the host's memory."""

    arguments: int
    results: int
    temporaries: int
    program: int
    peak: int
    host: int


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices: `count` of them in a run, with `bytes` of results on each device in all."""

    kind: str
    dtype: str
    count: int
    bytes: int


def memory(compiled) -> Memory:
    """The memory of a compiled program, as its compiler planned it."""
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    parts = m.argument_size_in_bytes, results, m.temp_size_in_bytes, m.generated_code_size_in_bytes
    host = m.host_argument_size_in_bytes + m.host_output_size_in_bytes + m.host_temp_size_in_bytes
    host -= m.host_alias_size_in_bytes
    return Memory(*parts, max(getattr(m, "peak_memory_in_bytes", 0), sum(parts[:3])) + parts[3], host)


def collectives(text: str) -> list[Collective]:
    """The exchanges in an optimised HLO module, those in loops as often as they turn.

    An exchange that the compiler spread over several fusions, to overlap it with other work, counts once.
    """
    bodies = _computations(text)
    times = _times(bodies, next((n for n, (entry, _) in bodies.items() if entry), ""))
    count, size = collections.Counter(), collections.Counter()
    fused = {
        n for _, lines in bodies.values() for line in lines for n in re.findall(r" fusion\(.*calls=%?([\w.\-]+)", line)
    }
    seen = set()
    for name, (_, lines) in bodies.items():
        for line in lines:
            # Of one in two halves the second has the results alone; what the first has differs from kind to kind.
            found = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(?:-done)?\(", line)
            channel = re.search(r"channel_id=(\d+)", line) if name in fused else None
            if found is None or not times[name] or channel and channel[1] in seen:
                continue
            if channel:
                seen.add(channel[1])
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                count[found[2], dtype] += times[name]
                size[found[2], dtype] += times[name] * _bytes(dtype, dims)
    return [Collective(kind, dtype, n, size[kind, dtype]) for (kind, dtype), n in sorted(count.items())]


def flops(fn, *args) -> int:
    """Floating-point operations of the products in one call of `fn` (a multiply-add counts two), loops counted out.

    Args:
        args: arrays or their shapes; `fn` is traced, nothing runs.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, inside = eqn.primitive.name, compat.jaxprs_of(eqn)
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif name == "ragged_dot_general":
            rows, depth = eqn.invars[0].aval.shape[-2:]
            total += 2 * rows * depth * eqn.invars[1].aval.shape[-1]
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            out_axis = numbers.rhs_spec[0]
            depth = math.prod(n for k, n in enumerate(kernel) if k != out_axis)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif name == "cond":
            total += max(map(_flops, inside), default=0)
        elif inside:
            turns = eqn.params["length"] if name == "scan" else 1
            total += turns * sum(map(_flops, inside))
    return total


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """`{name: (whether it is the entry, its lines)}`."""
    found: dict[str, tuple[bool, list[str]]] = {}
    name = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line) if not line.startswith(" ") else None
        if head:
            name = head[2]
            found[name] = (bool(head[1]), [])
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name][1].append(line)
    return found


def _times(bodies, entry: str) -> collections.Counter[str]:
    """How often each computation runs in one run of the module."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, (_, lines) in bodies.items():
        for line in lines:
            if re.search(r" async-(?:update|done)\(", line):
                continue  # what was called when it began
            turns = _turns(line, bodies)
            for group in re.findall(
                r"(?:body|calls|to_apply|called_computations|branch_computations)=(\{[^}]*|\S+)", line
            ):
                calls[name] += [(callee, turns) for callee in re.findall(r"[\w.\-]+", group) if callee in bodies]
    times: collections.Counter[str] = collections.Counter()

    def run(name: str, often: int) -> None:
        times[name] += often
        for callee, turns in calls.get(name, ()):
            run(callee, often * turns)

    if entry:
        run(entry, 1)
    return times


def _turns(line: str, bodies) -> int:
    """How often the loop of a line turns: what the compiler says, else the constant that its condition counts up to, as
    `scan` does from zero; one where neither is seen, and where there is no loop."""
    condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
    if condition is None:
        return 1
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(said[1])
    counted = bodies.get(condition[1], (False, []))[1]
    found = [int(n) for line in counted for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)]
    return max(found, default=1)


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS[dtype] if dtype in _BITS else int((re.search(r"\d+", dtype) or ["32"])[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def per_device(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays on one device, as the shardings lay them; 4-bit numbers count as such."""

    def size(x, sharding) -> int:
        bits = 4 if x.dtype.name in ("uint4", "int4") else 8 * x.dtype.itemsize
        return math.prod(sharding.shard_shape(x.shape)) * bits // 8

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))
