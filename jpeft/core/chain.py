"""Chain: several methods as one, each applied to the tree that the former ones bound.

Every array stays in one half of one method: where a later method's frozen half has an array that the tree so far
supplies, a place stands for it, a `_From`, which `bind` fills.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from jpeft.core.method import Method, Tied, randomized, with_weights
from jpeft.core.sites import Sites
from jpeft.core.tree import leaves_with_paths, path_string
from jpeft.core.weight import Weight

__all__ = ["Chain", "chain"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _From:
    """In a chain: the place of an array that the tree bound so far supplies."""

    index: int


def _is_none(x) -> bool:
    return x is None


def _is_place(x) -> bool:
    return isinstance(x, _From)


def _supplied(half, bound):
    """A half with the arrays of the tree bound before it in their places."""
    arrays = jax.tree.leaves(bound, is_leaf=_is_none)
    return jax.tree.map(lambda x: arrays[x.index] if _is_place(x) else x, half, is_leaf=_is_place)


def _moved(half, old, new, refer):
    """A half that was on the tree `old`, on the tree `new`: where a leaf has become another Weight, it holds that one.

    `refer(k)` is what the half has of array k of the tree before it.
    """
    structure = lambda tree: jax.tree.structure(tree, is_leaf=_is_none)
    if structure(old) == structure(new):
        return half
    if isinstance(half, Tied):
        return dataclasses.replace(half, tree=_moved(half.tree, old, new, refer))
    was = [path for path, _ in jax.tree_util.tree_leaves_with_path(old, is_leaf=_is_none)]
    now = {path: k for k, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(new, is_leaf=_is_none))}
    numbered = jax.tree.unflatten(structure(new), range(len(now)))
    referring = jax.tree.map(lambda x, k: None if x is None else refer(k), new, numbered, is_leaf=_is_none)
    before, after, held = (dict(leaves_with_paths(tree)) for tree in (old, new, referring))

    def moved(path, leaf):
        path = path_string(path)
        if isinstance(before.get(path), Weight) and structure(before[path]) != structure(after[path]):
            return _holding(leaf, _depth(leaf) - _depth(before[path]), held[path])
        move = lambda x: _From(now[was[x.index]]) if _is_place(x) else x
        return jax.tree.map(move, leaf, is_leaf=_is_place)

    return jax.tree_util.tree_map_with_path(moved, half, is_leaf=lambda x: isinstance(x, (Weight, _From)))


def _depth(leaf) -> int:
    """How many Weights stand there, one in the other."""
    return 1 + _depth(leaf.base) if isinstance(leaf, Weight) else 0


def _holding(weight, outer: int, inner):
    """The Weight with another thing in the place of what its `outer` outermost ones hold."""
    return weight.replace(base=_holding(weight.base, outer - 1, inner)) if outer else inner


@dataclass(frozen=True)
class Chain:
    """Methods applied one after the other, each to the tree that the former ones bound. Made by `chain`."""

    methods: tuple[Any, ...]

    @property
    def NO_OP_AT_START(self) -> bool:  # noqa: N802  the same data as on a method's class
        return all(m.NO_OP_AT_START for m in self.methods)

    @property
    def prompt_length(self) -> int:
        """The virtual tokens of the method that has them."""
        return self._prompting.prompt_length if self._prompting else 0

    @property
    def num_prompts(self) -> int:
        """The prompts of the method that has them."""
        return self._prompting.num_prompts if self._prompting else 1

    @property
    def position_shift(self) -> int:
        """The positions of all prefixes together."""
        return sum(m.position_shift for m in self.methods)

    @property
    def _prompting(self) -> Any:
        return next((m for m in self.methods if m.prompt_length), None)

    def init(self, key, params, sites: Sites, calibration=None):
        """`((trainable, ...), (frozen, ...))`, one entry a method; every array in exactly one of them.

        `calibration` is a tuple with one entry a method, as `calibrate` makes it for a chain.
        """
        trainables, frozens = [], []
        bound = params
        calibration = (None,) * len(self.methods) if calibration is None else calibration
        if len(calibration) != len(self.methods):
            raise ValueError(f"expected {len(self.methods)} calibrations, one a method, got {len(calibration)}")
        for n, method in enumerate(self.methods):
            given = with_weights(method, calibration[n], params)
            trainable, frozen = method.init(jax.random.fold_in(key, n), bound, sites, given)
            if n:
                supplied = {id(x): k for k, x in enumerate(jax.tree.leaves(bound, is_leaf=_is_none)) if x is not None}
                kept = {id(x) for x in jax.tree.leaves(frozen)}
                here = {id(x) for x in jax.tree.leaves(trainable)}
                # What this method neither holds frozen nor leaves in place is now its own, or gone.
                drop = lambda x, supplied=supplied, kept=kept: None if id(x) in supplied and id(x) not in kept else x
                lost = [x for x in jax.tree.leaves(trainables) if drop(x) is None and id(x) not in here]
                if lost:
                    raise ValueError(
                        f"{method} replaces what an earlier method of the chain trains; put it before that method"
                    )
                trainables = [jax.tree.map(drop, t) for t in trainables]
                frozens = [jax.tree.map(drop, f) for f in frozens]
                refer = lambda x, supplied=supplied: _From(supplied[id(x)]) if id(x) in supplied else x
                bound = method.bind(trainable, frozen)
                frozen = jax.tree.map(refer, frozen)
            else:
                bound = method.bind(trainable, frozen)
            trainables.append(trainable)
            frozens.append(frozen)
        return tuple(trainables), tuple(frozens)

    def bind(self, trainable, frozen, key=None):
        """The tree with all the chain's Weights in it, one inside the other."""
        bound = None
        for n, method in enumerate(self.methods):
            bound = method.bind(trainable[n], _supplied(frozen[n], bound))
        return bound if key is None else randomized(bound, key)

    def trained(self, trainable, frozen=None) -> tuple[Method, Any, Any]:
        """`(method, trainable, frozen)` of the one method that trains, without what the others supply to it.

        Raises:
            ValueError: none trains, or several do.
        """
        which = [n for n, half in enumerate(trainable) if jax.tree.leaves(half)]
        if len(which) != 1:
            kinds = ", ".join(type(method).__name__ for method in self.methods)
            raise ValueError(f"expected a chain of which one method trains, got {len(which)} that do among {kinds}")
        n, emptied = which[0], lambda x: None if _is_place(x) else x
        own = None if frozen is None else jax.tree.map(emptied, frozen[n], is_leaf=_is_place)
        return self.methods[n], trainable[n], own

    def for_steps(self, steps: int) -> Chain:
        """The chain of each method for so many steps."""
        return Chain(tuple(method.for_steps(steps) for method in self.methods))

    def after_training(self, trainable, frozen):
        """What is worth keeping of each method, on what is kept of those before it."""
        kept, old, new = [], None, None
        for method, t, f in zip(self.methods, trainable, frozen, strict=True):
            bound = method.bind(t, _supplied(f, old))
            method, t, f = method.after_training(t, f)
            t, f = _moved(t, old, new, lambda _: None), _moved(f, old, new, _From)
            old, new = bound, method.bind(t, _supplied(f, new))
            kept.append((method, t, f))
        methods, *halves = zip(*kept, strict=True)
        return Chain(methods), *halves

    def optimizer(self, tx):
        """Every method's transformation around the former ones'."""
        for method in self.methods:
            tx = method.optimizer(tx)
        return tx

    def penalty(self, trainable):
        """The sum of the methods' penalties, each on its own trainable tree."""
        return sum(method.penalty(t) for method, t in zip(self.methods, trainable, strict=True))


def chain(*methods) -> Any:
    """Methods one after the other: `chain(NF4(), LoRA())` quantizes, then adapts the quantized weights.

    Its trainable tree is `(first's, second's, ...)`. One method alone is returned as it is.

    Raises:
        ValueError: no methods.
    """
    if not methods:
        raise ValueError("expected at least one method, got chain()")
    flat = [inner for m in methods for inner in (m.methods if isinstance(m, Chain) else (m,))]
    return flat[0] if len(flat) == 1 else Chain(tuple(flat))
