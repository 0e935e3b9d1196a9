"""AdapterFusion: attention over the outputs of trained adapters (Pfeiffer et al. 2020, arXiv 2005.00247).

    y' = y + (Σₙ pₙ·uₙ)·V        pₙ = softmaxₙ((y·Q)·(uₙ·K)),    uₙ = upₙ(act(downₙ(y)))

over num_adapters adapters, trained on a task each and now frozen; the query Q, key K and value V (*stack, *batch, d, d)
train. Q and K start from N(0, 0.02²) and V at the identity: at first the adapters are averaged, nearly. (The paper has
V's other entries at 1e-6.) V is held near the identity by a penalty, 0.01·‖V - I‖² for each, as in the authors' code.

That code, the `adapters` package, gives the queries and keys a bias. A key's bias adds the same to all scores and so
changes nothing; a query's is an option here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.method import Saved
from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.core.tree import leaves_with_paths
from jpeft.core.weight import Weight, matrix_sizes, static, weight
from jpeft.methods._bottleneck import Acting, Bottleneck, _BottleneckMethod

__all__ = ["AdapterFusion", "Fused"]

# The fields of a Bottleneck, and from behind the axis at which those of several are stacked.
_STACKED_AT = {"down": -3, "down_bias": -2, "up": -3, "up_bias": -2, "before": -3, "after": -3}


@weight
class Fused(Acting):
    """Attention over N frozen adapters.

    Shapes: query, key, value (*stack, *batch, d, d); query_bias (*stack, *batch, d) or None; the others as in a
    `Bottleneck` with an axis of N behind the batch axes.
    """

    base: Any
    query: Any
    key: Any
    value: Any
    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    before: Any = None
    after: Any = None
    query_bias: Any = None
    axes: str = static()
    activation: str = static()

    FIELDS = {"query": "hq", "key": "hq", "value": "ho", "query_bias": "q", "down": "nhm", "down_bias": "nm"}
    FIELDS |= {"up": "nmo", "up_bias": "no", "before": "nlh", "after": "nlo"}
    TRAINABLE = frozenset({"query", "key", "value", "query_bias"})
    SAVED = frozenset(_STACKED_AT)

    def adapter(self, n: int) -> Bottleneck:
        """The adapter of a number."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _STACKED_AT}
        own: dict[str, Any] = {f: x if x is None else jnp.take(x, n, axis=_STACKED_AT[f]) for f, x in arrays.items()}
        return Bottleneck(None, **own, axes=self.axes, activation=self.activation)

    def update(self, op, y):
        outputs = jnp.stack([self.adapter(n).update(op, y) for n in range(self.down.shape[-3])], -2)
        query = op.mix(y, self.query)
        if self.query_bias is not None:
            query = query + op.spread(self.query_bias).astype(query.dtype)
        query = op.mix(query, self.key.mT)  # the key's side of the product, once for all adapters
        scores = jnp.sum((query[..., None, :] * outputs).astype(jnp.float32), -1, keepdims=True)
        mixed = jnp.sum(jax.nn.softmax(scores, axis=-2).astype(outputs.dtype) * outputs, -2)
        return op.mix(mixed, self.value)


@dataclass(frozen=True)
class AdapterFusion(_BottleneckMethod):
    """Trained adapters, and in every layer attention over them. Cannot merge, as they cannot.

    Trainable parameters: 3d² for each place. Trained adapters are given to `init` in place of a calibration, see
    `calibration_of`; without them there are fresh ones, as frozen. They are saved with what trains.

    Fields:
        num_adapters: how many are fused.
        targets: where they stand, by kernels; by default feed-forward down projections, as `Pfeiffer`.
        bottleneck, reduction, activation, ln_before, ln_after: of the adapters, as in `Houlsby`; trained ones must have
            just these.
        init_weights, init_std: of fresh adapters.
        query_bias: add a bias to the queries.
        regularization: factor of the penalty ‖V - I‖².

    Raises:
        ValueError: as `Houlsby`; from the constructor: num_adapters below 1, a negative regularization; from `init`:
            adapters of other numbers, sizes or places than the fields say.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, x: x + jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params, x = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}, jnp.ones((2, 8))
        >>> sites = jpeft.find_sites(apply, params, x)
        >>> task = jpeft.Pfeiffer(bottleneck=2)
        >>> trained = [task.bind(*task.init(jax.random.key(n), params, sites)) for n in range(3)]
        >>> fusion = jpeft.AdapterFusion(num_adapters=3, bottleneck=2)
        >>> trainable, frozen = fusion.init(jax.random.key(0), params, sites, fusion.calibration_of(*trained))
        >>> frozen["down"].up.shape
        (3, 2, 8)
    """

    targets: Targets = field(default="down", kw_only=True)
    num_adapters: int = 2
    query_bias: bool = False
    regularization: float = 0.01

    NO_OP_AT_START = False  # type: ignore[assignment]  what the adapters learned shows from the start
    ADDS_FROZEN = "the adapters that are fused"
    SMALL = {"targets": "down/kernel|^(back|expert|torch_head)$", "bottleneck": 5, "init_std": 0.2}

    def __post_init__(self):
        super().__post_init__()
        self._at_least_one("num_adapters")
        if self.regularization < 0:
            raise ValueError(f"expected regularization >= 0, got regularization={self.regularization}")

    def calibration_of(self, *bound) -> dict[str, dict[str, jax.Array]]:
        """What `init` is given of trained adapters: for each one the tree that its method bound.

        Raises:
            ValueError: other adapters than the fields say, or trees with adapters at different places.
        """
        trees = [_adapters(tree) for tree in bound]
        places = [set(tree) for tree in trees]
        if len(trees) != self.num_adapters or not places[0] or any(p != places[0] for p in places):
            at = "; ".join(", ".join(sorted(p)[:3]) or "nowhere" for p in places[:4])
            raise ValueError(
                f"expected {self.num_adapters} trees with an adapter each at the same places, got them at {at}"
            )
        other = {w.activation for tree in trees for w in tree.values()} - {self.activation}
        if other:
            raise ValueError(f"expected adapters with activation={self.activation!r}, got {', '.join(sorted(other))}")
        stacked = lambda path, name, at: jnp.stack([getattr(tree[path], name) for tree in trees], at)
        has = lambda path, name: all(getattr(tree[path], name) is not None for tree in trees)
        return {p: {n: stacked(p, n, at) for n, at in _STACKED_AT.items() if has(p, n)} for p in trees[0]}

    def _calibration_of(self, chosen, calibration):
        given = super()._calibration_of(chosen, calibration)
        saved = any(isinstance(found, Saved) for found in given.values())
        if given and not saved and given.keys() != chosen.keys():
            raise ValueError(
                f"the trained adapters stand at {', '.join(map(str, list(given)[:5]))}, the targets mean "
                f"{', '.join(list(chosen)[:5])}; give AdapterFusion the targets that they were trained with"
            )
        return given

    def wrap(self, key, leaf, site: Site) -> Fused:
        lead, _, width = matrix_sizes(site.shape, site.axes)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        query, key_key, adapters = jax.random.split(key, 3)
        starts = lambda key: 0.02 * jax.random.normal(key, (*lead, width, width), dtype)
        return Fused(
            leaf,
            query=starts(query),
            key=starts(key_key),
            value=jnp.broadcast_to(jnp.eye(width, dtype=dtype), (*lead, width, width)),
            query_bias=jnp.zeros((*lead, width), dtype) if self.query_bias else None,
            **self.arrays(adapters, (*lead, self.num_adapters), width, self.width_of(site), width, dtype),
            axes=site.axes.lstrip("s"),
            activation=self.activation,
        )

    def wrap_calibrated(self, key, leaf, site: Site, given) -> Fused:
        fresh = self.wrap(key, leaf, site)
        trained = {name: x for name, x in (given or {}).items() if name in Fused.SAVED}
        if not trained:
            return fresh
        shape = lambda x: None if x is None else tuple(x.shape)
        wrong = [name for name in sorted(Fused.SAVED) if shape(trained.get(name)) != shape(getattr(fresh, name))]
        if wrong:
            differ = ", ".join(f"{n} {shape(trained.get(n))} for {shape(getattr(fresh, n))}" for n in wrong)
            raise ValueError(f"{site.path}: the trained adapters are not as AdapterFusion's fields say: {differ}")
        return fresh.replace(**trained)

    def penalty(self, trainable):
        """`regularization · ‖V - I‖²` of all places."""
        values = [w.value for _, w in leaves_with_paths(trainable) if isinstance(w, Fused) and w.value is not None]
        return self.regularization * sum(jnp.sum((v - jnp.eye(v.shape[-1], dtype=v.dtype)) ** 2) for v in values)


def _adapters(tree) -> dict[str, Bottleneck]:
    """The one adapter of every leaf that has one."""
    found: dict[str, Bottleneck] = {}
    for path, leaf in leaves_with_paths(tree):
        while isinstance(leaf, Weight):
            if type(leaf) is Bottleneck:
                if path in found:
                    raise ValueError(f"{path}: expected one adapter, got one on another; fuse them one by one")
                found[path] = leaf
            leaf = leaf.base
    return found
