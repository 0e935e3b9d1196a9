"""Sites: the places where a function uses its parameters, as `find_sites` finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["AttentionSite", "Site", "Sites"]


@dataclass(frozen=True)
class Site:
    """One use of one parameter.

    Attributes:
        path: where the leaf is in the tree, `layers/attn/query/kernel`.
        kind: `dense`, `embedding`, `conv`, `experts`, `scale`, `bias`, `attention` or `other`.
        shape, dtype: the leaf's.
        axes: one letter per axis: `i` contracted, `o` output, `b` batch (experts), `s` stacked (scanned layers).
        calls: how often one application of the function uses it: in a `cond` the branch that uses it most, in a `while`
            one turn, as their number is not known.
        flops: floating-point operations of those uses (a multiply-add counts two).
        head: whether it maps to a vocabulary (as many outputs as an embedding has rows).
        line: where in the model's code.
        channels: of a convolution, the axis of its input channels, counted from the last (-2 in HWIO, -3 in OIHW).
        inputs_from: paths of the parameters whose products make its inputs, with no product but attention in between.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    axes: str
    calls: int
    flops: int
    head: bool = False
    line: str = ""
    channels: int | None = None
    inputs_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionSite(Site):
    """A call of `jpeft.attention`, at the path of the kernel that makes its queries; `axes` are that kernel's.

    Attributes:
        key, value: paths of the kernels that make its keys and values; empty where no one kernel does.
        heads, kv_heads, head_dim, value_dim: sizes of the call.
    """

    key: str = ""
    value: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0


@dataclass(frozen=True)
class Sites:
    """All uses found, in the order of the function. Iterable; prints as a table."""

    uses: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)

    def __getitem__(self, path: str) -> Site:
        for site in self.uses:
            if site.path == path:
                return site
        raise KeyError(f"no site {path!r}; the sites are {', '.join(s.path for s in self.uses)}")

    @property
    def paths(self) -> list[str]:
        return [s.path for s in self.uses]

    def __str__(self) -> str:
        rows = [("path", "kind", "shape", "axes", "dtype", "calls", "MFLOP")]
        for s in self.uses:
            kind = s.kind + (" (head)" if s.head else "")
            shape = "×".join(map(str, s.shape)) or "scalar"
            flops = f"{s.flops / 1e6:,.3f}" if s.flops else "-"
            rows.append((s.path, kind, shape, s.axes, str(s.dtype), str(s.calls), flops))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        cells = [[(str.rjust if k > 4 else str.ljust)(c, widths[k]) for k, c in enumerate(row)] for row in rows]
        lines = ["  ".join(row).rstrip() for row in cells]
        lines.insert(1, "─" * max(map(len, lines)))
        lines.append("axes: i contracted, o output, b batch (experts), s stacked (scanned layers)")
        return "\n".join(lines)
