"""lift(fn) on a tree of Weights equals fn on the merged tree, or refuses."""

import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.core.weight import Layer, Unfrozen, Weight, array_of, from_matrix, matrix_sizes, static, to_matrix, weight
from jpeft.methods.lora import LowRank

KINDS = ("dense", "experts", "embedding", "conv")


def numbers(*shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) / 2).astype(dtype)


def adapted(leaf, axes, rank=2, **options):
    """A leaf under random low-rank factors."""
    lead, n_in, n_out = matrix_sizes(leaf.shape, axes)
    dtype = np.promote_types(np.float32, leaf.dtype) if leaf.dtype != jnp.bfloat16 else np.float32
    a, b = numbers(*lead, n_in, rank, dtype=dtype), numbers(*lead, rank, n_out, seed=1, dtype=dtype)
    return LowRank(jnp.asarray(leaf), jnp.asarray(a), jnp.asarray(b), axes=axes.lstrip("s"), **options)


def adapt(fn, params, *inputs, only=""):
    """The tree with every matrix adapted, its axes read by `find_sites`."""
    chosen = {}
    for site in jpeft.find_sites(fn, params, *inputs):
        if site.kind in KINDS and re.search(only, site.path):
            chosen.setdefault(site.path, site.axes)
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]
    return jax.tree.unflatten(structure, [adapted(x, chosen[p]) if p in chosen else jnp.asarray(x) for p, x in leaves])


def agree(fn, bound, *inputs, tolerance=2e-5, densify=None):
    """lift(fn) equals fn of the merged tree, and so do the gradients of the factors."""
    lifted = jpeft.lift(fn, densify=densify)
    merged = lambda bound, *inputs: fn(jpeft.merge(bound), *inputs)
    loss = lambda f: (
        lambda bound, *inputs: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(f(bound, *inputs)))
    )

    @jax.jit
    def run(bound, *inputs):
        grads = [jax.grad(loss(f), allow_int=True)(bound, *inputs) for f in (lifted, merged)]
        return lifted(bound, *inputs), merged(bound, *inputs), *grads

    out, expected, grad, expected_grad = run(bound, *inputs)
    factors = lambda tree: [
        (w.a, w.b) for w in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LowRank)) if isinstance(w, LowRank)
    ]
    pairs = zip(jax.tree.leaves((out, factors(grad))), jax.tree.leaves((expected, factors(expected_grad))), strict=True)
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(got / scale, wanted / scale, atol=tolerance, rtol=0)
    return out


# ---- products ----

EINSUMS = [
    ("bi,io->bo", (3, 4), (4, 5)),
    ("io,bi->bo", (4, 5), (3, 4)),  # the leaf on the left
    ("bi,oi->bo", (3, 4), (5, 4)),
    ("io,bi->ob", (4, 5), (3, 4)),
    ("btd,dhk->bthk", (2, 3, 4), (4, 2, 5)),
    ("btd,hdk->bhtk", (2, 3, 4), (2, 4, 5)),  # outputs on both sides of the input axis
    ("bthk,hkd->btd", (2, 3, 2, 5), (2, 5, 4)),
    ("btkh,hkd->btd", (2, 3, 5, 2), (2, 5, 4)),  # contracted in another order than stored
    ("btd,cdkh->cbtkh", (2, 3, 4), (2, 4, 3, 5)),  # fused
    ("ebd,edf->ebf", (2, 3, 4), (2, 4, 5)),  # experts
    ("bed,edf->bef", (3, 2, 4), (2, 4, 5)),
    ("bed,def->bef", (3, 2, 4), (4, 2, 5)),
    ("egbd,gedf->ebgf", (2, 3, 2, 4), (3, 2, 4, 5)),  # two batch axes, in another order
    ("bd,do->b", (3, 4), (4, 1)),
    ("bd,d->b", (3, 4), (4,)),
]


@pytest.mark.parametrize(("spec", "x", "w"), EINSUMS, ids=[e[0] for e in EINSUMS])
def test_einsums(spec, x, w):
    left, _ = spec.split("->")[0].split(",")
    first = len(left) == len(x) and spec not in ("io,bi->bo", "io,bi->ob")
    x, w = (x, w) if first else (w, x)
    fn = lambda p, x: jnp.einsum(spec, *((x, p["w"]) if first else (p["w"], x)))
    agree(fn, adapt(fn, {"w": numbers(*w)}, numbers(*x)), numbers(*x))


@weight
class Between(Weight):
    """`left @ base @ right` in matrix form: what orthogonal and scaling methods do to inputs and outputs."""

    base: jax.Array
    left: jax.Array
    right: jax.Array
    axes: str = static()

    FIELDS = {"left": "ij", "right": "po"}

    def apply(self, op, x):
        left, right = (self.right.mT, self.left.mT) if op.transposed else (self.left, self.right)
        y = op.base(op.map_inputs(x, lambda h: op.mix(h, left)), self.base)
        return op.map_outputs(y, lambda h: op.mix(h, right))

    def dense(self):
        matrix = to_matrix(self.base, self.labels)
        return from_matrix(self.left @ matrix @ self.right, self.labels, self.shape)


@pytest.mark.parametrize(("spec", "x", "w"), EINSUMS, ids=[e[0] for e in EINSUMS])
def test_maps_of_inputs_and_outputs(spec, x, w):
    left, _ = spec.split("->")[0].split(",")
    first = len(left) == len(x) and spec not in ("io,bi->bo", "io,bi->ob")
    x, w = (x, w) if first else (w, x)
    x, w = numbers(*x), jnp.asarray(numbers(*w))
    fn = lambda p, x: jnp.einsum(spec, *((x, p["w"]) if first else (p["w"], x)))
    axes = next(s.axes for s in jpeft.find_sites(fn, {"w": w}, x))
    lead, n_in, n_out = matrix_sizes(w.shape, axes)
    bound = {"w": Between(w, numbers(*lead, n_in, n_in), numbers(*lead, n_out, n_out), axes=axes)}
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), fn(jpeft.merge(bound), x), atol=2e-5)


@weight
class OneRow(Weight):
    """What the leaf makes of one row of the inputs, for all of them."""

    base: jax.Array
    axes: str = static()

    def apply(self, op, x):
        rows, batch = op.inputs(x), self.labels.count("b")
        row = rows.reshape(*rows.shape[:batch], -1, rows.shape[-1])[..., 0, :]
        return jnp.broadcast_to(op.base(op.as_inputs(row), self.base), op.base(x, self.base).shape)

    def dense(self):
        return self.base


@pytest.mark.parametrize(("spec", "x", "w"), EINSUMS, ids=[e[0] for e in EINSUMS])
def test_other_inputs_go_the_way_of_the_equation_s_own(spec, x, w):
    first = not spec.startswith("io,")
    x, w = (numbers(*x), numbers(*w)) if first else (numbers(*w), numbers(*x))
    letters = spec.split("->")[0].split(",")[:: 1 if first else -1]
    free = tuple(k for k, c in enumerate(letters[0]) if c not in letters[1])
    x = jnp.broadcast_to(x.mean(free, keepdims=True), x.shape)
    fn = lambda p, x: jnp.einsum(spec, *((x, p["w"]) if first else (p["w"], x)))
    axes = next(s.axes for s in jpeft.find_sites(fn, {"w": w}, x))
    got = jpeft.lift(fn)({"w": OneRow(jnp.asarray(w), axes=axes)}, x)
    np.testing.assert_allclose(got, fn({"w": w}, x), atol=1e-6)


def test_maps_of_a_tied_head():
    fn = lambda p, x: (x @ p["w"].T, x[:, :3] @ p["w"])
    w, x = jnp.asarray(numbers(3, 4)), numbers(2, 4)
    bound = {"w": Between(w, numbers(3, 3), numbers(4, 4), axes="io")}
    for got, wanted in zip(jpeft.lift(fn)(bound, x), fn(jpeft.merge(bound), x), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_every_order_of_dot_general_with_every_layout_of_the_leaf():
    x = numbers(3, 2, 4)

    def fn(p, x):
        w = p["w"]  # (2, 4, 5): experts, in, out
        dims = lambda *d: tuple(tuple(map(tuple, pair)) for pair in d)
        yield lax.dot_general(x, w, dims(([2], [1]), ([1], [0])))
        yield lax.dot_general(w, x, dims(([1], [2]), ([0], [1])))
        yield lax.dot_general(x, w.transpose(2, 0, 1), dims(([2], [2]), ([1], [1])))
        yield lax.dot_general(w.transpose(1, 2, 0), x, dims(([0], [2]), ([2], [1])))

    listed = lambda p, x: list(fn(p, x))
    agree(listed, {"w": adapted(numbers(2, 4, 5), "bio")}, x)


def test_transposes_and_reshapes_that_merge_and_split_axes():
    x = numbers(3, 12)

    def fn(p, x):
        w = p["w"]  # (3, 4, 2, 5)
        yield x @ w.reshape(12, 10)
        yield (x @ w.reshape(6, 2, 10).reshape(12, 10)).reshape(3, 2, 5)
        yield jnp.einsum("bji,ijo->bo", x.reshape(3, 2, 6), w.reshape(6, 2, 10))
        yield x @ w.transpose(0, 1, 3, 2).reshape(12, 10)
        yield x.reshape(3, 3, 4).transpose(0, 2, 1).reshape(3, 12) @ w.transpose(1, 0, 2, 3).reshape(12, 10)
        yield x.reshape(3, 1, 12) @ w.reshape(12, 10)[None]
        yield x @ jnp.squeeze(w.reshape(12, 1, 10, 1), (1, 3))
        yield x @ jnp.expand_dims(w, (0, 3)).reshape(12, 10)

    agree(lambda p, x: list(fn(p, x)), {"w": adapted(numbers(3, 4, 2, 5), "iioo")}, x)


def test_a_tied_head_contracts_the_outputs_of_the_embedding():
    def fn(p, tokens):
        x = p["embed"][tokens]
        return x @ p["embed"].T, jnp.einsum("bd,vd->vb", x, p["embed"]), jnp.take(p["embed"], tokens, axis=0)

    tokens = jnp.array([3, 0, 6])
    bound = adapt(fn, {"embed": numbers(7, 4)}, tokens)
    assert bound["embed"].axes == "io"
    agree(fn, bound, tokens)


def test_row_lookups():
    tokens = jnp.array([[3, 0], [6, 6]])

    def fn(p, tokens):
        yield p["w"][tokens]
        yield p["w"].at[tokens].get(mode="clip")
        yield p["w"].T[:, tokens]
        yield p["w"].reshape(7, 2, 2)[tokens]
        yield p["w"][tokens[0, 0]]  # one row is a vector
        yield p["w"][2]
        yield jax.vmap(lambda t: p["w"][t])(tokens[0])

    agree(lambda p, t: list(fn(p, t)), {"w": adapted(numbers(7, 4), "io")}, tokens)


@pytest.mark.parametrize(
    "options", [{}, {"window_strides": (2, 1)}, {"rhs_dilation": (2, 1)}, {"lhs_dilation": (1, 2)}]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(options, groups):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}

    def fn(p, x):
        conv = functools.partial(lax.conv_general_dilated, feature_group_count=groups, **options)
        y = conv(x, p["hwio"], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y, conv(x.transpose(0, 3, 1, 2), p["oihw"], dimension_numbers=("NCHW", "OIHW", "NCHW"))

    x = numbers(2, 5, 4, 4)
    params = {"hwio": numbers(3, 2, 4 // groups, 8), "oihw": numbers(8, 4 // groups, 3, 2)}
    if "lhs_dilation" in options:
        options["padding"] = ((1, 1), (0, 1))
    bound = adapt(fn, params, x)
    assert (bound["hwio"].axes, bound["oihw"].axes) == ("iiio", "oiii")
    agree(fn, bound, x)


def test_grouped_products():
    sizes = jnp.array([2, 0, 3])

    def fn(p, x):
        yield lax.ragged_dot(x, p["up"], sizes)
        yield lax.ragged_dot(x, p["down"].transpose(0, 2, 1), sizes)
        yield lax.ragged_dot(x, p["split"].reshape(3, 4, 6), sizes)

    listed = lambda p, x: list(fn(p, x))
    x = numbers(5, 4)
    bound = adapt(listed, {"up": numbers(3, 4, 6), "down": numbers(3, 6, 4), "split": numbers(3, 4, 2, 3)}, x)
    assert [bound[k].axes for k in ("up", "down", "split")] == ["bio", "boi", "bioo"]
    agree(listed, bound, x)


def test_lower_precision():
    w, x = jnp.asarray(numbers(4, 5), jnp.bfloat16), jnp.asarray(numbers(3, 4), jnp.bfloat16)
    fn = lambda p, x: (x @ p["w"], x.astype(jnp.float32) @ p["w"].astype(jnp.float32))
    bound = {"w": adapted(w, "io")}
    low, high = agree(fn, bound, x, tolerance=3e-2)
    assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
    cast = lambda p, x: x @ p["w"].astype(jnp.bfloat16)
    assert agree(cast, {"w": adapted(numbers(4, 5), "io")}, x, tolerance=3e-2).dtype == jnp.bfloat16


# ---- parts of a leaf ----


def test_slices_of_a_fused_projection():
    x = numbers(3, 4)

    def fn(p, x):
        yield x @ p["qkv"][:, :6]
        yield x @ p["qkv"][:, 6:]
        yield x @ lax.dynamic_slice_in_dim(p["qkv"], jnp.int32(3), 6, axis=1)
        yield [x @ part for part in jnp.split(p["qkv"], 3, axis=1)]
        yield x[:, :2] @ p["qkv"][:2]
        yield [jnp.einsum("bd,dkh->bkh", x, p["stacked"][k]) for k in range(3)]
        yield [jnp.einsum("bd,dkh->bkh", x, part) for part in p["stacked"]]  # iteration unstacks
        yield jnp.einsum("bd,cdkh->cbkh", x, p["stacked"][:2])

    listed = lambda p, x: list(fn(p, x))
    bound = {"qkv": adapted(numbers(4, 12), "io"), "stacked": adapted(numbers(3, 4, 2, 3), "oioo")}
    agree(listed, bound, x)


def test_layers_taken_from_a_stack_one_by_one():
    x = numbers(3, 4)

    def fn(p, x):
        for n in range(3):
            x = jnp.tanh(x @ p["w"][n])
        x = lax.fori_loop(0, 3, lambda n, x: jnp.tanh(x @ p["w"][n]), x)
        x = lax.fori_loop(0, 3, lambda n, x: x @ lax.dynamic_index_in_dim(p["w"], n, keepdims=False), x)
        x = x @ p["last_axis"][..., 1]
        for layer in p["w"]:
            x = x @ layer
        return x @ p["one"].reshape(4, 4)

    params = {"w": numbers(3, 4, 4), "last_axis": numbers(4, 4, 2), "one": numbers(1, 4, 4)}
    bound = {k: adapted(params[k], axes) for k, axes in (("w", "sio"), ("last_axis", "ios"), ("one", "sio"))}
    sites = jpeft.find_sites(fn, params, x)
    assert [sites[k].axes for k in ("w", "last_axis")] == ["sio", "ios"]
    agree(fn, bound, x)


# ---- bodies that are entered ----


def layer(x, w):
    return jnp.tanh(x @ w["kernel"] + w["bias"]), None


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(axis, remat):
    shape = [4, 4]
    shape.insert(axis, 3)

    def fn(p, x):
        stacked = {"kernel": jnp.moveaxis(p["kernel"], axis, 0), "bias": p["bias"]}
        policy = jax.checkpoint_policies.dots_saveable
        return lax.scan(jax.checkpoint(layer, policy=policy) if remat else layer, x, stacked, unroll=2)[0]

    params, x = {"kernel": numbers(*shape), "bias": numbers(3, 4)}, numbers(2, 4)
    bound = adapt(fn, params, x)
    assert bound["kernel"].labels == "".join("s" if k == axis else "i" if k == (axis == 0) else "o" for k in range(3))
    agree(fn, bound, x)


def test_nested_scans_and_layers_in_reverse():
    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), x.sum())
        outer = lambda x, w: lax.scan(inner, x, w)
        return lax.scan(outer, x, p["w"], reverse=True)

    params, x = {"w": numbers(2, 3, 4, 4)}, numbers(2, 4)
    bound = adapt(fn, params, x)
    assert bound["w"].labels == "ssio" and bound["w"].axes == "io"
    agree(fn, bound, x)


@weight
class DoubledFrom(Weight):
    """The layers from `first` on count twice."""

    base: jax.Array
    axes: str = static()
    first: int = static(0)

    def cuts(self):
        return (self.first,)

    def along(self, axis, fn, *, drop=False):
        layers = np.asarray(fn(np.arange(self.shape[axis]), 0))
        assert layers.max() < self.first or layers.min() >= self.first, "taken apart where the layers differ"
        return Unfrozen(fn(self.base, axis) * (1 + (layers.min() >= self.first)), axes=self.axes)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_taken_apart_where_the_layers_of_a_weight_differ(reverse):
    def fn(p, x):
        body = lambda x, layer: (jnp.tanh(x @ layer[0] @ layer[1]), (x, layer[2]))
        return lax.scan(body, x, (p["w"], p["v"], jnp.arange(4)), reverse=reverse)

    p, x = {"w": numbers(4, 5, 5), "v": numbers(4, 5, 5, seed=1)}, numbers(2, 5)
    twice = lambda w, first: w * (1 + (np.arange(4) >= first))[:, None, None]
    weights = {n: DoubledFrom(jnp.asarray(p[n]), axes="io", first=k) for n, k in (("w", 1), ("v", 3))}
    expected = fn({"w": twice(p["w"], 1), "v": twice(p["v"], 3)}, x)
    for a, b in zip(jax.tree.leaves(jpeft.lift(fn)(weights, x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    adapted_too = weights | {"v": adapted(p["v"], "sio")}  # is cut with its neighbour
    merged = {"w": twice(p["w"], 1), "v": adapted_too["v"].dense()}
    np.testing.assert_allclose(jpeft.lift(fn)(adapted_too, x)[0], fn(merged, x)[0], atol=1e-5)


@weight
class InStack(Weight):
    """A frozen leaf that a scan leaves in its stack."""

    base: jax.Array
    axes: str = static()
    LEFT_WHOLE = frozenset({"base"})
    SLICEABLE = "io"
    seen = []

    def apply(self, op, x):
        self.seen.append(type(self.base))
        return op.base(x, self.dense())

    def dense(self):
        return array_of(self.base)


def layers_in_their_stack(*lead):
    """A leaf in its stack and adapters around it."""
    a, b = numbers(*lead, 5, 2), numbers(*lead, 2, 5, seed=1)
    return LowRank(InStack(jnp.asarray(numbers(*lead, 5, 5)), axes="io"), jnp.asarray(a), jnp.asarray(b), axes="io")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_weight_may_stay_in_its_stack_while_it_is_scanned(reverse):
    def layer(x, w):
        x = jnp.tanh(x @ w)
        return jnp.tanh(x @ w[:, 1:]) @ w.T[1:], x.sum()

    fn = lambda p, x: lax.scan(jax.checkpoint(layer), x, p["w"], reverse=reverse)
    InStack.seen.clear()
    agree(fn, {"w": layers_in_their_stack(3)}, jnp.asarray(numbers(2, 5)))
    assert Layer in InStack.seen


def test_a_stack_of_stacks_is_cut_out_once_and_a_stack_on_another_axis_moved_first():
    inner = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    fn = lambda p, x: lax.scan(inner, x, p["w"])[0]
    agree(fn, {"w": layers_in_their_stack(3, 2)}, jnp.asarray(numbers(2, 5)))
    moved = lambda p, x: lax.scan(inner, x, p["w"].swapaxes(0, 1))[0]
    agree(moved, {"w": layers_in_their_stack(3, 2)}, jnp.asarray(numbers(2, 5)))


def test_what_stays_in_its_stack_is_put_out_by_no_scan():
    fn = lambda p, x: lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0].sum()
    p, x = {"w": layers_in_their_stack(7)}, jnp.asarray(numbers(2, 5))
    loss = lambda a: jpeft.lift(fn)({"w": p["w"].replace(a=a)}, x)
    scans = [eqn for eqn in jax.make_jaxpr(jax.grad(loss))(p["w"].a).eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2 and not [v for eqn in scans for v in eqn.outvars if v.aval.shape == (7, 5, 5)]


def test_a_shard_map_in_a_scan_takes_a_layer_cut_out_of_its_stack():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    part = lambda x, w: lax.psum(x @ w, "x")
    local = jax.shard_map(part, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P())
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(local(x, w)), None), x, p["w"])[0]
    agree(fn, {"w": InStack(jnp.asarray(numbers(3, 4, 4)), axes="io")}, jnp.asarray(numbers(2, 4)))


def test_leaves_that_pass_through_a_scan_or_a_remat_stay_what_they_are():
    def fn(p, x):
        body = lambda x, w: (x @ w, w)
        x, same = lax.scan(body, x, p["w"])
        again = jax.checkpoint(lambda w: w)(same)
        return lax.scan(lambda x, w: (x @ w, None), x, again)[0]

    params, x = {"w": numbers(2, 4, 4)}, numbers(2, 4)
    agree(fn, {"w": adapted(params["w"], "sio")}, x)


def test_branches_loops_and_calls():
    def fn(p, x, flag):
        x = lax.cond(flag > 0, lambda w, x: x @ w, lambda w, x: 2 * x @ w, p["w"], x)
        x = lax.switch(flag, [lambda: x @ p["v"], lambda: x @ p["v"].T, lambda: x])
        x = jax.jit(lambda w, x: x @ w)(p["w"], x)
        x = jax.jit(lambda x: x @ p["w"])(x)
        return jnp.tanh(jax.checkpoint(lambda w, x: x @ w, prevent_cse=False)(p["v"], x))

    params, x = {"w": numbers(4, 4), "v": numbers(4, 4, seed=3)}, numbers(2, 4)
    bound = adapt(fn, params, x, 1)
    agree(fn, bound, x, jnp.int32(1))


def test_a_while_loop():
    def fn(p, x):
        more = lambda carry: (carry[0] < 3) & (jnp.sum(carry[1] @ p["w"]) < 1e6)
        return lax.while_loop(more, lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ p["w"])), (0, x))

    params, x = {"w": numbers(4, 4)}, numbers(2, 4)
    bound = adapt(fn, params, x)
    out = jax.jit(jpeft.lift(fn))(bound, x)
    np.testing.assert_allclose(out[1], fn(jpeft.merge(bound), x)[1], atol=1e-5)


def test_nnx_remat_and_a_scan_that_returns_its_layers():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = Block(rngs)
            self.layers = nnx.vmap(Block)(rngs.split(3))

        def __call__(self, x):
            x = nnx.remat(lambda block, x: block(x))(self.first, x)
            return nnx.scan(nnx.remat(lambda x, b: b(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    apply, params = jpeft.from_nnx(Model(nnx.Rngs(0)))
    agree(apply, adapt(apply, params, numbers(2, 4)), numbers(2, 4))


def test_stopped_gradients_stay_stopped():
    fn = lambda p, x: x @ lax.stop_gradient(p["w"])
    bound = {"w": adapted(numbers(4, 5), "io")}
    agree(fn, bound, numbers(3, 4))
    grads = jax.grad(lambda b: jpeft.lift(fn)(b, numbers(3, 4)).sum())(bound)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


# ---- around it ----


def test_jit_grad_and_vmap_around():
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    bounds = [{"w": adapted(numbers(4, 5, seed=n), "io")} for n in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *bounds)
    x = numbers(3, 4)
    each = jnp.stack([jpeft.lift(fn)(b, x) for b in bounds])
    np.testing.assert_allclose(jax.vmap(jpeft.lift(fn), (0, None))(stacked, x), each, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jpeft.lift(fn), (0, None)))(stacked, x), each, atol=1e-6)
    rows = jax.vmap(lambda x: jpeft.lift(fn)(bounds[0], x))(x)
    np.testing.assert_allclose(rows, each[0], atol=1e-6)


def counted(fn):
    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        return fn(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


def test_a_second_call_is_no_retrace():
    fn = counted(lambda p, x: x @ p["w"])
    bound, x = {"w": adapted(numbers(4, 5), "io")}, numbers(3, 4)
    for _ in range(3):
        jpeft.lift(fn)(bound, x)
    assert fn.calls == 1
    jpeft.lift(fn)({"w": bound["w"].replace(a=bound["w"].a * 2)}, x)
    assert fn.calls == 1
    jpeft.lift(fn)(bound, numbers(2, 4))
    assert fn.calls == 2
    jpeft.lift(fn)(bound, jnp.asarray(x, jnp.bfloat16))
    assert fn.calls == 3


def test_a_method_of_an_object_is_traced_once():
    class Model:
        calls = 0

        def apply(self, p, x):
            self.calls += 1
            return x @ p["w"]

    model, bound = Model(), {"w": adapted(numbers(4, 5), "io")}
    for _ in range(2):
        jpeft.lift(model.apply)(bound, numbers(3, 4))
    assert model.calls == 1


def test_what_a_function_closes_over_is_read_at_every_trace():
    bound, x = {"w": adapted(numbers(4, 5), "io")}, numbers(3, 4)

    def step(bound, x, gain):
        fn = lambda p, x: gain * (x @ p["w"])
        return jpeft.lift(fn)(bound, x)

    first = jax.jit(step)(bound, x, 2.0)
    second = jax.jit(lambda *args: step(*args) + 0)(bound, x, 3.0)
    np.testing.assert_allclose(second, 1.5 * first, rtol=1e-5)

    holder = {}
    same = lambda p, x: holder["gain"] * (x @ p["w"])  # one function, two traced values in turn

    def inside(bound, x, gain):
        holder["gain"] = gain
        return jpeft.lift(same)(bound, x)

    np.testing.assert_allclose(jax.jit(inside)(bound, x, 2.0), first, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda *args: inside(*args) + 0)(bound, x, 3.0), second, rtol=1e-5)


def test_constants_of_a_function_and_of_its_bodies_are_kept():
    table = jnp.arange(1.0, 6.0)
    jitted = jax.jit(lambda x: x * table)
    fn = lambda p, x: lax.scan(lambda c, _: (c + table, None), jitted(x @ p["w"]) + table, length=2)[0]
    agree(fn, {"w": adapted(numbers(4, 5), "io")}, numbers(3, 4))


def test_a_function_and_what_it_closes_over_are_not_kept_alive():
    bound, x = {"w": adapted(numbers(4, 5), "io")}, numbers(3, 4)

    class Big:
        pass

    big = Big()
    watch = weakref.ref(big)
    fn = lambda p, x, big=big: x @ p["w"] if big else None
    jpeft.lift(fn)(bound, x)
    del fn, big
    gc.collect()
    assert watch() is None


def test_static_arguments_and_keywords_reach_the_function_as_they_are():
    def fn(p, x, scale, *, mode="plain", gain=None):
        assert isinstance(scale, (int, float)) and isinstance(mode, str)
        out = x @ p["w"] * scale
        assert type(scale) is not float or str(scale) != "-0.0" or mode == "signed"
        return (out if gain is None else out * gain), (1.0 / scale if mode == "float" else type(scale) is int)

    bound, x = {"w": adapted(numbers(4, 5), "io")}, numbers(3, 4)
    lifted = jpeft.lift(fn)
    whole, is_int = lifted(bound, x, 1)
    assert bool(is_int)
    assert not bool(lifted(bound, x, 1.0)[1]), "1 and 1.0 are two traces"
    assert not bool(lifted(bound, x, True)[1])
    np.testing.assert_allclose(lifted(bound, x, scale=2, gain=jnp.float32(3))[0], 6 * whole, rtol=1e-5)
    lifted(bound, x, 2.0, mode="float")
    assert jnp.signbit(jpeft.lift(lambda p, x, s: (x @ p["w"]) * 0 + s * jnp.float32(1))(bound, x, 0.0)).sum() == 0
    copy = lambda p, x, s: (jnp.sum(x @ p["w"]) * 0, jnp.float32(s))
    assert not jnp.signbit(jpeft.lift(copy)(bound, x, 0.0)[1]) and jnp.signbit(jpeft.lift(copy)(bound, x, -0.0)[1])


def test_arguments_that_cannot_be_hashed_are_traced_every_time():
    class Odd:
        __hash__ = None

    fn = counted(lambda p, x, odd: x @ p["w"])
    bound = {"w": adapted(numbers(4, 5), "io")}
    for _ in range(2):
        jpeft.lift(fn)(bound, numbers(3, 4), Odd())
    assert fn.calls == 2

    class Callable:
        __hash__ = None

        def __call__(self, p, x):
            return x @ p["w"]

    assert jpeft.lift(Callable())(bound, numbers(3, 4)).shape == (3, 5)


def test_without_weights_it_is_the_function():
    fn = lambda p, x, flag: (x @ p["w"], flag)
    out, flag = jpeft.lift(fn)({"w": numbers(4, 5)}, numbers(3, 4), "as it is")
    assert flag == "as it is" and out.shape == (3, 5)


# ---- refusals ----


@jax.custom_vjp
def fast_matmul(x, w):
    return x @ w


fast_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def soft(w):
    return jnp.exp(w)


soft.defjvp(lambda primals, tangents: (soft(*primals), soft(*primals) * tangents[0]))

REFUSED = {
    "mul": lambda p, x: x @ (2.0 * p["layers"]["w"]),
    "add": lambda p, x: x @ (p["layers"]["w"] + p["layers"]["w"].mean()),
    "custom_vjp_call": lambda p, x: fast_matmul(x, p["layers"]["w"]),
    "custom_jvp_call": lambda p, x: x @ soft(p["layers"]["w"]),
    "concatenate": lambda p, x: x @ jnp.concatenate([p["layers"]["w"]] * 2, axis=1),
    "broadcast_in_dim": lambda p, x: jnp.broadcast_to(p["layers"]["w"], (3, 4, 5)) + x[:, :, None],
    "dot_general": lambda p, x: p["layers"]["w"].T @ p["layers"]["w"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_matrix_never_becomes_dense_silently(name):
    fn, x = REFUSED[name], numbers(3, 4)
    bound = {"layers": {"w": adapted(numbers(4, 5), "io"), "v": adapted(numbers(4, 5), "io")}}
    with pytest.raises(jpeft.DensifyError) as error:
        jpeft.lift(fn)(bound, x)
    message = str(error.value)
    assert "'layers/w'" in message and "LowRank" in message and "(4, 5)" in message
    primitive = {"add": "reduce_sum"}.get(name, name)
    assert f"`{primitive}` at " in message and "test_lift.py:" in message
    assert "densify='layers/w'" in message and "targets" in message
    with pytest.raises(jpeft.DensifyError):
        jpeft.lift(fn, densify="layers/v")(bound, x)
    agree(fn, bound, x, densify="layers/w")


def test_returning_a_matrix_is_refused():
    bound = {"w": adapted(numbers(4, 5), "io")}
    with pytest.raises(jpeft.DensifyError, match="the function's result"):
        jpeft.lift(lambda p: p["w"].T)(bound)
    merged = jpeft.merge(bound)["w"]
    np.testing.assert_allclose(jpeft.lift(lambda p: p["w"].T, densify="w")(bound), merged.T, atol=1e-6)
    twice = jpeft.lift(lambda p: lax.cond(True, lambda: p["w"], lambda: p["w"]), densify="w")(bound)
    np.testing.assert_allclose(twice, merged, atol=1e-6)


def test_a_stack_carried_or_scanned_over_a_matrix_axis_is_refused():
    bound, x = {"w": adapted(numbers(4, 4), "io")}, numbers(4, 4)
    rows = lambda p, x: lax.scan(lambda c, w: (c + w.sum(), None), 0.0, p["w"])[0]
    carried = lambda p, x: lax.scan(lambda c, x: (c.T, x @ c), p["w"], x)[1]
    for fn, reason in ((rows, "not a stack of layers"), (carried, "`scan`")):
        with pytest.raises(jpeft.DensifyError, match=reason):
            jpeft.lift(fn)(bound, x)
        agree(fn, bound, x, densify="w")


@pytest.mark.parametrize(
    ("axes", "shape", "fn", "reason"),
    [
        ("io", (4, 5), lambda w, x: x[:, :2] @ w.reshape(2, 2, 5)[:, 0], "`slice`"),
        ("iio", (2, 2, 5), lambda w, x: jnp.einsum("bi,ijo->bjo", x[:, :2], w), "are contracted"),
        ("sio", (3, 4, 5), lambda w, x: jnp.einsum("bi,sio->bso", x, w), "stack and batch axes"),
        ("bio", (3, 4, 5), lambda w, x: jnp.take(w, jnp.array([1]), axis=0), "are contracted"),
        ("io", (4, 5), lambda w, x: w[jnp.array([1]), jnp.array([2])], "whole rows"),
        ("iio", (2, 2, 3), lambda w, x: lax.conv(x[None, :2], w.transpose(2, 1, 0), (1,), "SAME"), "permuted kernels"),
        ("oio", (2, 2, 3), lambda w, x: lax.conv(x[None, :2], w, (1,), "SAME"), "not a kernel's"),
        ("io", (3, 4), lambda w, x: lax.conv(w[None], x[None], (1,), "SAME"), "input of a convolution"),
        ("io", (4, 5), lambda w, x: lax.ragged_dot(w, x[None, :, :1].repeat(5, 1)[:, :5], jnp.array([4])), "left"),
        ("io", (4, 4), lambda w, x: x.at[w.astype(int)].get(mode="clip", wrap_negative_indices=False), "row numbers"),
    ],
)
def test_uses_that_the_axes_do_not_describe_are_refused_with_the_reason(axes, shape, fn, reason):
    with pytest.raises(jpeft.DensifyError, match=reason):
        jpeft.lift(lambda p, x: fn(p["w"], x))({"w": adapted(numbers(*shape), axes)}, numbers(3, 4))


def test_vectors_densify_freely():
    scanned = lambda biases: lax.scan(lambda c, b: (c + jnp.sin(b), None), biases[0], biases)[0]
    fn = lambda p, x: x * jnp.exp(p["scale"]) + scanned(p["bias"]) + p["of heads"]
    bound = {"scale": adapted(numbers(4), "o", 1), "bias": adapted(numbers(3, 4), "so", 1)}
    bound["of heads"] = adapted(numbers(2, 4), "oo", 1)
    agree(fn, bound, numbers(2, 4))


# ---- a Weight of another kind ----


@weight
class Gated(Weight):
    """`base * gain` along the outputs; it says nothing of slices."""

    base: object
    gain: jax.Array
    axes: str = static()
    FIELDS = {"gain": "o"}

    def apply(self, op, x):
        return x @ self.dense()

    def dense(self):
        return self.base * self.gain


def test_a_weight_that_cannot_be_sliced_is_refused_where_it_is():
    bound = {"w": Gated(jnp.ones((4, 6)), jnp.arange(6.0), axes="io")}
    assert jpeft.lift(lambda p, x: x @ p["w"])(bound, numbers(3, 4)).shape == (3, 6)
    with pytest.raises(jpeft.DensifyError, match="`slice`"):
        jpeft.lift(lambda p, x: x @ p["w"][:, :3])(bound, numbers(3, 4))


def test_a_weight_without_apply_or_dense_says_so():
    bare = Weight()
    with pytest.raises(TypeError, match="Weight defines no apply"):
        bare.apply(None, None)
    with pytest.raises(TypeError, match="Weight defines no dense"):
        bare.dense()


# ---- meshes ----


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


SHARDED = {
    "rows": (P("x", None), P(None, "x"), P(), lambda w, x: lax.psum(x @ w, "x"), "io", (8, 6)),
    "columns": (P(None, "y"), P("x"), P("x", "y"), lambda w, x: x @ w, "io", (8, 6)),
    "both": (P("x", "y"), P(None, "x"), P(None, "y"), lambda w, x: lax.psum(x @ w, "x"), "io", (8, 6)),
    "replicated": (P(), P("x"), P("x"), lambda w, x: x @ w, "io", (8, 6)),
    "heads": (P(None, "y"), P("x"), P("x", "y"), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), "ioo", (8, 2, 3)),
    "together": (P(("x", "y")), P(None, ("x", "y")), P(), lambda w, x: lax.psum(x @ w, ("x", "y")), "io", (8, 6)),
    "stack": (P("y"), P("x"), P("x", None), lambda w, x: lax.pmean(x @ w[0], "y"), "sio", (2, 8, 6)),
}


@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_gives_every_device_its_shard_of_every_field(name, mesh):
    w_spec, x_spec, out_spec, body, axes, shape = SHARDED[name]
    fn = lambda p, x: jax.shard_map(body, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out_spec)(p["w"], x)
    agree(fn, {"w": adapted(numbers(*shape), axes)}, numbers(8, 8))


def test_a_leaf_is_entered_in_the_layout_in_which_it_comes(mesh):
    def fn(p, x):
        body = lambda w, x: x @ w.T.reshape(8, 6)
        return jax.shard_map(body, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))(p["w"].T, x)

    agree(fn, {"w": adapted(numbers(8, 6), "io")}, numbers(8, 8))


@pytest.mark.parametrize(
    ("spec", "make", "reason"),
    [
        (P(None, None, "y"), lambda: adapted(numbers(8, 2, 6), "ioo"), "minor one"),
        (P(None, None, "y"), lambda: Gated(jnp.ones((8, 2, 6)), jnp.ones(12), axes="ioo"), "minor one"),
        (P(None, "y"), lambda: Gated(jnp.ones((8, 2, 6)), jnp.ones(12), axes="ioo"), "cannot be cut"),
    ],
)
def test_shards_that_the_fields_do_not_have_are_refused(spec, make, reason, mesh):
    body = lambda w, x: jnp.einsum("bd,dhk->bhk", x, w)
    fn = lambda p, x: jax.shard_map(body, mesh=mesh, in_specs=(spec, P()), out_specs=P(None, *spec[1:]))(p["w"], x)
    with pytest.raises(jpeft.DensifyError, match=reason):
        jpeft.lift(fn)({"w": make()}, numbers(3, 8))


def test_a_merged_axis_is_not_split(mesh):
    body = lambda w, x: x @ w
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "y"), P()), out_specs=P(None, "y"))
    fn = lambda p, x: mapped(p["w"].reshape(8, 12), x)
    bound = {"w": adapted(numbers(8, 2, 6), "ioo")}
    with pytest.raises(jpeft.DensifyError, match="merged or cut"):
        jpeft.lift(fn)(bound, numbers(3, 8))
    agree(fn, bound, numbers(3, 8), densify="w")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_arrays(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    bound, x = {"w": adapted(numbers(8, 6), "io")}, numbers(4, 8)
    expected = jpeft.lift(fn)(bound, x)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        w = bound["w"]
        sharded = {"w": w.replace(base=put(w.base, None, "y"), a=put(w.a), b=put(w.b, None, "y"))}
        out = jax.jit(jpeft.lift(fn))(sharded, put(x, "x"))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert out.sharding.spec == P("x", "y")
