"""Arrays that several leaves share: once in the halves, in every Weight that names them, one for all layers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.core.method import Tied
from jpeft.core.tree import key_for_path
from jpeft.core.weight import Weight, apply, dense, from_matrix, matrix_sizes, static, weight
from jpeft.train import adapter

KEY = jax.random.key(0)
LAYERS, N = 4, 6
RNG = np.random.default_rng(0)
PARAMS = {
    "first": RNG.normal(size=(5, N)).astype(np.float32),
    "layers": RNG.normal(size=(LAYERS, N, N)).astype(np.float32) / 3,
    "last": RNG.normal(size=(N, 3)).astype(np.float32),
}
X = RNG.normal(size=(2, 5)).astype(np.float32)


@weight
class Tinted(Weight):
    """`base + own · shade[:in, :out]`. Shapes: own (*stack, *batch); shade (max in, max out), shared."""

    base: Any
    own: Any
    shade: Any = None
    axes: str = static()
    trains_shade: bool = static(False)

    FIELDS = {"own": "", "shade": "io"}
    SLICEABLE = "io"
    UNSTACKED = frozenset({"shade"})
    SAVED = frozenset({"shade"})

    def trainable_fields(self):
        return frozenset({"own", "shade"} if self.trains_shade else {"own"})

    def tied(self):
        return {"shade": "shade"}

    def fitted(self):
        _, n_in, n_out = matrix_sizes(self.shape, self.labels)
        return super().fitted().replace(shade=self.shade[:n_in, :n_out])

    def apply(self, op, x):
        update = self._update()
        y = op.contract(x, update.mT if op.transposed else update)
        return apply(op, x, self.base) + op.restore(y)

    def dense(self):
        return dense(self.base) + from_matrix(self._update(), self.labels, self.shape)

    def _update(self):
        return self.own[..., None, None] * self.fitted().shade


@dataclass(frozen=True)
class Tint(jpeft.Method):
    targets: Any = field(default="first|layers|last", kw_only=True)
    trains_shade: bool = False

    def shared(self, key, params, chosen):
        sizes = [matrix_sizes(site.shape, site.axes)[1:] for site in chosen.values()]
        largest = tuple(map(max, zip(*sizes, strict=True)))
        return {"shade": 0.2 * jax.random.normal(key_for_path(key, "shade"), largest)}

    def wrap(self, key, leaf, site):
        own = jnp.ones(matrix_sizes(site.shape, site.axes)[0])
        return Tinted(leaf, own, axes=site.axes.lstrip("s"), trains_shade=self.trains_shade)


@dataclass(frozen=True)
class OtherTint(Tint):
    def wrap(self, key, leaf, site):
        made = super().wrap(key, leaf, site)
        return OtherTinted(leaf, made.own, axes=made.axes, trains_shade=self.trains_shade)


@weight
class OtherTinted(Tinted):
    axes: str = static()


def scanned(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["first"], p["layers"])[0] @ p["last"]


def rematerialized(p, x):
    step = jax.checkpoint(lambda h, w: jnp.tanh(h @ w))
    return lax.scan(lambda h, w: (step(h, w), None), x @ p["first"], p["layers"])[0] @ p["last"]


def unrolled(p, x):
    h = x @ p["first"]
    for n in range(LAYERS):
        h = jnp.tanh(h @ p["layers"][n])
    return h @ p["last"]


def mapped(p, x):
    h = each_its_own(x @ p["first"])
    return jax.vmap(lambda w, h: jnp.tanh(h @ w))(p["layers"], h).sum(0) @ p["last"]


def each_its_own(h):
    """An input for each layer."""
    return jnp.arange(1.0, LAYERS + 1)[:, None, None] * h / LAYERS


def cut(p, x):
    """Two halves of every leaf used apart: the shared array is cut along its inputs and its outputs."""
    h = jnp.concatenate([x @ p["first"][:, :2], x @ p["first"][:, 2:]], -1)
    for n in range(LAYERS):
        h = jnp.tanh(h[:, :4] @ p["layers"][n, :4] + h[:, 4:] @ p["layers"][n, 4:])
    return h @ p["last"]


def start(method, fn=scanned):
    sites = jpeft.find_sites(fn, PARAMS, X)
    trainable, frozen = jax.jit(lambda key, p: method.init(key, p, sites))(KEY, PARAMS)
    return sites, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), trainable), frozen


def equals_merged(fn, method, trainable, frozen):
    def run(forward):
        def loss(trainable, frozen):
            out = forward(method.bind(trainable, frozen))
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(trainable, frozen)

    lifted, merged = run(lambda bound: jpeft.lift(fn)(bound, X)), run(lambda bound: fn(jpeft.merge(bound), X))
    for a, b in zip(jax.tree.leaves(lifted), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("trains_shade", [False, True])
def test_a_shared_array_stands_once_in_the_halves_and_in_every_weight(trains_shade):
    _, trainable, frozen = start(Tint(trains_shade=trains_shade))
    holder, other = (trainable, frozen) if trains_shade else (frozen, trainable)
    assert isinstance(holder, Tied) and holder.arrays["shade"].shape == (N, N) and other.arrays["shade"] is None
    assert all(half.tree[name].shade is None for half in (trainable, frozen) for name in PARAMS)
    bound = Tint(trains_shade=trains_shade).bind(trainable, frozen)
    assert all(bound[name].shade is holder.arrays["shade"] for name in PARAMS)
    assert len(jax.tree.leaves((trainable, frozen))) == 2 * len(PARAMS) + 1


@pytest.mark.parametrize("trains_shade", [False, True])
@pytest.mark.parametrize("fn", [scanned, rematerialized, unrolled, mapped, cut])
def test_it_goes_through_every_way_to_use_layers(fn, trains_shade):
    method = Tint(trains_shade=trains_shade)
    _, trainable, frozen = start(method, fn)
    equals_merged(fn, method, trainable, frozen)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shard_map_splits_the_leaf_and_what_of_the_shared_array_belongs_to_it(axis):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    layers = P(*("x" if k == axis else None for k in range(3)))

    def local(w, h):
        y = jnp.einsum("lbi,lio->lbo", h, w)
        return lax.psum(y, "x") if axis == 1 else y

    def fn(p, x):
        split = {0: (P("x"), P("x")), 1: (P(None, None, "x"), P()), 2: (P(), P(None, None, "x"))}[axis]
        each = jax.shard_map(local, mesh=mesh, in_specs=(layers, split[0]), out_specs=split[1])
        return jnp.tanh(each(p["layers"], each_its_own(x @ p["first"]))).sum(0) @ p["last"]

    method = Tint(trains_shade=True)
    _, trainable, frozen = start(method, fn)
    equals_merged(fn, method, trainable, frozen)


def test_masks_refuse_what_several_leaves_train_wherever_it_stands():
    method = Tint()
    mask = jpeft.trainable_mask(method.bind(*start(method)[1:]))
    assert sum(jax.tree.leaves(mask)) == len(PARAMS)
    for method in (Tint(trains_shade=True), jpeft.chain(Tint(trains_shade=True), jpeft.LoRA(rank=2))):
        bound = method.bind(*start(method)[1:])
        for ask in (jpeft.trainable_mask, jpeft.labels):
            with pytest.raises(ValueError, match="first, last, layers share what they train; .*half that `init` gives"):
                ask(bound)


@pytest.mark.parametrize("trains_shade", [False, True])
def test_it_is_counted_once(trains_shade):
    method = Tint(trains_shade=trains_shade)
    _, trainable, frozen = start(method)
    bound = method.bind(trainable, frozen)
    own, base, shade = 2 + LAYERS, sum(x.size for x in PARAMS.values()), N * N
    expected = (own + shade * trains_shade, base + own + shade)
    for tree in (bound, jax.eval_shape(lambda: bound), jax.jit(method.bind)(trainable, frozen)):
        assert (jpeft.count(tree).trainable, jpeft.count(tree).total) == expected
    assert jpeft.count(trainable).trainable == jpeft.count(trainable).total == expected[0]
    assert (jpeft.count(frozen).trainable, jpeft.count(frozen).total) == (0, expected[1] - expected[0])


CHAINS = {
    "two": jpeft.chain(Tint(), OtherTint(trains_shade=True)),
    "itself": jpeft.chain(Tint(trains_shade=True), Tint(trains_shade=True)),
    "on other leaves": jpeft.chain(Tint(targets=["first", "layers"]), OtherTint(targets=["layers", "last"])),
    "within": jpeft.chain(jpeft.LoRA(rank=2, targets="layers"), Tint(), jpeft.LoRA(rank=2, targets="last")),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_keep_every_array_once(name):
    method = CHAINS[name]
    _, trainable, frozen = start(method)
    equals_merged(scanned, method, trainable, frozen)
    bound = method.bind(trainable, frozen)
    arrays = jax.tree.leaves((trainable, frozen))
    assert {id(x) for x in jax.tree.leaves(bound)} == {id(x) for x in arrays} and len({*map(id, arrays)}) == len(arrays)
    for tree in (bound, jax.eval_shape(lambda: bound)):
        assert jpeft.count(tree).total == sum(x.size for x in arrays)
        assert jpeft.count(tree).trainable == sum(x.size for x in jax.tree.leaves(trainable))
    assert jpeft.count(trainable).trainable == sum(x.size for x in jax.tree.leaves(trainable))


@pytest.mark.parametrize("name", CHAINS)
def test_a_shared_array_is_saved_where_nothing_can_make_it_again(name, tmp_path):
    method = CHAINS[name]
    sites, trainable, frozen = start(method)
    frozen = jax.tree.map(_other_shade, frozen, is_leaf=lambda x: isinstance(x, Tied))
    mark = adapter.fingerprint(PARAMS)
    adapter.save_adapter(tmp_path, method, trainable, frozen, base="here", base_fingerprint=mark, seed=0)
    methods = {"Tint": Tint, "OtherTint": OtherTint, "LoRA": jpeft.LoRA}
    loaded = adapter.load_adapter(tmp_path, PARAMS, sites, methods)
    assert loaded[0] == method and jax.tree.structure(loaded[1:]) == jax.tree.structure((trainable, frozen))
    for a, b in zip(jax.tree.leaves(loaded[1:]), jax.tree.leaves((trainable, frozen)), strict=True):
        np.testing.assert_array_equal(a, b)


def _other_shade(half):
    """The half with a shade that no key gives, as another program's adapter would have."""
    if not isinstance(half, Tied) or half.arrays["shade"] is None:
        return half
    return dataclasses.replace(half, arrays={"shade": 1 + half.arrays["shade"]})
