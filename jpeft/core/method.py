"""Method: a PEFT method as two pure functions, and what is done with the trees that they give.

trainable, frozen = method.init(key, params, sites)      every array in exactly one half
params'           = method.bind(trainable, frozen)       the tree with Weights in it

Where several leaves use one array (a projection for all layers, a scale for a kernel and its bias), the halves hold it
once, next to the tree, in a `Tied`; `bind` puts it into every Weight that names it.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jpeft.core.export import Export
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets, select
from jpeft.core.tree import combine, key_for_path, leaves_with_paths, map_with_paths, partition, path_string
from jpeft.core.weight import Unfrozen, Weight

__all__ = ["Method", "Selective", "merge", "trainable_mask", "labels"]


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of hyperparameters. A subclass defines `wrap`.

    Fields:
        targets: what to adapt: a preset (`"all-linear"`, `"attention"`, `"mlp"`, ...), a regex searched in the path, a
            list of them, or a predicate on sites.
        modules_to_save: targets (same forms) that train in full beside the method.

    Class data:
        KINDS: kinds of sites that the method can adapt.
        NO_OP_AT_START: whether the bound tree computes the pretrained function at first.
        FORMS_DENSE_UPDATE: why the forward needs a dense update; empty where it forms none.
        ADDS_FROZEN: why the frozen half is larger than the base; empty where it is not.
        CALIBRATION: what `init` must be told besides the params, as words in a sentence; empty for nothing.
        OBSERVES: what `calibrate` shows the method for that: see there.
        EXPORT: how HF PEFT writes the method's adapters; None where it does not have the method.
        SMALL: hyperparameters that suit matrices of a few dozen rows, for tests and tables.
    """

    targets: Targets = dataclasses.field(default="all-linear", kw_only=True)
    modules_to_save: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    KINDS: ClassVar[tuple[str, ...]] = ("dense", "experts", "embedding", "conv")
    NO_OP_AT_START: ClassVar[bool] = True
    FORMS_DENSE_UPDATE: ClassVar[str] = ""
    ADDS_FROZEN: ClassVar[str] = ""
    CALIBRATION: ClassVar[str] = ""
    OBSERVES: ClassVar[Literal["", "inputs", "gradients", "weights"]] = ""
    EXPORT: ClassVar[Export | None] = None
    SMALL: ClassVar[dict[str, Any]] = {}

    def __post_init__(self):
        for field in dataclasses.fields(self):  # lists and mappings from configuration files, made hashable
            value = getattr(self, field.name)
            if isinstance(value, dict):
                object.__setattr__(self, field.name, tuple(value.items()))
            elif isinstance(value, list):
                object.__setattr__(self, field.name, tuple(tuple(v) if isinstance(v, list) else v for v in value))

    @property
    def prompt_length(self) -> int:
        """Virtual tokens that `prompted` puts into every sequence. Default: none."""
        return 0

    @property
    def num_prompts(self) -> int:
        """How many prompts of that length there are, chosen by a batch's `tasks`. Default: one."""
        return 1

    @property
    def position_shift(self) -> int:
        """Positions that a prefix in the attention takes before the first token. Default: none."""
        return 0

    def wrap(self, key: jax.Array, leaf, site: Site) -> Weight:
        """The Weight that adapts one leaf. `leaf` is an array or a Weight; `key` is the path's own."""
        raise TypeError(f"{type(self).__name__} defines no wrap")

    def wrap_calibrated(self, key: jax.Array, leaf, site: Site, given) -> Weight:
        """As `wrap`, with what the calibration says of the path; None where it says nothing.

        `given` is `{field: array}`, a `Saved`, where a saved adapter is loaded: fields that are not made again; empty
        where the adapter has none of this leaf.
        """
        return self.wrap(key, leaf, site)

    def shared(self, key: jax.Array, params, chosen: dict[str, Site]) -> dict[str, jax.Array]:
        """`{name: array}` of what several Weights use together; they say by `Weight.tied` which. Default: nothing."""
        return {}

    def check(self, site: Site) -> str | None:
        """What is wrong with adapting this site, as a sentence; None where nothing is."""
        return None

    def init(self, key: jax.Array, params, sites: Sites, calibration=None) -> tuple[Any, Any]:
        """`(trainable, frozen)`: the tree with the method's Weights in it, split in two.

        Pure: works under `jit` and `eval_shape`, on `ShapeDtypeStruct`s through the latter.

        Args:
            calibration: `{path: what the method learns from data}`, made by `calibrate`; only for methods that ask.

        Raises:
            ValueError: a target that matches nothing; a site that the method cannot adapt, or a Weight there that lets
                no other around it; sites of another tree; no calibration where the method needs one, or one that
                lacks a site.
        """
        chosen = self.chosen(sites)
        whole = select(sites, self.modules_to_save, _ANY_KIND) if self.modules_to_save else {}
        _check_paths({**chosen, **whole}, params)
        _check_wraps(type(self).__name__, {**chosen, **whole}, params)
        given = self._calibration_of(chosen, with_weights(self, calibration, params))
        nothing = Saved() if any(isinstance(found, Saved) for found in given.values()) else None

        def place(path, leaf):
            if path in whole:
                return Unfrozen(leaf, axes=whole[path].axes.lstrip("s"))
            if path not in chosen:
                return leaf
            return self.wrap_calibrated(key_for_path(key, path), leaf, chosen[path], given.get(path, nothing))

        bound = map_with_paths(place, params)
        own = lambda path, leaf: _outer_mask(leaf) if path in chosen or path in whole else _none_of(leaf)
        mask = map_with_paths(own, bound)
        _check_trains(type(self).__name__, bound, mask)
        arrays = self.shared(key, params, chosen)
        arrays |= {name: x for name, x in given.get(Saved.SHARED, {}).items() if name in arrays}
        if not arrays:
            return partition(bound, mask)
        trains = {name: False for name in arrays}
        for path, leaf in leaves_with_paths(bound):
            if path in chosen:
                trains |= {name: field in leaf.trainable_fields() for field, name in leaf.tied().items()}
        return partition(Tied(bound, arrays), Tied(mask, trains))

    def _calibration_of(self, chosen: dict[str, Site], calibration) -> dict[str | None, Any]:
        if calibration is None and not self.CALIBRATION:
            return {}
        name = type(self).__name__
        if calibration is None:
            raise ValueError(
                f"{name} starts from {self.CALIBRATION}; write\n"
                f"  calibration = jpeft.calibrate(apply, params, sites, batches, method={name}(...))\n"
                "  method.init(key, params, sites, calibration)"
            )
        missing = [path for path in chosen if path not in calibration]
        if self.CALIBRATION and missing:
            raise ValueError(
                f"the calibration says nothing of {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; "
                f"it was made with other targets: call jpeft.calibrate with this {name}"
            )
        return dict(calibration)

    def chosen(self, sites: Sites) -> dict[str, Site]:
        """`{path: site}` of what the method adapts, checked.

        Raises:
            ValueError: see `init`.
        """
        chosen = self.matched(sites)
        problems = [f"{path}: {problem}" for path, site in chosen.items() if (problem := self.check(site))]
        if problems:
            more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{type(self).__name__} cannot adapt\n" + "\n".join(problems[:5]) + more)
        return chosen

    def matched(self, sites: Sites) -> dict[str, Site]:
        """`{path: site}` of what the targets mean, before any is checked. Default: the sites that they select."""
        return select(sites, self.targets, self.KINDS)

    def bind(self, trainable, frozen, key: jax.Array | None = None) -> Any:
        """The tree with Weights in it. A key switches on what is random in training (dropout)."""
        bound = untied(combine(trainable, frozen))
        return bound if key is None else randomized(bound, key)

    def observe(self, state, seen: jax.Array, site: Site) -> Any:
        """What `calibrate` keeps of a site after one more batch; `state` is None at first."""
        raise TypeError(f"{type(self).__name__} observes nothing")

    def conclude(self, states: dict[str, Any], chosen: dict[str, Site]) -> dict[str, Any]:
        """`{path: what init is given}` after the last batch. Default: the states as they are."""
        return states

    def exported(self, trainable, frozen) -> tuple[Method, Any]:
        """`(method, trainable)` that compute the same on the original params, as other libraries know them.

        Default: these themselves. A method that changes the base says here which plain one its adapter amounts to.
        """
        return self, trainable

    def for_steps(self, steps: int) -> Method:
        """The method for a run of so many optimizer steps; one with a schedule plans it here. Default: itself."""
        return self

    def optimizer(self, tx):
        """The optax transformation that this method trains with, around the user's own. Default: that itself."""
        return tx

    def after_training(self, trainable, frozen) -> tuple[Method, Any, Any]:
        """`(method, trainable, frozen)` that are worth keeping after the last step. Default: these themselves.

        Outside `jit`: shapes may follow from the numbers.
        """
        return self, trainable, frozen

    def penalty(self, trainable) -> jax.Array | float:
        """A term to add to the loss. Default: none."""
        return 0.0


@dataclass(frozen=True)
class Selective(Method):
    """Base of the methods that train leaves as they are: `targets` chooses them, and nothing is inserted."""

    def wrap(self, key: jax.Array, leaf, site: Site) -> Weight:
        return Unfrozen(leaf, axes=site.axes.lstrip("s"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tied:
    """A tree whose Weights lack the fields that they share, and those arrays by name."""

    tree: Any
    arrays: dict[str, Any]


class Saved(dict):
    """`{field: array}` of one leaf's Weight in a saved adapter: given to `init` in place of a calibration.

    Under the key `SHARED`, in place of a path, are the arrays that the leaves share, by name. `weights` is the leaf as
    it was before any method, for a method that observes the weights.
    """

    SHARED = None
    weights: Any = None

    def beside(self, weights) -> Saved:
        """The same with the leaf's weights."""
        new = Saved(self)
        new.weights = weights
        return new


def _filled(leaf, arrays):
    """A Weight with its tied fields put in; one that an earlier method of a chain filled stays."""
    if not isinstance(leaf, Weight):
        return leaf
    missing = {f: name for f, name in leaf.tied().items() if getattr(leaf, f) is None and name in arrays}
    return leaf.replace(**{field: arrays[name] for field, name in missing.items()}) if missing else leaf


_ANY_KIND = ("dense", "experts", "embedding", "conv", "scale", "bias", "other")


def _check_paths(chosen: dict[str, Site], params) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}
    wrong = [
        f"{path}: the sites say {site.shape}, the tree has {shapes.get(path, 'no such leaf')}"
        for path, site in chosen.items()
        if shapes.get(path) != tuple(site.shape)
    ]
    if wrong:
        raise ValueError("these sites are of another tree; call find_sites on this one\n" + "\n".join(wrong[:5]))


def _check_wraps(name: str, chosen: dict[str, Site], params) -> None:
    held = {path: leaf for path, leaf in leaves_with_paths(params) if path in chosen and isinstance(leaf, Weight)}
    refused = [f"{path}: {why}" for path, leaf in held.items() if (why := leaf.why_not_wrap())]
    if refused:
        raise ValueError(f"{name} cannot adapt\n" + "\n".join(refused[:5]))


def _check_trains(name: str, bound, mask) -> None:
    """Refuse to train what has no gradient."""
    no_gradient = lambda x, train: train and not jnp.issubdtype(x.dtype, jnp.inexact)
    packed = [
        path
        for (path, leaf), (_, trains) in zip(leaves_with_paths(bound), leaves_with_paths(mask), strict=True)
        if any(map(no_gradient, jax.tree.leaves(leaf), jax.tree.leaves(trains)))
    ]
    if packed:
        raise ValueError(
            f"{name} cannot train {', '.join(packed[:5])}{', ...' if len(packed) > 5 else ''}: whole numbers stand "
            "there, as where an earlier method of the chain compressed the weights; leave them out of the targets"
        )


def with_weights(method, calibration, params):
    """The calibration of a method that observes the weights: they are at hand, so nobody need call `calibrate`."""
    if method.OBSERVES != "weights":
        return calibration
    weights, given = dict(leaves_with_paths(params)), dict(calibration or {})
    shared = given.pop(Saved.SHARED, None)
    given = {path: x.beside(weights.get(path)) if isinstance(x, Saved) else x for path, x in given.items()}
    return {**weights, **given, **({Saved.SHARED: shared} if shared else {})}


def _none_of(leaf):
    return jax.tree.map(lambda _: False, leaf)


def _outer_mask(weight: Weight):
    """True for the trainable fields of this Weight, False within what it holds."""
    fields = weight.trainable_fields()
    return jax.tree_util.tree_map_with_path(lambda p, _: path_string(p[:1]) in fields, weight)


def full_mask(leaf):
    """True for the trainable fields of a Weight and of every Weight that it holds."""
    if not isinstance(leaf, Weight):
        return _none_of(leaf)
    mask = _outer_mask(leaf)
    if not isinstance(leaf.base, Weight):
        return mask
    return mask.replace(base=jax.tree.map(operator.or_, mask.base, full_mask(leaf.base)))


def randomized(bound, key):
    """The tree with what is random in training switched on."""
    switch = lambda path, w: w.randomized(key_for_path(key, path)) if isinstance(w, Weight) else w
    return map_with_paths(switch, bound)


def merge(bound) -> Any:
    """The dense tree that `bound` stands for: original structure, shapes, dtypes and shardings; no added latency.

    Raises:
        ValueError: a Weight that has no dense form; the message names the leaves and the reason.
    """
    problems = [
        f"{path}: {reason}"
        for path, w in leaves_with_paths(bound)
        if isinstance(w, Weight) and (reason := w.why_not_merge()) is not None
    ]
    if problems:
        raise ValueError("these leaves cannot be merged\n" + "\n".join(problems[:5]))
    return map_with_paths(lambda _, w: _placed(w.dense(), w) if isinstance(w, Weight) else w, bound)


def _placed(array, weight: Weight):
    """The merged array on the devices where the base lies."""
    base = weight.base
    while isinstance(base, Weight):
        base = base.base
    if isinstance(base, jax.core.Tracer) or not isinstance(base, jax.Array) or base.shape != array.shape:
        return array
    return jax.device_put(array, base.sharding)


def trainable_mask(bound) -> Any:
    """A tree of booleans like `bound`: True where an array trains. For `optax.masked`.

    Raises:
        ValueError: a trainable array stands in several leaves; in one tree its copies would drift apart.
    """
    shares = lambda w: isinstance(w, Weight) and bool(set(w.tied()) & w.trainable_fields() or shares(w.base))
    tied = [path for path, w in leaves_with_paths(bound) if shares(w)]
    if tied:
        raise ValueError(
            f"{', '.join(tied[:5])} share what they train; expected a method without shared trainables, "
            "or train the half that `init` gives: grads = jax.grad(loss)(trainable, frozen)"
        )
    return map_with_paths(lambda _, leaf: full_mask(leaf), bound)


def labels(bound) -> Any:
    """A tree of `"trainable"` and `"frozen"` like `bound`. For `optax.multi_transform`. Raises as `trainable_mask`."""
    return jax.tree.map(lambda train: "trainable" if train else "frozen", trainable_mask(bound))


def untied(half):
    """One half as a tree whose Weights have the shared arrays."""
    return map_with_paths(lambda _, leaf: _filled(leaf, half.arrays), half.tree) if isinstance(half, Tied) else half
