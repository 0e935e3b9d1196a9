"""What an offloaded optimizer takes on a TPU that is not here, by its own compiler's account. Needs libtpu (the extra
`tpu`).
"""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.models.layers import RMSNorm, scan_layers, stack

pytest.importorskip("libtpu")

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several test processes at a time
}
MIB = 2**20
STACKED = {"a": (24, 4096, 64), "b": (24, 64, 4096)}  # 48 MiB of parameters, 96 of state
APART = {f"{name}{layer}": STACKED[name][1:] for layer in range(24) for name in STACKED}
ADAMW = optax.adamw(optax.cosine_decay_schedule(1e-3, 100))


@pytest.fixture(scope="module", params=TOPOLOGIES)
def chips(request):
    """The devices of a TPU that is not here."""
    os.environ.update(OFFLINE)
    return topologies.get_topology_desc(TOPOLOGIES[request.param], platform="tpu").devices


def memory_of(tx, shapes, sharding):
    """The compiler's account of a step that donates parameters and state."""
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for n, s in shapes.items()}

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()


def moved_whole(sharding):
    """The state in the host's memory, moved to the device and back by `device_put`."""
    host = sharding.with_memory_kind("pinned_host")

    def init(params):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host if x.ndim else sharding)
        return jax.tree.map(place, jax.eval_shape(ADAMW.init, params))

    def update(updates, state, params):
        move = lambda to: lambda x: jax.device_put(x, to) if x.ndim else x
        updates, state = ADAMW.update(updates, jax.tree.map(move(sharding), state), params)
        return updates, jax.tree.map(move(host), state)

    return optax.GradientTransformation(init, update)


def one(chips, spec=None):
    return NamedSharding(Mesh(np.array(chips[:1]), ("x",), axis_types=(AxisType.Auto,)), spec or P())


def test_only_pieces_of_the_state_are_on_the_device(chips):
    memory = memory_of(jpeft.offload(ADAMW), STACKED, one(chips))
    assert memory.temp_size_in_bytes < 8.5 * MIB
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == 96 * MIB
    assert memory.host_temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes < 97 * MIB  # parameters and gradients
    assert memory_of(moved_whole(one(chips)), STACKED, one(chips)).temp_size_in_bytes > 96 * MIB


def test_arrays_apart_pass_one_after_the_other(chips):
    few = {name: APART[name] for name in list(APART)[:16]}  # 16 MiB of parameters, 32 of state
    memory = memory_of(jpeft.offload(ADAMW), few, one(chips))
    assert memory.host_argument_size_in_bytes == 32 * MIB and memory.host_temp_size_in_bytes == 0
    assert memory.temp_size_in_bytes < memory_of(moved_whole(one(chips)), few, one(chips)).temp_size_in_bytes / 2


def test_shards_stay_where_they_are(chips):
    mesh = Mesh(np.array(chips), ("fsdp",), axis_types=(AxisType.Auto,))
    memory = memory_of(jpeft.offload(ADAMW), {"a": (24, 4096, 64)}, NamedSharding(mesh, P(None, "fsdp")))
    assert memory.host_argument_size_in_bytes == 2 * 24 * MIB / 4 and memory.host_temp_size_in_bytes == 0
    assert memory.temp_size_in_bytes < 4 * MIB


def test_layer_inputs_wait_in_the_host(chips):
    depth, width, rows = 16, 256, 32768
    config = SimpleNamespace(param_dtype=jnp.bfloat16)

    def loss(remat):
        def layer(layer, x, _):
            return x + jnp.tanh(layer(x)), None

        def value(params, x):
            layers = nnx.eval_shape(lambda: stack(lambda rngs: RMSNorm(width, 1e-6, config), depth, nnx.Rngs(0)))
            nnx.update(layers, params)
            return scan_layers(layers, layer, x, remat=remat)[0].astype(jnp.float32).var()

        return value

    def memory(remat):
        like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one(chips))
        step = jax.jit(jax.grad(loss(remat)))
        return step.lower({"scale": like(depth, width)}, like(rows, width)).compile().memory_analysis()

    full, offloaded = memory("full"), memory("offload")
    inputs = depth * rows * width * 2
    assert offloaded.host_temp_size_in_bytes >= inputs > full.host_temp_size_in_bytes == 0
    assert full.temp_size_in_bytes - offloaded.temp_size_in_bytes > 0.8 * inputs
