"""find_sites reads the map of a model from one abstract trace."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_models import LAYERS, VOCABULARY, WIDTH, make_model

import jpeft


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def found(fn, params, *inputs):
    """`{path: (kind, axes, calls, flops)}`; the leaf's first use."""
    sites = jpeft.find_sites(fn, params, *inputs)
    return {s.path: (s.kind, s.axes, s.calls, s.flops) for s in reversed(list(sites))}


# ---- models of Flax, Haiku and nobody ----


def test_linen_unrolled():
    sites = make_model("linen-unrolled").sites
    assert sites["layer_0/attention/query/kernel"].axes == "ioo"
    assert sites["layer_1/attention/out/kernel"].axes == "iio"
    assert (sites["layer_2/up/kernel"].kind, sites["layer_2/up/kernel"].axes) == ("dense", "io")
    assert (sites["layer_2/norm1/scale"].kind, sites["layer_2/up/bias"].kind) == ("scale", "bias")
    assert all(s.calls == 1 for s in sites if s.kind == "dense")
    assert sites["layer_0/up/kernel"].flops == 2 * (2 * 7) * 24 * 40
    assert "conftest.py" in sites["layer_0/up/kernel"].line or "linear.py" in sites["layer_0/up/kernel"].line


@pytest.mark.parametrize("kind", ["linen-scanned", "linen-scanned-axis-1"])
def test_linen_scanned(kind):
    sites = make_model(kind).sites
    put = lambda letters: "s" + letters if kind == "linen-scanned" else letters[0] + "s" + letters[1:]
    assert sites["layers/attention/query/kernel"].axes == put("ioo")
    assert sites["layers/attention/out/kernel"].axes == put("iio")
    assert sites["layers/up/kernel"].calls == LAYERS
    assert sites["layers/up/kernel"].flops == LAYERS * 2 * (2 * 7) * 24 * 40
    assert sites["layers/norm1/scale"].kind == "scale" and sites["layers/up/bias"].kind == "bias"


def test_a_tied_embedding_is_an_embedding_and_a_head():
    uses = [s for s in make_model("linen-scanned").sites if s.path == "embed/embedding"]
    assert [(s.kind, s.axes, s.head) for s in uses] == [("embedding", "io", False), ("dense", "oi", True)]
    assert uses[1].flops == 2 * 14 * WIDTH * VOCABULARY


def test_nnx_stacks():
    sites = make_model("nnx").sites
    assert sites["layers/attention/query/kernel"].axes == "sioo"
    assert sites["layers/up/kernel"].calls == LAYERS
    assert sites["head/kernel"].head and sites["head/kernel"].axes == "io"
    assert sites["layers/norm/scale"].kind == "scale"


def test_nnx_lists():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    apply, params = jpeft.from_nnx(Model(nnx.Rngs(0)))
    sites = jpeft.find_sites(apply, params, shape(3, 4))
    assert sites.paths == ["layers/0/kernel", "layers/0/bias", "layers/1/kernel", "layers/1/bias"]


def test_haiku_trees():
    def fn(params, x):
        for name in ("mlp/~/linear_0", "mlp/~/linear_1"):
            x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
        return x

    params = {f"mlp/~/linear_{n}": {"w": shape(4, 4), "b": shape(4)} for n in range(2)}
    assert found(fn, params, shape(3, 4)) == {
        f"mlp/~/linear_{n}/{leaf}": use
        for n in range(2)
        for leaf, use in (("w", ("dense", "io", 1, 96)), ("b", ("bias", "o", 1, 0)))
    }


def test_doors_from_flax():
    bound = nn.Dense(3).bind({"params": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}})
    apply, params = jpeft.from_linen(bound)
    assert apply(params, jnp.ones((2, 4))).shape == (2, 3)
    assert jpeft.from_linen(nn.Dense(3))[1] is None, "bring your own"

    normed, params = jpeft.from_linen(nn.BatchNorm(use_running_average=True), jnp.ones((2, 4)))
    assert set(params) == {"scale", "bias"}, "running averages are constants"
    assert jpeft.find_sites(normed, params, shape(2, 4))["scale"].kind == "scale"


# ---- axes ----

USES = {
    "an [out, in] kernel": (lambda w, x: x @ w.T, (5, 4), (3, 4), ("dense", "oi", 1, 120)),
    "a kernel on the left": (lambda w, x: w @ x, (5, 4), (4, 3), ("dense", "oi", 1, 120)),
    "(d, heads, head_dim)": (
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
        (4, 2, 3),
        (2, 5, 4),
        ("dense", "ioo", 1, 480),
    ),
    "(heads, head_dim, d)": (
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w),
        (2, 3, 4),
        (2, 5, 2, 3),
        ("dense", "iio", 1, 480),
    ),
    "a fused (2, K, D, H) kernel": (
        lambda w, x: jnp.einsum("bd,ckdh->cbkh", x, w),
        (2, 3, 4, 5),
        (7, 4),
        ("dense", "ooio", 1, 2 * 7 * 4 * 30),
    ),
    "one that is reshaped": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), (7, 4), ("dense", "ioo", 1, 336)),
    "one layer of a stack": (lambda w, x: x @ w[1], (3, 4, 5), (2, 4), ("dense", "sio", 1, 80)),
    "a layer at a traced place": (
        lambda w, x: x @ w[jnp.argmax(x[0])],
        (3, 4, 5),
        (2, 4),
        ("dense", "sio", 1, 80),
    ),
    "layers that are unstacked": (lambda w, x: [x @ v for v in w], (3, 4, 5), (2, 4), ("dense", "sio", 3, 240)),
    "a part of a fused kernel": (lambda w, x: x @ w[:, :3], (4, 9), (2, 4), ("dense", "io", 1, 48)),
    "split parts": (
        lambda w, x: [x @ v for v in jnp.split(w, 3, 1)],
        (4, 9),
        (2, 4),
        ("dense", "io", 3, 144),
    ),
    "a new axis": (lambda w, x: jnp.matmul(x, w[None]), (4, 5), (2, 3, 4), ("dense", "io", 1, 240)),
    "experts": (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 4, 5), (3, 2, 4), ("experts", "bio", 1, 240)),
    "grouped experts": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 1, 4])),
        (3, 4, 5),
        (7, 4),
        ("experts", "bio", 1, 280),
    ),
    "an NHWC convolution": (
        lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (3, 3, 4, 5),
        (2, 6, 6, 4),
        ("conv", "iiio", 1, 2 * (2 * 6 * 6 * 5) * (3 * 3 * 4)),
    ),
    "a grouped, strided convolution": (
        lambda w, x: lax.conv_general_dilated(x, w, (2,), "SAME", feature_group_count=2),
        (6, 2, 3),
        (1, 4, 8),
        ("conv", "oii", 1, 2 * (1 * 6 * 4) * (2 * 3)),
    ),
    "a row lookup": (lambda w, x: w[x.astype(int)], (7, 4), (2, 3), ("embedding", "io", 1, 0)),
    "a mapped row lookup": (
        lambda w, x: jax.vmap(lambda t: w[t])(x.astype(int)),
        (7, 4),
        (3,),
        ("embedding", "io", 1, 0),
    ),
    "single entries": (lambda w, x: w[x.astype(int), x.astype(int)], (7, 4), (3,), ("other", "ii", 1, 0)),
    "a scale": (lambda w, x: x * w, (4,), (3, 4), ("scale", "o", 1, 0)),
    "a scale around one": (lambda w, x: x * (1 + w.astype(jnp.float32)), (4,), (3, 4), ("scale", "o", 1, 0)),
    "a bias": (lambda w, x: x + w.reshape(1, 4), (4,), (3, 4), ("bias", "o", 1, 0)),
    "another use": (lambda w, x: jnp.concatenate([x, w[None]]), (4,), (3, 4), ("other", "o", 1, 0)),
}


@pytest.mark.parametrize("name", USES)
def test_axes_kinds_calls_and_flops(name):
    fn, w, x, expected = USES[name]
    assert found(lambda p, x: fn(p["w"], x), {"w": shape(*w)}, shape(*x)) == {"w": expected}


@pytest.mark.parametrize("order", ["HWIO", "OIHW", "OHWI"])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_channels_of_a_convolution_are_found_in_any_order_and_under_a_stack(order, layers):
    def fn(p, x):
        conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", order, "NHWC"))
        return lax.scan(lambda x, w: (conv(x, w), None), x, p["w"])[0] if layers else conv(x, p["w"])

    kernel = [{"H": 3, "W": 5, "I": 4, "O": 4}[letter] for letter in order]
    sites = jpeft.find_sites(fn, {"w": shape(*[layers] * bool(layers), *kernel)}, shape(1, 6, 6, 4))
    assert sites["w"].channels == order.index("I") - 4
    assert jpeft.find_sites(lambda p, x: x @ p["w"], {"w": shape(4, 5)}, shape(3, 4))["w"].channels is None


def test_axes_that_are_used_both_ways_at_once_are_not_guessed():
    sites = jpeft.find_sites(
        lambda p, x: jnp.einsum("bi,jio->jbo", x, p["w"].reshape(2, 2, 5)), {"w": shape(4, 5)}, shape(3, 2)
    )
    assert sites["w"].axes == "??"


# ---- bodies ----

BODIES = {
    "jit": (lambda w, x: jax.jit(lambda w: x @ w)(w), 1),
    "remat": (lambda w, x: jax.checkpoint(lambda w: x @ w)(w), 1),
    "custom_jvp": (lambda w, x: through_custom_jvp(w, x), 1),
    "custom_vjp": (lambda w, x: through_custom_vjp(w, x), 1),
    "cond": (lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ w), 2),
    "while": (lambda w, x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), 1),
    "while condition": (lambda w, x: lax.while_loop(lambda x: (x @ w).sum() > 0, lambda x: x - 1, x), 1),
    "fori_loop": (lambda w, x: lax.fori_loop(0, 5, lambda _, x: x @ w, x), 5),
    "scan in scan": (
        lambda w, x: lax.scan(lambda x, _: (lax.fori_loop(0, 3, lambda _, x: x @ w, x), None), x, length=2),
        6,
    ),
    "three calls": (lambda w, x: x @ w @ w @ w, 3),
}


@jax.custom_jvp
def through_custom_jvp(w, x):
    return x @ w


through_custom_jvp.defjvp(lambda p, t: (through_custom_jvp(*p), t[1] @ p[0] + p[1] @ t[0]))


@jax.custom_vjp
def through_custom_vjp(w, x):
    return x @ w


through_custom_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_entered_and_their_calls_counted(name):
    fn, calls = BODIES[name]
    expected = {"w": ("dense", "io", calls, calls * 2 * 3 * 4 * 4)}
    assert found(lambda p, x: fn(p["w"], x), {"w": shape(4, 4)}, shape(3, 4)) == expected


def test_inside_a_shard_map_the_work_of_all_devices_is_counted():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    split = (P("x", "y"), P(None, "x"))
    fn = lambda w, x: jax.shard_map(
        lambda w, x: lax.psum(x @ w, "x"), mesh=mesh, in_specs=split, out_specs=P(None, "y")
    )(w, x)
    assert found(lambda p, x: fn(p["w"], x), {"w": shape(8, 6)}, shape(3, 8)) == {
        "w": ("dense", "io", 1, 2 * 3 * 8 * 6)
    }


# ---- heads ----


def test_a_head_is_the_last_product_not_one_that_happens_to_be_as_wide():
    """As in GPT-2 medium: as many positions as features, so that every projection has a table's number of outputs."""

    def fn(p, tokens):
        x = p["tokens"][tokens] + p["positions"][jnp.arange(tokens.shape[-1])]
        for n in range(2):
            x = x + jnp.tanh(x @ p[f"up{n}"]) @ p[f"down{n}"]
        x = x * p["norm"]
        return (x @ p["head"] + p["bias"]) if "head" in p else x

    params = {"tokens": shape(11, 6), "positions": shape(6, 6), "norm": shape(6)}
    params |= {f"{name}{n}": shape(6, 6) for n in range(2) for name in ("up", "down")}
    heads = lambda params: [s.path for s in jpeft.find_sites(fn, params, shape(2, 5, dtype=jnp.int32)) if s.head]
    assert heads(params) == []
    assert heads(params | {"head": shape(6, 11), "bias": shape(11)}) == ["head"]


# ---- the table ----


def test_sites_print_as_a_table():
    params = {"embed": shape(7, 4, dtype=jnp.bfloat16), "w": shape(4, 7), "scale": shape()}
    fn = lambda p, tokens: p["embed"][tokens].astype(jnp.float32) @ p["w"] * p["scale"]
    sites = jpeft.find_sites(lambda p, t: fn(p, t), params, shape(2, 3, dtype=jnp.int32))
    lines = str(sites).splitlines()
    assert lines[0].split() == ["path", "kind", "shape", "axes", "dtype", "calls", "MFLOP"]
    assert lines[2].split() == ["embed", "embedding", "7×4", "io", "bfloat16", "1", "-"]
    assert lines[3].split()[:3] == ["w", "dense", "4×7"] or lines[3].split()[:3] == ["w", "dense", "(head)"]
    assert lines[-1].startswith("axes: i contracted")
    assert len(sites) == len(sites.paths) == 3 and [s.path for s in sites] == sites.paths


def test_the_other_arguments_may_be_anything():
    def fn(params, x, mode, *, gain):
        assert mode == "plain"
        return None if x is None else x["x"] @ params["w"] * gain

    params = {"w": shape(4, 5)}
    assert jpeft.find_sites(fn, params, {"x": shape(3, 4)}, "plain", gain=2).paths == ["w"]


def test_sites_of_a_tree_that_holds_weights():
    model = make_model("plain")
    bound = jpeft.LoRA(rank=2).bind(*jpeft.LoRA(rank=2).init(jax.random.key(0), model.params, model.sites))
    assert str(jpeft.find_sites(model.apply, bound, *model.inputs)) == str(model.sites)


def test_errors():
    with pytest.raises(ValueError, match=r"uses none of its parameters \(a/w, b\)"):
        jpeft.find_sites(lambda p, x: x, {"a": {"w": shape(3)}, "b": shape(2)}, shape(3))
    with pytest.raises(KeyError, match="no site 'v'; the sites are w"):
        jpeft.find_sites(lambda p: 2 * p["w"] @ p["w"].T, {"w": shape(2, 3)})["v"]


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("linen-scanned", "layers/down/kernel", ["layers/up/kernel"]),
        ("linen-unrolled", "layer_1/down/kernel", ["layer_1/up/kernel"]),
        (
            "linen-scanned",
            "layers/attention/out/kernel",
            [f"layers/attention/{n}/kernel" for n in ("query", "key", "value")],
        ),
        ("nnx", "layers/attention/query/kernel", []),
        ("plain", "expert", ["gate"]),
        ("plain", "out", ["fused"]),
        ("plain", "gate", ["embed", "conv", "out", "back"]),
    ],
)
def test_a_product_names_the_parameters_whose_products_make_its_inputs(kind, path, expected):
    assert list(make_model(kind).sites[path].inputs_from) == expected


def test_a_gated_layer_has_two():
    gated = lambda p, x: (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    params = {"gate": jnp.ones((4, 6)), "up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    assert jpeft.find_sites(gated, params, jnp.ones((2, 4)))["down"].inputs_from == ("gate", "up")
