"""The operations that a Weight can take part in: a product, a grouped product, a convolution, a row lookup, a sum.

Each is a view of one jaxpr equation, with the same verbs, so that a method is written once for all of them:

    base(x, array)    the equation itself, on a dense array of the leaf's shape
    inputs(x)         x in the order of the matrix form: (*batch, *free, in)         (not for convolutions, lookups)
    map_inputs(x, fn) x after `fn` on that form, in x's own order                    (not for convolutions, lookups)
    as_inputs(h)      other inputs h (*batch, *free, in) in x's own order; free axes that h lacks have size one
    contract(x, m)    x with a matrix (*batch, in, k) in place of the leaf            -> (*batch, *free, k)
    mix(h, m)         h (*batch, *free, k) with a matrix (*batch, k, out)             -> (*batch, *free, out)
    mix_blocks(h, m)  h (*batch, *free, n, k) with n of them (*batch, n, k, out)      -> (*batch, *free, n, out)
    restore(y)        y (*batch, *free, out) in the shape of the equation's result
    map_outputs(y,fn) the equation's result after `fn` on its (*batch, *free, out)
    spread(v)         a vector for each output (or input), (*batch, n), so that it broadcasts to (*batch, *free, n)

    operand           x as the model made it, whatever outer Weights made of it since
    reached           the notes that it brought (see `Weight.notes`)

`transposed` says that the equation contracts the leaf's output axes (a tied head): then `in` and `out` change places.
An equation that does not contract all inputs or all outputs of the leaf raises `NotAnOp`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core.layout import Layout

__all__ = ["NotAnOp", "Dot", "RaggedDot", "Gather", "Conv", "Add"]


class NotAnOp(Exception):
    """The equation uses the leaf in a way that its axes' letters do not describe."""


@dataclass(frozen=True)
class _Op:
    layout: Layout
    labels: str  # one letter per base axis
    dtype: Any  # of the weight operand in the equation
    params: dict = field(hash=False)
    x_ndim: int = 2
    operand: Any = field(default=None, compare=False, repr=False)
    reached: tuple = field(default=(), compare=False, repr=False)

    def _side(self, contracted: set[int]) -> bool:
        """Whether the contracted base axes are the outputs (True) or the inputs (False)."""
        sizes = self.layout.base_shape
        of = {c: {k for k, label in enumerate(self.labels) if label == c and sizes[k] != 1} for c in "io"}
        contracted = {k for k in contracted if sizes[k] != 1}
        if contracted == of["i"]:
            return False
        if contracted == of["o"]:
            return True
        raise NotAnOp(f"axes {sorted(contracted)} are contracted; the leaf's axes are {self.labels!r}")

    def _base_parts(self, letter: str) -> list[tuple[int, int]]:
        cuts = self.layout.cuts
        return [
            (k, n) for k, c in enumerate(self.labels) if c == letter for n in range(len(cuts[k])) if cuts[k][n] != 1
        ]

    def _dense(self, array):
        return self.layout.apply(array.astype(self.dtype))

    def spread(self, v):
        return v.reshape(*(1,) * (self.x_ndim - 1), v.shape[-1])

    def inputs(self, x):
        raise NotAnOp("the inputs are not a plain product's")

    def map_inputs(self, x, fn):
        return fn(self.inputs(x))

    def map_outputs(self, y, fn):
        return self.restore(fn(self.outputs(y)))  # type: ignore[attr-defined]

    def mix_blocks(self, h, m):
        return jax.vmap(self.mix, (-2, -3), -2)(h, m)  # type: ignore[attr-defined]

    def _cast(self, x, m):
        return m.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else self.dtype)

    def _split_out(self, y, free_axes, letter: str):
        """The last axis of `y`, merged outputs in base order, as the view axes `free_axes`."""
        parts = self._base_parts(letter)
        size = self.layout.size
        wanted = [p for axis in free_axes for p in self.layout.axes[axis] if size(p) != 1]
        if sorted(wanted) != sorted(parts):
            raise NotAnOp("only part of the leaf's free axes is left")
        lead = y.shape[:-1]
        if wanted != parts:
            y = y.reshape(*lead, *map(size, parts))
            order = [len(lead) + parts.index(p) for p in wanted]
            y = jnp.transpose(y, [*range(len(lead)), *order])
        return y.reshape(*lead, *(self.layout.shape[a] for a in free_axes))

    def _merge_out(self, y, free_axes, letter: str):
        """The inverse of `_split_out`: the last axes of `y`, the view axes `free_axes`, as one in base order."""
        parts = self._base_parts(letter)
        wanted = [p for axis in free_axes for p in self.layout.axes[axis] if self.layout.size(p) != 1]
        if sorted(wanted) != sorted(parts):
            raise NotAnOp("only part of the leaf's free axes is left")
        lead = y.shape[: y.ndim - len(free_axes)]
        if wanted != parts:
            y = y.reshape(*lead, *map(self.layout.size, wanted))
            y = jnp.transpose(y, [*range(len(lead)), *(len(lead) + wanted.index(p) for p in parts)])
        return y.reshape(*lead, -1)


@dataclass(frozen=True)
class Dot(_Op):
    """`dot_general`; `side` is the weight's place among the two operands."""

    side: int = 1

    def __post_init__(self):
        self.transposed  # noqa: B018  checks that this is an op
        for axis in self._w_batch:
            if self.layout.base_axis(axis) is None:
                raise NotAnOp("a batch axis is merged with another")
        whole = {self.layout.base_axis(a) for a in self._w_batch}
        if whole != {k for k, c in enumerate(self.labels) if c in "sb" and self.layout.base_shape[k] != 1}:
            raise NotAnOp("the leaf's stack and batch axes are not the product's batch axes")

    @property
    def _dims(self):
        (left, right), (left_batch, right_batch) = self.params["dimension_numbers"]
        if self.side == 1:
            return tuple(left), tuple(right), tuple(left_batch), tuple(right_batch)
        return tuple(right), tuple(left), tuple(right_batch), tuple(left_batch)

    @property
    def _w_batch(self):
        return self._dims[3]

    @property
    def transposed(self) -> bool:
        return self._side({p[0] for axis in self._dims[1] for p in self.layout.axes[axis]})

    @property
    def _x_free(self):
        used = {*self._dims[0], *self._dims[2]}
        return [k for k in range(self.x_ndim) if k not in used]

    @property
    def _batch_order(self) -> list[int]:
        """The product's batch axes in the order of the leaf's own axes."""
        return sorted(range(len(self._w_batch)), key=lambda n: self.layout.base_axis(self._w_batch[n]) or 0)

    def base(self, x, array):
        operands = (x, self._dense(array)) if self.side == 1 else (self._dense(array), x)
        return lax.dot_general(*operands, **self.params)

    def inputs(self, x):
        cx, cw, bx, _ = self._dims
        order = [bx[n] for n in self._batch_order] + self._x_free + list(cx)
        if order != list(range(x.ndim)):
            x = jnp.transpose(x, order)
        lead = x.shape[: x.ndim - len(cx)]
        parts = [p for axis in cw for p in self.layout.axes[axis] if self.layout.size(p) != 1]
        if parts != sorted(parts):
            x = x.reshape(*lead, *map(self.layout.size, parts))
            x = jnp.transpose(x, [*range(len(lead)), *(len(lead) + parts.index(p) for p in sorted(parts))])
        return x if x.ndim == len(lead) + 1 else x.reshape(*lead, -1)

    def map_inputs(self, x, fn):
        return self.as_inputs(fn(self.inputs(x)))

    def as_inputs(self, h):
        cx, cw, bx, _ = self._dims
        lacking = len(bx) + len(self._x_free) + 1 - h.ndim
        lead = (*h.shape[: len(bx)], *(1,) * lacking, *h.shape[len(bx) : -1])
        parts = [p for axis in cw for p in self.layout.axes[axis] if self.layout.size(p) != 1]
        if parts != sorted(parts):
            h = h.reshape(*lead, *map(self.layout.size, sorted(parts)))
            h = jnp.transpose(h, [*range(len(lead)), *(len(lead) + sorted(parts).index(p) for p in parts)])
        h = h.reshape(*lead, *(self.layout.shape[axis] for axis in cw))
        order = [bx[n] for n in self._batch_order] + self._x_free + list(cx)
        return h if order == list(range(h.ndim)) else jnp.transpose(h, [order.index(k) for k in range(h.ndim)])

    def contract(self, x, m):
        return self.mix(self.inputs(x), m)

    def mix(self, h, m):
        m = self._cast(h, m)
        if m.ndim - 2 > len(self._w_batch):  # a stack or batch axis of size one that a reshape has hidden
            shown = {self.layout.base_axis(a) for a in self._w_batch}
            lead = [k for k, c in enumerate(self.labels) if c in "sb"]
            m = m.squeeze([n for n, k in enumerate(lead) if k not in shown])
        batch = tuple(range(m.ndim - 2))
        dims = (((h.ndim - 1,), (m.ndim - 2,)), (batch, batch))
        return lax.dot_general(h, m, dims, precision=self.params.get("precision"))

    def restore(self, y):
        y = self._split_out(y, self._w_free, "i" if self.transposed else "o")
        order = self._result_order
        return y if order == list(range(y.ndim)) else jnp.transpose(y, order)

    def outputs(self, y):
        order = self._result_order
        if order != list(range(y.ndim)):
            y = jnp.transpose(y, [order.index(k) for k in range(y.ndim)])
        return self._merge_out(y, self._w_free, "i" if self.transposed else "o")

    @property
    def _w_free(self) -> list[int]:
        used = {*self._dims[1], *self._dims[3]}
        return [a for a in range(len(self.layout.axes)) if a not in used]

    @property
    def _result_order(self) -> list[int]:
        """For each axis of the equation's result, its place in `(*batch, *free, *the leaf's free axes)`."""
        batch, free = len(self._w_batch), len(self._x_free)
        x_axes = list(range(batch, batch + free))
        w_axes = list(range(batch + free, batch + free + len(self._w_free)))
        order = [self._batch_order.index(n) for n in range(batch)]
        return order + (x_axes + w_axes if self.side == 1 else w_axes + x_axes)

    def spread(self, v):
        return v.reshape(*v.shape[:-1], *(1 for _ in self._x_free), v.shape[-1])


@dataclass(frozen=True)
class RaggedDot(_Op):
    """`ragged_dot_general` with rows grouped along the first axis of x: x (rows, in), leaf (groups, in, out)."""

    sizes: Any = None  # rows of each group
    rows: int = 0

    def __post_init__(self):
        numbers = self.params["ragged_dot_dimension_numbers"]
        (left, right), batch = numbers.dot_dimension_numbers
        rows, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
        plain = (tuple(left), tuple(map(tuple, batch)), rows, groups) == ((1,), ((), ()), (0,), (0,))
        whole = self.layout.base_axis(0)
        if not plain or len(right) != 1 or whole is None or self.labels[whole] != "b":
            raise NotAnOp("only x (rows, in) with a leaf of one group axis is known")
        object.__setattr__(self, "_right", right[0])
        self.transposed  # noqa: B018  checks that this is an op

    @property
    def transposed(self) -> bool:
        return self._side({p[0] for p in self.layout.axes[self._right]})  # type: ignore[attr-defined]

    def base(self, x, array):
        return lax.ragged_dot_general(x, self._dense(array), self.sizes, **self.params)

    def inputs(self, x):
        parts = [p for p in self.layout.axes[self._right] if self.layout.size(p) != 1]  # type: ignore[attr-defined]
        if parts != sorted(parts):
            raise NotAnOp("the contracted axes are permuted")
        return x

    def contract(self, x, m):
        return self.mix(self.inputs(x), m)

    def mix(self, h, m):
        return lax.ragged_dot(h, self._cast(h, m), self.sizes, precision=self.params.get("precision"))

    def mix_blocks(self, h, m):
        rows, n, k = h.shape
        m = jnp.pad(self._cast(h, m), ((0, 1), (0, 0), (0, 0), (0, 0)))  # rows of no group have a group of zeros
        sizes = jnp.tile(jnp.append(self.sizes, rows - jnp.sum(self.sizes)), n)
        h, m = jnp.swapaxes(h, 0, 1).reshape(n * rows, k), jnp.swapaxes(m, 0, 1).reshape(-1, k, m.shape[-1])
        y = lax.ragged_dot(h, m, sizes, precision=self.params.get("precision"))
        return jnp.swapaxes(y.reshape(n, rows, -1), 0, 1)

    def spread(self, v):
        return jnp.repeat(v, self.sizes, axis=0, total_repeat_length=self.rows)

    def restore(self, y):
        return self._split_out(y, self._w_free, "i" if self.transposed else "o")

    def outputs(self, y):
        return self._merge_out(y, self._w_free, "i" if self.transposed else "o")

    @property
    def _w_free(self) -> list[int]:
        return [a for a in (1, 2) if a != self._right]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Gather(_Op):
    """`gather` of whole rows, an embedding: x holds row numbers `(..., 1)`.

    A mapped lookup of one row gives the starts of all axes `(..., axes)`, clamped; those of whole axes say nothing.
    """

    def __post_init__(self):
        numbers = self.params["dimension_numbers"]
        shape, sizes, starts = self.layout.shape, tuple(self.params["slice_sizes"]), tuple(numbers.start_index_map)
        one = tuple(numbers.collapsed_slice_dims) or tuple(k for k, n in enumerate(sizes) if n != shape[k])
        rows = len(one) == 1 and one[0] in starts and not numbers.operand_batching_dims
        clamped = self.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
        if (
            not rows
            or sizes != tuple(1 if k in one else n for k, n in enumerate(shape))
            or not (starts == one or clamped)
        ):
            raise NotAnOp("only a lookup of whole rows is known")
        object.__setattr__(self, "_row_axis", one[0])
        self.transposed  # noqa: B018  checks that this is an op
        if any(c in "sb" for c in self.labels):
            raise NotAnOp("a stacked embedding is looked up before its layer is taken")

    @property
    def transposed(self) -> bool:
        return self._side({p[0] for p in self.layout.axes[self._row_axis]})  # type: ignore[attr-defined]

    def base(self, x, array):
        return lax.gather(self._dense(array), x, **self.params)

    @property
    def _place(self) -> int:
        return tuple(self.params["dimension_numbers"].start_index_map).index(self._row_axis)  # type: ignore[attr-defined]

    def rows(self, x):
        """The row numbers `(*free)`, as the model gave them: they may lie beyond the leaf."""
        return x[..., self._place]

    def with_rows(self, x, rows):
        """`x` with other row numbers."""
        return x.at[..., self._place].set(rows.astype(x.dtype))

    def contract(self, x, m):
        x = lax.slice_in_dim(x, self._place, self._place + 1, axis=-1)
        numbers = lax.GatherDimensionNumbers((x.ndim - 1,), (0,), (0,))
        keep = {k: v for k, v in self.params.items() if k not in ("dimension_numbers", "slice_sizes")}
        return lax.gather(m.astype(self.dtype), x, numbers, slice_sizes=(1, m.shape[-1]), **keep)

    def mix(self, h, m):
        return h @ m.astype(h.dtype)

    def restore(self, y):
        free = [a for a in range(len(self.layout.axes)) if a != self._row_axis]  # type: ignore[attr-defined]
        y = self._split_out(y, free, "i" if self.transposed else "o")
        if not self.params["dimension_numbers"].collapsed_slice_dims:
            y = jnp.expand_dims(y, y.ndim - len(free) + self._row_axis)  # type: ignore[attr-defined]
            free.append(self._row_axis)  # type: ignore[attr-defined]
        source = tuple(range(y.ndim - len(free), y.ndim))
        return jnp.moveaxis(y, source, self.params["dimension_numbers"].offset_dims)

    def outputs(self, y):
        numbers, row = self.params["dimension_numbers"], self._row_axis  # type: ignore[attr-defined]
        free = [a for a in range(len(self.layout.axes)) if a != row]
        y = jnp.moveaxis(y, numbers.offset_dims, tuple(range(y.ndim - len(numbers.offset_dims), y.ndim)))
        if not numbers.collapsed_slice_dims:
            y = y.squeeze(y.ndim - len(free) - 1 + row)
        return self._merge_out(y, free, "i" if self.transposed else "o")


@dataclass(frozen=True)
class Conv(_Op):
    """`conv_general_dilated` with the leaf as its kernel: window and input channels are `i`, output channels `o`."""

    transposed = False

    def __post_init__(self):
        if self.params["batch_group_count"] != 1 or self.layout != Layout.identity(self.layout.base_shape):
            raise NotAnOp("batch-grouped convolutions and permuted kernels are not known")
        out = self.params["dimension_numbers"].rhs_spec[0]
        if any(c != ("o" if k == out else "i") for k, c in enumerate(self.labels)):
            raise NotAnOp("the leaf's axes are not a kernel's")

    @property
    def groups(self) -> int:
        return self.params["feature_group_count"]

    def base(self, x, array):
        return lax.conv_general_dilated(x, self._dense(array), **self.params)

    def contract(self, x, m):
        numbers = self.params["dimension_numbers"]
        out = numbers.rhs_spec[0]
        window = [n for k, n in enumerate(self.layout.base_shape) if k != out]
        m = jnp.tile(self._cast(x, m), self.groups)  # one copy for each group of channels
        kernel = jnp.moveaxis(m.reshape(*window, m.shape[-1]), -1, out)
        return jnp.moveaxis(lax.conv_general_dilated(x, kernel, **self.params), numbers.out_spec[1], -1)

    def mix(self, h, m):
        m = m.astype(h.dtype)
        if self.groups == 1:
            return h @ m
        grouped = h.reshape(*h.shape[:-1], self.groups, -1)
        y = jnp.einsum("...gr,rgo->...go", grouped, m.reshape(m.shape[0], self.groups, -1))
        return y.reshape(*h.shape[:-1], -1)

    def restore(self, y):
        return jnp.moveaxis(y, -1, self.params["dimension_numbers"].out_spec[1])

    def outputs(self, y):
        return jnp.moveaxis(y, self.params["dimension_numbers"].out_spec[1], -1)


@dataclass(frozen=True)
class Add(_Op):
    """`add` of a bias: all of the leaf's outputs, and its experts, once along axes of x; its other axes of size one."""

    transposed = False

    def __post_init__(self):
        shown = {self.layout.base_axis(axis) for axis in range(len(self.layout.axes))}
        sizes = self.layout.base_shape
        if any(sizes[k] != 1 for k, c in enumerate(self.labels) if c in "si" or (c == "b" and k not in shown)):
            raise NotAnOp("more than one layer's bias is added, or experts that lie along no axis of their own")

    @property
    def _batch(self) -> list[int]:
        """The axes of the leaf's experts, in its own order."""
        known = {self.layout.base_axis(axis): axis for axis in range(len(self.layout.axes))}
        return [known[k] for k, c in enumerate(self.labels) if c == "b" and self.layout.base_shape[k] != 1]

    @property
    def _own(self) -> list[int]:
        used = [axis for axis, parts in enumerate(self.layout.axes) if parts and self.layout.shape[axis] != 1]
        return [axis for axis in used if axis not in self._batch]

    @property
    def _order(self) -> list[int]:
        """The axes of x as `(*batch, *free, *the leaf's outputs)`."""
        taken = {*self._batch, *self._own}
        return [*self._batch, *(k for k in range(self.x_ndim) if k not in taken), *self._own]

    def base(self, x, array):
        return x + self._dense(array)

    def mix(self, h, m):
        m = self._cast(h, m)
        m = m.reshape(*m.shape[m.ndim - 2 - len(self._batch) :])  # stack axes of size one are no axes of x
        batch = tuple(range(m.ndim - 2))
        return lax.dot_general(h, m, (((h.ndim - 1,), (m.ndim - 2,)), (batch, batch)))

    def spread(self, v):
        free = self.x_ndim - len(self._batch) - len(self._own)
        batch = v.shape[v.ndim - 1 - len(self._batch) : -1]
        return v.reshape(*batch, *(1 for _ in range(free)), v.shape[-1])

    def restore(self, y):
        y, order = self._split_out(y, self._own, "o"), self._order
        return jnp.transpose(y, [order.index(k) for k in range(y.ndim)])

    def outputs(self, y):
        return self._merge_out(jnp.transpose(y, self._order), self._own, "o")
