"""Weight: what stands in a parameter tree where a dense leaf stood.

Invariants, for a Weight `w` that stands for a leaf of shape `w.shape` and dtype `w.dtype`:

    w.dense()            is that leaf
    w.apply(op, x)       equals op.base(x, w.dense()), without forming w.dense()

`axes` gives one letter per axis of the leaf: `i` input (contracted), `o` output, `b` batch (experts), `s` stacked
(scanned layers). Leading stack axes are not written, so that a Weight stays valid when `scan` or `vmap` takes one away.
Fields other than `base` are laid out `(*stack, *batch, ...)` with the input axes merged into one and the output axes
merged into one: the *matrix form* `(*stack, *batch, in, out)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "Layer",
    "Weight",
    "Unfrozen",
    "weight",
    "static",
    "apply",
    "array_of",
    "dense",
    "labels_of",
    "to_matrix",
    "from_matrix",
]

W = TypeVar("W", bound="type[Weight]")


def static(default: Any = dataclasses.MISSING, *, kw_only: Literal[True] = True) -> Any:
    """A field that is part of the tree's structure, not an array: hashable, and free of stack axes."""
    return dataclasses.field(default=default, metadata={"static": True}, kw_only=kw_only)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def weight(cls: W) -> W:
    """Make a class of arrays and `static` fields a frozen dataclass and a pytree node."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))


def labels_of(ndim: int, axes: str) -> str:
    """One letter per axis: `axes` with the unwritten leading stack axes put back."""
    return "s" * (ndim - len(axes)) + axes


class Weight:
    """Base of all Weights. A subclass is decorated with `@weight`, has the fields `base` and `axes`, and defines
    `apply` and `dense`.

    Class data:
        FIELDS: field name -> letters of its trailing axes: `i` merged inputs, `o` merged outputs, others its own.
        TRAINABLE: names of the fields that `init` puts in the trainable half.
        SLICEABLE: which of `i` and `o` may be sliced by slicing the fields (the map is linear in them).
        UNSTACKED: names of the fields without stack and batch axes: one array for all layers.
        LEFT_WHOLE: names of the fields that `scan` does not take apart by layers: within it each is a `Layer`.
        SAVED: names of the frozen fields that belong into a saved adapter, as nothing can make them again.
        UP: names of the trainable fields that map up from a rank to the outputs; they can have a rate of their own.
    """

    FIELDS: ClassVar[dict[str, str]] = {}
    TRAINABLE: ClassVar[frozenset[str]] = frozenset()
    SLICEABLE: ClassVar[str] = ""
    UNSTACKED: ClassVar[frozenset[str]] = frozenset()
    LEFT_WHOLE: ClassVar[frozenset[str]] = frozenset()
    SAVED: ClassVar[frozenset[str]] = frozenset()
    UP: ClassVar[frozenset[str]] = frozenset()

    base: Any
    axes: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def labels(self) -> str:
        return labels_of(self.ndim, self.axes)

    def apply(self, op, x) -> jax.Array:
        """The result of `op` (see `core/ops.py`) on `x` and this weight."""
        raise TypeError(f"{type(self).__name__} defines no apply")

    def added(self, op, x) -> jax.Array | None:
        """`x` plus this leaf, a bias, where the equation adds it; None where the dense bias is all that it takes.

        Default: what the Weight that it holds says, of the bias as this one changes it; nothing where none defines it.
        """
        changing, acting = [self], self.base
        while isinstance(acting, Weight) and type(acting).added is Weight.added:
            changing, acting = [*changing, acting], acting.base
        if not isinstance(acting, Weight):
            return None
        bias = acting.base
        for outer in reversed(changing):
            bias = outer.replace(base=bias)
        return acting.replace(base=bias).added(op, x)

    def notes(self, op, reached: tuple) -> tuple:
        """What the next attention call is to know of this leaf's output, given what the input brought (`reached`).

        A note is a pytree. One that has `attend(call) -> call` (see `attention.Call`) acts on the call; the others are
        there for it to read, and for the Weights on the way (`op.reached`). No note travels past the call but one whose
        class says `beyond_attention = True`. Default: what it holds says; a plain array passes on what came.
        """
        return self.base.notes(op, reached) if isinstance(self.base, Weight) else reached

    def dense(self) -> jax.Array:
        """The leaf that this Weight stands for: its shape, its dtype."""
        raise TypeError(f"{type(self).__name__} defines no dense")

    def trainable_fields(self) -> frozenset[str]:
        """Names of this instance's trainable fields."""
        return self.TRAINABLE

    def tied(self) -> dict[str, str]:
        """`{field: name}` of the fields that the method keeps once for several leaves; None until `bind` fills them."""
        return {}

    def fitted(self) -> Weight:
        """The Weight with shared arrays cut to its own size, so that all its fields are as `FIELDS` says.

        Default: they have that size. `lift` takes the Weights of its arguments so; `dense` must not rely on it. It is
        also the place to make, once for a run, what every use of the leaf needs; the result may be of another class.
        """
        base = self.base.fitted() if isinstance(self.base, Weight) else self.base
        return self if base is self.base else self.replace(base=base)

    def cuts(self) -> tuple[int, ...]:
        """Layers of the stack from which on the Weight is of another kind; `lift` takes a scan apart there.

        Default: none. A Weight with cuts gives in `along` another Weight for the layers between two of them.
        """
        return self.base.cuts() if isinstance(self.base, Weight) else ()

    def may_be_dense(self) -> bool:
        """Whether `lift` may make it dense where an operation needs that. Default: only if it is a vector."""
        return False

    def why_not_merge(self) -> str | None:
        """Why this Weight has no dense form; None where it has one."""
        return self.base.why_not_merge() if isinstance(self.base, Weight) else None

    def why_not_wrap(self) -> str | None:
        """Why no other Weight may be put around this one; None where one may."""
        return self.base.why_not_wrap() if isinstance(self.base, Weight) else None

    def standing_for(self, array: jax.Array) -> Weight:
        """A Weight of the same kind for another dense array: a compressing Weight encodes it.

        Raises:
            ValueError: the Weight adapts what it stands for, and would lose it.
        """
        raise ValueError(
            f"this method changes the weights that it adapts, and a {type(self).__name__} stands there already; "
            "put the method first in the chain"
        )

    def randomized(self, key: jax.Array) -> Weight:
        """The Weight with what is random in training switched on. Default: nothing is."""
        return self if not isinstance(self.base, Weight) else self.replace(base=self.base.randomized(key))

    def replace(self, **changes) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def along(self, axis: int, fn: Callable[[jax.Array, int], jax.Array], *, drop: bool = False) -> Weight | None:
        """Apply `fn(array, axis)` (a slice, an index) along one axis of the leaf, to every field that has it.

        `drop` says that `fn` takes the axis away. None where the fields cannot be cut along that axis.
        """
        letter = self.labels[axis]
        if letter in "io" and letter not in self.SLICEABLE:
            return None
        new = {
            name: self._field_along(name, axis, letter, fn) for name in self.FIELDS if getattr(self, name) is not None
        }
        base = array_of(self.base)
        new["base"] = base.along(axis, fn, drop=drop) if isinstance(base, Weight) else fn(base, axis)
        if new["base"] is None:
            return None
        written = axis - (self.ndim - len(self.axes))
        axes = self.axes[:written] + self.axes[written + 1 :] if drop and written >= 0 else self.axes
        return self.replace(**new, axes=axes)

    def _field_along(self, name: str, axis: int, letter: str, fn):
        field, letters = array_of(getattr(self, name)), self.FIELDS[name]
        if letter in "sb" and name in self.UNSTACKED:
            return field
        if letter in "sb":
            return fn(field, sum(c in "sb" for c in self.labels[:axis]))
        if letter not in letters:
            return field
        at = field.ndim - len(letters) + letters.index(letter)
        sizes = [n for n, c in zip(self.shape, self.labels, strict=True) if c == letter]
        position = sum(c == letter for c in self.labels[:axis])
        field = field.reshape(*field.shape[:at], *sizes, *field.shape[at + 1 :])
        field = fn(field, at + position)
        count = len(sizes) - (field.ndim < len(sizes) + getattr(self, name).ndim - 1)
        merged = math.prod(field.shape[at : at + count])
        return field.reshape(*field.shape[:at], merged, *field.shape[at + count :])

    def cuttable(self, letters: str) -> Weight:
        """The Weight in a form that can be cut along all these of `i` and `o`, where it has one. Default: itself."""
        return self.replace(base=self.base.cuttable(letters)) if isinstance(self.base, Weight) else self

    def stack_first(self, axis: int) -> Weight:
        """The Weight with stack axis `axis` moved to the front of every field, as `scan` wants it."""
        whole = self.cut_out()
        written = axis - (self.ndim - len(self.axes))
        if axis == 0 and written < 0:
            return whole
        at = sum(c in "sb" for c in self.labels[:axis])
        stacked = [n for n in self.FIELDS if n not in self.UNSTACKED and getattr(self, n) is not None]
        moved = {n: jnp.moveaxis(getattr(whole, n), at, 0) for n in stacked}
        if isinstance(whole.base, Weight):
            base = whole.base.stack_first(axis)
        else:
            base = jnp.moveaxis(whole.base, axis, 0)
        axes = self.axes if written < 0 else self.axes[:written] + self.axes[written + 1 :]
        return self.replace(**moved, base=base, axes=axes)

    def layerwise(self) -> Self:
        """The Weight with None for the fields that `scan` does not take apart by layers."""
        base = self.base.layerwise() if isinstance(self.base, Weight) else self.base
        return self.replace(**{"base": base, **dict.fromkeys(self.UNSTACKED | self.LEFT_WHOLE)})

    def layer_of(self, whole: Weight, number: jax.Array) -> Self:
        """The Weight of one layer, from what `scan` gives of `whole.layerwise()` for it and the layer's number."""
        base = self.base.layer_of(whole.base, number) if isinstance(self.base, Weight) else self.base
        same = {name: getattr(whole, name) for name in self.UNSTACKED}
        left = {name: Layer(getattr(whole, name), number) for name in self.LEFT_WHOLE}
        return self.replace(**{"base": base, **same, **left})

    def cut_out(self) -> Self:
        """The Weight with arrays for its `Layer`s."""
        base = self.base.cut_out() if isinstance(self.base, Weight) else self.base
        left = {name: array_of(getattr(self, name)) for name in self.LEFT_WHOLE}
        return self.replace(**{"base": base, **left})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer of an array that `scan` has left whole: for a use that can read it in place, as a kernel can.

    Fields:
        stack: (layers, ...).
        number: () int32.
    """

    stack: jax.Array
    number: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[1:])

    @property
    def dtype(self):
        return self.stack.dtype

    def array(self) -> jax.Array:
        """The layer, cut out."""
        return lax.dynamic_index_in_dim(self.stack, self.number, keepdims=False)


def array_of(value):
    """A field as it is, or cut out of the stack of which it is a `Layer`."""
    return value.array() if isinstance(value, Layer) else value


@weight
class Unfrozen(Weight):
    """A leaf that trains as it is: `params' = value`. `lift` passes the array itself."""

    base: Any
    axes: str = static("")
    TRAINABLE = frozenset({"base"})
    SLICEABLE = "io"

    def apply(self, op, x) -> jax.Array:
        return apply(op, x, self.base)

    def dense(self) -> jax.Array:
        return dense(self.base)

    def may_be_dense(self) -> bool:
        return not isinstance(self.base, Weight) or self.base.may_be_dense()


def apply(op, x, w) -> jax.Array:
    """`op` on `x` and a Weight or a plain array: how a Weight uses the one that it holds."""
    return w.apply(op, x) if isinstance(w, Weight) else op.base(x, w)


def dense(w) -> jax.Array:
    """The dense array of a Weight, or the array itself."""
    return w.dense() if isinstance(w, Weight) else w


def _matrix_order(labels: str) -> list[int]:
    return [k for group in ("sb", "i", "o") for k, c in enumerate(labels) if c in group]


def to_matrix(array: jax.Array, labels: str) -> jax.Array:
    """An array of the leaf's layout in matrix form `(*stack, *batch, in, out)`."""
    order = _matrix_order(labels)
    sizes = {c: math.prod(array.shape[k] for k in range(array.ndim) if labels[k] == c) for c in "io"}
    lead = [array.shape[k] for k in order if labels[k] in "sb"]
    return jnp.transpose(array, order).reshape(*lead, sizes["i"], sizes["o"])


def from_matrix(matrix: jax.Array, labels: str, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_matrix`: back to the leaf's own axes."""
    order = _matrix_order(labels)
    return jnp.transpose(matrix.reshape([shape[k] for k in order]), [order.index(k) for k in range(len(order))])


def matrix_sizes(shape: tuple[int, ...], labels: str) -> tuple[tuple[int, ...], int, int]:
    """`((*stack, *batch), in, out)` of a leaf."""
    lead = tuple(n for n, c in zip(shape, labels, strict=True) if c in "sb")
    size = {letter: math.prod(n for n, c in zip(shape, labels, strict=True) if c == letter) for letter in "io"}
    return lead, size["i"], size["o"]
