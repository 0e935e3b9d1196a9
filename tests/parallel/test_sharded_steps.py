"""A sharded step equals the step of one device, for methods of every kind and every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jpeft
import jpeft.models
from jpeft.parallel import layout as layouts
from jpeft.parallel import make_mesh, shard, shard_params
from jpeft.quant.pieces import Pieces
from jpeft.train.step import State, init_state, make_step, state_shardings

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    torch_dtype="float32",
)
KEY = jax.random.key(1)
ROWS, LENGTH = 8, 16
METHODS = {
    "LoRA": jpeft.LoRA(rank=4),
    "QLoRA": jpeft.chain(jpeft.NF4(double_quant=True), jpeft.LoRA(rank=4)),
    "DoRA": jpeft.DoRA(rank=4),
    "AdaLoRA": jpeft.AdaLoRA().for_steps(10),
    "PrefixTuning": jpeft.PrefixTuning(num_tokens=4),
    "VeRA": jpeft.VeRA(rank=8),  # arrays that all leaves share
    "IntrinsicDimension": jpeft.IntrinsicDimension(dimension=64),  # one that computes where it binds
    "FullFineTuning": jpeft.FullFineTuning(),
}


@pytest.fixture(autouse=True)
def _cut_small_arrays_too(monkeypatch):
    monkeypatch.setattr(layouts, "SMALL", 64)
    monkeypatch.setattr(layouts, "TINY", 64)


@pytest.fixture(scope="module")
def model():
    apply, params = jpeft.models.init(jax.random.key(0), CONFIG)
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.random.default_rng(1).integers(0, 2, (ROWS, LENGTH)).astype(np.float32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
    }
    return apply, params, jpeft.find_sites(apply, params, tokens), batch


def placed(tree, shardings):
    return jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), tree, shardings)


def stepped(model, method, mesh=None, accumulation=1, optimizer=None):
    """The state after two steps of plain gradient descent, whose differences are gradients, and the metrics."""
    apply, params, sites, batch = model
    tx = method.optimizer(optimizer or optax.sgd(0.5))
    trainable, frozen = method.init(KEY, params, sites)
    state = init_state(trainable, tx)
    layout = None
    if mesh is not None:
        layout = shard(mesh, method, params, sites, tx)
        state, frozen = placed(state, state_shardings(layout)), placed(frozen, layout.frozen)
        batch = placed(batch, dict.fromkeys(batch, layout.batch))
    step = make_step(apply, method, tx, accumulation, layout)
    for _ in range(2):
        state, metrics = step(state, frozen, batch, KEY)
    if layout is not None:
        same = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, state, state_shardings(layout))))
    return state, metrics


@pytest.fixture(scope="module")
def alone(model):
    """What one device makes of it, once for each method."""
    found = {}

    def run(name):
        if name not in found:
            found[name] = stepped(model, METHODS[name])
        return found[name]

    return run


@pytest.mark.parametrize(
    ("name", "mesh"),
    [(name, "fsdp=8") for name in METHODS]
    + [("QLoRA", "data=2,fsdp=4"), ("LoRA", "data=8")]
    + [(name, "fsdp=4,tensor=2") for name in ("LoRA", "QLoRA", "DoRA", "AdaLoRA", "PrefixTuning")],
)
def test_a_sharded_step_is_the_step_of_one_device(model, alone, name, mesh):
    (state, metrics), (expected, expected_metrics) = stepped(model, METHODS[name], make_mesh(mesh)), alone(name)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-5, rtol=1e-5)
    assert abs(float(metrics["loss"]) - float(expected_metrics["loss"])) < 1e-5
    np.testing.assert_allclose(metrics["gradient_norm"], expected_metrics["gradient_norm"], rtol=1e-4)


def test_a_mesh_of_explicit_axes_gives_the_same(model, alone):
    state, _ = stepped(model, METHODS["QLoRA"], make_mesh("data=2,fsdp=4", axis_type=AxisType.Explicit))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(alone("QLoRA")[0]), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2"])
def test_an_offloaded_optimizer_stays_in_the_host_in_pieces(model, mesh):
    adam, method = optax.adam(1e-2, eps=1e-3), METHODS["LoRA"]
    expected, _ = stepped(model, method, optimizer=adam)
    state, _ = stepped(model, method, make_mesh(mesh), optimizer=jpeft.offload(adam))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer_state) if x.ndim} == {"pinned_host"}
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-5, rtol=1e-4)


def test_a_stack_of_which_single_layers_are_dense(model):
    apply, params, sites, batch = model
    packed = jpeft.NF4().bind(*jpeft.NF4().init(KEY, params, sites))
    kernel = packed["layers"]["mlp"]["up_proj"]["kernel"]
    first = kernel.along(0, lambda x, k: jax.lax.slice_in_dim(x, 0, 1, axis=k))
    second = params["layers"]["mlp"]["up_proj"]["kernel"][1:]
    packed["layers"]["mlp"]["up_proj"]["kernel"] = Pieces((first, second), axes=kernel.axes)
    of = apply, packed, sites, batch
    (state, _), (expected, _) = (stepped(of, METHODS["LoRA"], mesh) for mesh in (make_mesh("fsdp=8"), None))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_microbatches_are_of_each_device_s_own_rows(model, alone):
    state, _ = stepped(model, METHODS["LoRA"], make_mesh("data=2,fsdp=2", devices=jax.devices()[:4]), accumulation=2)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(alone("LoRA")[0]), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-5, rtol=1e-5)


def test_everything_large_is_in_pieces_and_codes_stay_codes(model):
    apply, params, sites, _ = model
    tx = optax.adamw(1e-3)
    layout = shard(make_mesh("fsdp=8"), METHODS["QLoRA"], params, sites, tx)
    kernel = layout.frozen[0]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.base.spec == PartitionSpec(None, "fsdp", None)  # the layers stay together
    assert kernel.scales.spec == PartitionSpec(None, None, "fsdp")  # 2 blocks of 64 cannot be shared by 8
    moments = layout.optimizer_state[0].mu[1]["layers"]["mlp"]["gate_proj"]["kernel"]
    trained = layout.trainable[1]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert moments.a.spec == trained.a.spec == PartitionSpec(None, "fsdp", None)
    halves = jax.eval_shape(lambda: METHODS["QLoRA"].init(KEY, params, sites))
    on_device = lambda x, s: np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    sizes = [
        (x.size * x.dtype.itemsize, on_device(x, s))
        for x, s in zip(jax.tree.leaves(halves[1]), jax.tree.leaves(layout.frozen), strict=True)
    ]
    whole, here = map(sum, zip(*sizes, strict=True))
    assert here < 0.14 * whole


def test_offloaded_state_lies_in_the_hosts_memory_as_its_parameters_do(model):
    apply, params, sites, batch = model
    method = METHODS["LoRA"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), jpeft.offload(optax.adamw(1e-3)))
    layout = shard(make_mesh("fsdp=8"), method, params, sites, tx)
    moments, trained = jax.tree.leaves(layout.optimizer_state[1][0].mu), jax.tree.leaves(layout.trainable)
    assert {s.memory_kind for s in moments} == {"pinned_host"}
    assert [s.spec for s in moments] == [s.spec for s in trained]
    trainable, frozen = placed(method.init(KEY, params, sites), (layout.trainable, layout.frozen))
    state = jax.device_put(init_state(trainable, tx), state_shardings(layout))
    state, metrics = make_step(apply, method, tx, layout=layout)(state, frozen, batch, KEY)
    assert metrics["finite"]
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer_state[1][0].mu)} == {"pinned_host"}


def test_the_pretrained_tree_lies_as_the_frozen_half(model):
    _, params, sites, _ = model
    mesh = make_mesh("fsdp=4,tensor=2")
    layout = shard(mesh, METHODS["LoRA"], params, sites)
    assert jax.tree.leaves(shard_params(mesh, params, sites)) == jax.tree.leaves(layout.frozen)


def test_the_program_gathers_codes_and_never_a_dense_weight(model):
    apply, params, sites, batch = model
    method, tx = METHODS["QLoRA"], optax.sgd(1.0)
    layout = shard(make_mesh("fsdp=8"), method, params, sites, tx)
    trainable, frozen = jax.eval_shape(lambda: method.init(KEY, params, sites))
    state = jax.eval_shape(lambda t: State(jnp.int32(0), t, tx.init(t)), trainable)
    on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state, frozen = jax.tree.map(on, state, state_shardings(layout)), jax.tree.map(on, frozen, layout.frozen)
    text = make_step(apply, method, tx, layout=layout).lower(state, frozen, batch, KEY).as_text()
    gathered = [line for line in text.splitlines() if "all_gather" in line and "->" in line]
    results = {line.rpartition("->")[2].strip() for line in gathered}
    assert any("x128x256xui4" in r or "<128x256xui4>" in r for r in results), results
    assert not any("128x256xf32" in r or "256x128xf32" in r for r in results), results


def test_what_a_mesh_cannot_divide_is_named_with_a_mesh_that_can(model, monkeypatch):
    apply, params, sites, batch = model
    three = make_mesh("tensor=4,fsdp=2")
    with pytest.raises(
        ValueError, match=r"q_proj/kernel: 2 kv_heads cannot be split over tensor=4; tensor may be 1, 2"
    ):
        shard(three, METHODS["LoRA"], params, sites)
    monkeypatch.setattr(layouts, "LARGE", 512)
    odd = make_mesh("fsdp=3", devices=jax.devices()[:3])
    with pytest.raises(ValueError, match=r"embedding: none of the axes .* can be split over fsdp=3; fsdp may be 2"):
        shard(odd, METHODS["LoRA"], params, sites)
    layout = shard(make_mesh("fsdp=8"), METHODS["LoRA"], params, sites)
    with pytest.raises(ValueError, match="a batch of 12 rows cannot be split over the 8 devices .* a batch of 16 rows"):
        layout.check_rows(12)
