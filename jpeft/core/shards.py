"""How a Weight's fields lie on a mesh, given how its leaf does."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from jpeft.core.weight import Weight

__all__ = ["field_specs"]


def field_specs(weight: Weight, split) -> Weight:
    """The Weight with a `PartitionSpec` for every field, such that each device's fields are those of its leaf's shard.

    `split` has, for each axis of the leaf, the mesh axes over which it is split, or None. Stack and batch axes are
    split as they are. The merged inputs (or outputs) of the fields are split as the major one among them.

    Raises:
        ValueError: a minor axis among several inputs or outputs is split, or one along which the fields cannot be cut.
    """
    letters = weight.labels
    merged = {}
    for letter in "io":
        of = [
            (n, k)
            for k, (n, c, size) in enumerate(zip(split, letters, weight.shape, strict=True))
            if c == letter and size != 1
        ]
        minor = [k for names, k in of[1:] if names]
        if minor:
            raise ValueError(f"axis {minor[0]} is split over the mesh, and is a minor one of the axes {letters!r}")
        merged[letter] = of[0][0] if of else None
        if merged[letter] and letter not in weight.SLICEABLE:
            raise ValueError(f"a {type(weight).__name__} cannot be cut along the {letter!r} axes that the mesh splits")
    lead = [names for names, c in zip(split, letters, strict=True) if c in "sb"]
    specs = {
        name: PartitionSpec(*(() if name in weight.UNSTACKED else lead), *(merged.get(c) for c in fields))
        for name, fields in weight.FIELDS.items()
        if getattr(weight, name) is not None
    }
    inner = field_specs(weight.base, split) if isinstance(weight.base, Weight) else PartitionSpec(*split)
    return weight.replace(**specs, base=inner)
