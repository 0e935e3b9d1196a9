"""Gathered: a leaf that is at rest in pieces, one on each device of a mesh axis, and whole where it is used.

Inside a `shard_map` over the axis, a Gathered holds this device's pieces and stands for the whole leaf:

    w.apply(op, x) = apply(op, x, all_gather(pieces))

Each field is gathered as it is stored (4-bit codes as 4-bit codes), in the layer that uses it, and again in the
backward pass where the layer is rematerialised. The transpose of a gather is a reduce-scatter: what trains in pieces
gets the sum of all devices' gradients, in pieces.
"""

from __future__ import annotations

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec

from jpeft.core.tree import path_string
from jpeft.core.weight import Weight, apply, dense, static, weight

__all__ = ["Gathered", "all_gather", "collected"]


@weight
class Gathered(Weight):
    """The leaf in pieces.

    Fields:
        base: the pieces: a Weight, or an array.

    Static fields:
        mesh_axis: over which they lie.
        count: how many devices it has.
        split: for each field of `base` that is in pieces, its path in `base`, the axis that is cut, from the end, and
            one that stays cut over `tensor` besides, if any.
    """

    base: Weight | Array
    axes: str = static()
    mesh_axis: str = static()
    count: int = static()
    split: tuple[tuple[str, int, int | None], ...] = static()

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.base.shape)
        innermost = "/".join(["base"] * _depth(self.base))
        if innermost in (cut := {path: at for path, at, _ in self.split}):
            sizes[-cut[innermost]] *= self.count
        return tuple(sizes)

    def whole(self):
        """The leaf as every device has it after the gather: what `base` would be without a mesh."""
        cut = {path: (at, tensor) for path, at, tensor in self.split}

        def gather(path, x):
            axes = cut.get(path_string(path))
            return x if axes is None else all_gather(x, self.mesh_axis, *axes)

        pieces = self.base.cut_out() if isinstance(self.base, Weight) else self.base
        return jax.tree_util.tree_map_with_path(gather, pieces)

    def fitted(self):
        return self  # its pieces are not

    def used(self):
        whole = self.whole()
        return whole.fitted() if isinstance(whole, Weight) else whole

    def apply(self, op, x):
        return apply(op, x, self.used())

    def added(self, op, x):
        whole = self.used()
        return whole.added(op, x) if isinstance(whole, Weight) else None

    def notes(self, op, reached):
        whole = self.used()
        return whole.notes(op, reached) if isinstance(whole, Weight) else reached

    def dense(self):
        return dense(self.used())

    def may_be_dense(self):
        return not isinstance(self.base, Weight) or self.base.may_be_dense()

    def along(self, axis, fn, *, drop=False):
        if self.labels[axis] != "s":
            whole = self.used()
            return whole.along(axis, fn, drop=drop) if isinstance(whole, Weight) else None
        return super().along(axis, fn, drop=drop)


def all_gather(x: Array, mesh_axis: str, cut: int, tensor: int | None = None) -> Array:
    """All devices' pieces along one axis, one after the other. 4-bit numbers travel as such.

    Args:
        cut: the axis, from the end.
        tensor: another one, which is and stays cut over `tensor`.
    """
    gather = lambda x: lax.all_gather(x, mesh_axis, axis=x.ndim - cut, tiled=True)
    if tensor is None:
        return gather(x)
    # Left to itself, the partitioner joins the pieces over `tensor` before it gathers over another axis.
    spec = PartitionSpec(*("tensor" if x.ndim - axis == tensor else None for axis in range(x.ndim)))
    return jax.shard_map(gather, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)(x)


def collected(bound):
    """`bound` with the leaves gathered that have no stack of layers: for a loop that uses them in every turn."""
    is_leaf = lambda x: isinstance(x, Weight)
    alone = lambda w: isinstance(w, Gathered) and "s" not in w.labels
    return jax.tree.map(lambda w: w.whole() if alone(w) else w, bound, is_leaf=is_leaf)


def _depth(base) -> int:
    depth = 0
    while isinstance(base, Weight):
        base, depth = base.base, depth + 1
    return depth
