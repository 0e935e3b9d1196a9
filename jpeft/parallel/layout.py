"""Where every array of a fine-tuning step lies on a mesh, from the sites of the model and the fields of its Weights.

tensor   A product is cut along its outputs, and the one that closes a sublayer (attention's output, the down
         projection) along its inputs, so that a sublayer needs one sum each way. A Weight's fields follow its leaf.
fsdp     Every large array that is left is cut along the first axis that the mesh divides, stacks of layers excepted.
         It is gathered, as it is stored, by the layer that uses it (`Gathered`).
data     Nothing but the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.core.sites import AttentionSite, Sites
from jpeft.core.targets import PRESETS
from jpeft.core.tree import leaves_with_paths, map_with_paths, path_string
from jpeft.core.weight import Weight
from jpeft.parallel.gathered import Gathered, all_gather
from jpeft.parallel.mesh import BATCH_AXES, describe
from jpeft.parallel.offload import results_in_host

__all__ = ["Layout", "Place", "batch_sharding", "check_rows", "shard", "shard_params"]

SMALL, TINY, LARGE = 2**14, 2**11, 2**20
"""Arrays of fewer elements a layer than SMALL are whole on every device, as gathering them costs more than it saves;
those of LARGE and more must be cut. For what a Weight does not train, its scales, TINY stands for SMALL: they travel
with larger fields."""


class Place(NamedTuple):
    """Where one array lies. `cut`: its axis in pieces over `fsdp`, from the end; `early`: it is gathered for `bind`."""

    spec: PartitionSpec
    cut: int | None = None
    early: bool = False

    @property
    def tensor(self) -> int | None:
        """The axis in pieces over `tensor`, from the end."""
        return len(self.spec) - self.spec.index("tensor") if "tensor" in self.spec else None


@dataclass(frozen=True)
class Layout:
    """What `shard` finds; see there."""

    mesh: Mesh
    method: Any
    places: tuple[Any, Any]
    axes: dict[str, str]
    optimizer_state: Any = None

    @property
    def trainable(self):
        """`NamedSharding` of each trainable array."""
        return self._shardings(self.places[0])

    @property
    def frozen(self):
        """`NamedSharding` of each frozen array."""
        return self._shardings(self.places[1])

    @property
    def batch(self) -> NamedSharding:
        """Of the batch's arrays: rows over `data` and `fsdp`."""
        return batch_sharding(self.mesh)

    @property
    def batch_shards(self) -> int:
        return math.prod(self.mesh.shape[name] for name in BATCH_AXES)

    def _shardings(self, places):
        return jax.tree.map(lambda p: NamedSharding(self.mesh, p.spec), places, is_leaf=_is_place)

    def bind(self, trainable, frozen, key: jax.Array | None = None):
        """`method.bind` of one device's pieces, in a `shard_map` over the batch axes: leaves in pieces are Gathered."""
        if self.mesh.shape["fsdp"] == 1:
            return self.method.bind(trainable, frozen, key)
        whole = lambda place, x: all_gather(x, "fsdp", place.cut, place.tensor) if place.early else x
        halves = jax.tree.map(whole, self.places, (trainable, frozen), is_leaf=_is_place)
        of = dict(zip(map(id, jax.tree.leaves(halves)), jax.tree.leaves(self.places, is_leaf=_is_place), strict=True))
        cut = lambda x: None if (place := of.get(id(x))) is None or place.early else (place.cut, place.tensor)

        def gathered(path, leaf):
            arrays = jax.tree_util.tree_leaves_with_path(leaf)
            inside = [(path_string(inner), *at) for inner, x in arrays if (at := cut(x)) and at[0] is not None]
            if not inside:
                return leaf
            axes = leaf.axes if isinstance(leaf, Weight) else self.axes[path].lstrip("s")
            return Gathered(leaf, axes=axes, mesh_axis="fsdp", count=self.mesh.shape["fsdp"], split=tuple(inside))

        return map_with_paths(gathered, self.method.bind(*halves, key))

    def mapped(self, fn: Callable) -> Callable:
        """`fn(trainable, frozen, batch, key) -> (sum, like trainable)` of each device's rows, summed over the devices.

        `fn` binds with `self.bind`. What it gives for a trainable array that it gathers is summed already.
        """
        trainable, frozen = self._manual()

        def summed(place, x):
            names = tuple(n for n in BATCH_AXES if not (n == "fsdp" and place.cut is not None))
            return jax.lax.psum(x, names)

        def local(trainable, frozen, batch, key):
            own = jax.random.fold_in(key, jax.lax.axis_index(BATCH_AXES)) if key is not None else None
            total, gradients = fn(trainable, frozen, batch, own)
            return jax.lax.psum(total, BATCH_AXES), jax.tree.map(summed, self.places[0], gradients, is_leaf=_is_place)

        inputs = (trainable, frozen, PartitionSpec(BATCH_AXES), PartitionSpec())
        mapped = self._over_devices(local, inputs, (PartitionSpec(), trainable))

        def checked(trainable, frozen, batch, key):
            self.check_rows(next(x.shape[0] for x in jax.tree.leaves(batch)))
            return mapped(trainable, frozen, batch, key)

        return checked

    def _manual(self) -> tuple[Any, Any]:
        """How the halves lie over the axes that the batch is split over."""
        manual = lambda places: jax.tree.map(lambda p: _only(p.spec, BATCH_AXES), places, is_leaf=_is_place)
        return manual(self.places[0]), manual(self.places[1])

    def _over_devices(self, local: Callable, inputs, outputs) -> Callable:
        axes = {*BATCH_AXES, *(name for name, size in self.mesh.shape.items() if size == 1)}
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=axes, check_vma=False
        )

    def summed(self, fn: Callable) -> Callable:
        """`(halves, batch) -> sums`, the sums of `fn(bound, rows)` of each device's rows over all devices."""

        def local(halves, batch):
            return jax.tree.map(lambda x: jax.lax.psum(x, BATCH_AXES), fn(self.bind(*halves), batch))

        return self._over_devices(local, (self._manual(), PartitionSpec(BATCH_AXES)), PartitionSpec())

    def check_rows(self, rows: int) -> None:
        """Raise a ValueError where the devices cannot share a batch of `rows` rows equally."""
        check_rows(self.mesh, rows)


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raise a ValueError where a mesh's devices cannot share a batch of `rows` rows equally."""
    shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if rows % shards:
        more = -(-rows // shards) * shards
        raise ValueError(
            f"a batch of {rows} rows cannot be split over the {shards} devices of {' and '.join(BATCH_AXES)} in "
            f"{describe(mesh.shape)}; write a batch of {more} rows"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's arrays: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard(mesh: Mesh, method, params, sites: Sites, optimizer=None, calibration=None) -> Layout:
    """Where the arrays of `method.init` lie on `mesh`, and those of the optimizer's state. Costs no FLOPs.

    Args:
        mesh: of `make_mesh`.
        method: whose halves to lay out; None for those of nothing trained, `({}, params)`.
        params: the pretrained tree, or its shapes.
        optimizer: an optax transform of the trainable half; no optimizer state where None.
        calibration: as `method.init` takes it.

    Returns:
        A Layout: `trainable`, `frozen`, `optimizer_state`, `batch` are trees of shardings.

    Raises:
        ValueError: an axis that the mesh cannot divide; the message names the leaf, the axis and meshes that divide it.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from jpeft.parallel import make_mesh, shard
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> sites = jpeft.find_sites(apply, params, x)
        >>> mesh = make_mesh("fsdp=1", devices=jax.devices()[:1])
        >>> tuple(shard(mesh, jpeft.LoRA(rank=2), params, sites).frozen["kernel"].base.spec)
        (None, None)
    """
    method = _Untrained() if method is None else method
    key = jax.eval_shape(lambda: jax.random.key(0))
    halves = jax.eval_shape(lambda key, params: method.init(key, params, sites, calibration), key, params)
    places = _places(mesh, method, halves, sites)
    state = None if optimizer is None else _state_shardings(mesh, optimizer, halves[0], places[0])
    return Layout(mesh, method, places, {site.path: site.axes for site in sites}, state)


class _Untrained:
    """The pretrained tree with nothing trained, in the form of a method."""

    def init(self, key, params, sites, calibration=None):
        return {}, params

    def bind(self, trainable, frozen, key=None):
        return frozen


def shard_params(mesh: Mesh, params, sites: Sites) -> Any:
    """A `NamedSharding` for each array of the pretrained tree, as `shard` places what a method leaves as it is.

    Args:
        params: the tree, or its shapes.

    Raises:
        ValueError: as `shard`.
    """
    return shard(mesh, None, params, sites).frozen


def _state_shardings(mesh: Mesh, optimizer, trainable, places):
    """Of an optimizer's state: an array at the path of a parameter, of its shape, lies as that parameter does, in the
    host's memory where `offload` keeps it there; the others are whole on every device.
    """
    parameters = {
        (path_string(path), x.shape): place.spec
        for (path, x), place in zip(
            jax.tree_util.tree_leaves_with_path(trainable), jax.tree.leaves(places, is_leaf=_is_place), strict=True
        )
    }

    def sharding(path, x, in_host: bool):
        names = [path_string([entry]) for entry in path]
        ends = ("/".join(names[k:]) for k in range(len(names) + 1))
        spec = next((parameters[end, x.shape] for end in ends if (end, x.shape) in parameters), PartitionSpec())
        return NamedSharding(mesh, spec, memory_kind="pinned_host" if in_host else None)

    state, where = jax.eval_shape(optimizer.init, trainable), results_in_host(optimizer.init, trainable)
    return jax.tree_util.tree_map_with_path(sharding, state, where)


def _places(mesh: Mesh, method, halves, sites: Sites):
    axes = {site.path: site.axes for site in sites}
    tensor = _tensor_splits(mesh, sites) if mesh.shape["tensor"] > 1 else {}
    with_paths, structure = jax.tree_util.tree_flatten_with_path(halves)
    paths, leaves = [path_string(path[1:]) for path, _ in with_paths], [leaf for _, leaf in with_paths]
    jaxpr, bound = jax.make_jaxpr(lambda halves: method.bind(*halves), return_shape=True)(halves)
    computed = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}  # arrays that `bind` computes with
    number = {id(v): k for k, v in enumerate(jaxpr.jaxpr.invars)}
    order = iter(jaxpr.jaxpr.outvars)
    bound = jax.tree.map(lambda _: number.get(id(next(order))), bound)  # in place of each array, which one it is
    places: dict[int, Place] = {}
    for path, leaf in leaves_with_paths(bound):
        for k, place in _places_in(mesh, path, leaf, leaves, axes.get(path), tensor.get(path)):
            seen = places.setdefault(k, place)
            if seen != place:  # one array in several leaves
                places[k] = Place(PartitionSpec())
    for k, leaf in enumerate(leaves):
        if k not in places or id(jaxpr.jaxpr.invars[k]) in computed:
            places[k] = _cut(mesh, paths[k], leaf.shape, PartitionSpec(), 0, early=True)
    return jax.tree.unflatten(structure, [places[k] for k in range(len(leaves))])


def _places_in(mesh, path, leaf, leaves, axes, tensor):
    """`(number, place)` of each array in one leaf of the bound tree."""
    if not isinstance(leaf, Weight):
        if leaf is None:
            return
        array = leaves[leaf]
        spec = PartitionSpec(*tensor) if tensor else PartitionSpec()
        stacks = _stacks(axes) if axes is not None and len(axes) == array.ndim else None
        yield leaf, _cut(mesh, path, array.shape, spec, stacks or 0, early=stacks is None)
        return
    whole = jax.tree.map(lambda k: leaves[k], leaf)
    yield from _fields(mesh, path, leaf, tensor, leaves, whole)


def _fields(mesh, path, leaf, tensor, leaves, whole):
    """The compiler cuts the work as the arrays lie: any placement is right, and a field follows its leaf if it can."""
    labels, count = whole.labels, mesh.shape["tensor"]
    letter = labels[tensor.index("tensor")] if tensor else ""
    for name, letters in leaf.FIELDS.items():
        k = getattr(leaf, name)
        if k is None:
            continue
        shape = leaves[k].shape
        lead = len(shape) - len(letters)
        follows = lambda axis, lead=lead, letters=letters: axis >= lead and letters[axis - lead] == letter
        entries = ["tensor" if follows(axis) and n % count == 0 else None for axis, n in enumerate(shape)]
        stacks = len(shape) if name in leaf.UNSTACKED else max(0, min(labels.count("s"), lead))
        small = SMALL if name in leaf.TRAINABLE else TINY
        yield k, _cut(mesh, path, shape, PartitionSpec(*entries), stacks, small=small)
    if isinstance(leaf.base, Weight):
        yield from _fields(mesh, path, leaf.base, tensor, leaves, whole.base)
    elif isinstance(leaf.base, int):  # else it holds several, which are gathered for `bind`
        yield leaf.base, _cut(mesh, path, leaves[leaf.base].shape, PartitionSpec(*(tensor or ())), _stacks(labels))


def _stacks(labels: str) -> int:
    """How many axes come before the first that may be cut: all up to the last stack of layers."""
    return labels.rfind("s") + 1


def _cut(mesh: Mesh, path: str, shape, spec: PartitionSpec, stacks: int, early: bool = False, small=None) -> Place:
    """An array cut over `fsdp`: along the first axis behind its stacks that the mesh divides and `spec` leaves."""
    count = mesh.shape["fsdp"]
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    if count == 1 or math.prod(shape[stacks:]) < (SMALL if small is None else small):
        return Place(PartitionSpec(*entries))
    for axis in range(stacks, len(shape)):
        if entries[axis] is None and shape[axis] % count == 0:
            entries[axis] = "fsdp"
            return Place(PartitionSpec(*entries), len(shape) - axis, early)
    if math.prod(shape[stacks:]) >= LARGE:
        sizes = [n for n, entry in zip(shape[stacks:], entries[stacks:], strict=True) if entry is None]
        fitting = [n for n in range(2, mesh.size + 1) if any(size % n == 0 for size in sizes)]
        raise ValueError(
            f"{path}: none of the axes {sizes} of an array {tuple(shape)} can be split over {describe(mesh.shape)}; "
            f"fsdp may be {', '.join(map(str, fitting)) or '1'}"
        )
    return Place(PartitionSpec(*entries))


def _tensor_splits(mesh: Mesh, sites: Sites) -> dict[str, tuple]:
    """For each leaf that tensor parallelism cuts, its axes' mesh axes."""
    count = mesh.shape["tensor"]
    closes = lambda site: PRESETS["attention-output"](site) or PRESETS["down"](site)
    closing = {site.path: site for site in sites if site.kind == "dense" and closes(site)}
    opening = set()
    for site in sites:
        if isinstance(site, AttentionSite):
            for name, heads in (("heads", site.heads), ("kv_heads", site.kv_heads)):
                if heads % count:
                    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
                    raise ValueError(
                        f"{site.path}: {heads} {name} cannot be split over tensor={count}; "
                        f"tensor may be {', '.join(map(str, fitting))}"
                    )
            opening |= {site.path, site.key, site.value}
    splits: dict[str, tuple] = {}
    for site in sites:
        letter = "i" if site.path in closing else "o"
        if site.kind == "dense" and (site.path in closing or site.path in opening or _feeds(site, closing)):
            axis = site.axes.find(letter)
            if site.shape[axis] % count:
                raise ValueError(
                    f"{site.path}: axis {axis} of {site.shape} cannot be split over {describe(mesh.shape)}; "
                    f"tensor may be {', '.join(str(n) for n in range(1, count) if site.shape[axis] % n == 0)}"
                )
            splits[site.path] = tuple("tensor" if k == axis else None for k in range(len(site.shape)))
    return splits


def _feeds(site, closing) -> bool:
    """Whether a site's outputs are inputs of one that closes a sublayer."""
    return any(site.path in closed.inputs_from for closed in closing.values())


def _only(spec: PartitionSpec, names) -> PartitionSpec:
    return PartitionSpec(*(entry if entry in names else None for entry in spec))


def _is_place(x) -> bool:
    return isinstance(x, Place)
