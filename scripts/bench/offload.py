"""Device and host memory of AdamW's state in the host's memory, by the TPU compiler's own account; no TPU is needed.

    python scripts/bench/offload.py [--chips v5e v6e]        # needs libtpu (the extra jpeft[tpu])

48 MiB of float32 parameters and 96 MiB of state, a step that donates both: 24 layers of 4096 x 64 and 64 x 4096,
stacked in two arrays, and apart in 48. Expected (MiB; docs/benchmarks.md says when and with what):

    v5e  device temporaries, stacked: on the device 0.0, device_put 144.8, offload 3.8
"""

import argparse
import os

os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
STACKED = {"a": (24, 4096, 64), "b": (24, 64, 4096)}
APART = {f"{name}{layer}": STACKED[name][1:] for layer in range(24) for name in STACKED}
ADAMW = optax.adamw(optax.cosine_decay_schedule(1e-3, 100), weight_decay=0.01)


def in_memory(kind: str, move: bool, sharding) -> optax.GradientTransformation:
    """AdamW with its state in one kind of memory, moved whole to the device and back where `move` says so."""
    there = sharding.with_memory_kind(kind)

    def init(params):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there if x.ndim else sharding)
        return jax.tree.map(place, jax.eval_shape(ADAMW.init, params))

    def update(updates, state, params=None):
        to = lambda place: lambda x: jax.device_put(x, place) if move and x.ndim else x
        updates, state = ADAMW.update(updates, jax.tree.map(to(sharding), state), params)
        return updates, jax.tree.map(to(there), state)

    return optax.GradientTransformation(init, update)


def memory_of(tx: optax.GradientTransformation, shapes: dict, sharding):
    """The compiler's account of one step."""
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for n, s in shapes.items()}

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "v6e"])
    print("| chip | parameters | state | device temporaries | device arguments | host arguments | host temporaries |")
    print("|---|---|---|---|---|---|---|")
    for chip in parser.parse_args().chips:
        devices = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices
        sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), P())
        kinds = {
            "on the device": in_memory("device", False, sharding),
            "in the host, `device_put`": in_memory("pinned_host", True, sharding),
            "in the host, `jpeft.offload`": jpeft.offload(ADAMW),
        }
        for layout, shapes in {"stacked": STACKED, "apart": APART}.items():
            for kind, tx in kinds.items():
                m = memory_of(tx, shapes, sharding)
                figures = (
                    m.temp_size_in_bytes,
                    m.argument_size_in_bytes,
                    m.host_argument_size_in_bytes,
                    m.host_temp_size_in_bytes,
                )
                print(
                    f"| {chip} | {layout} | {kind} |", " | ".join(f"{x / 2**20:.1f}" for x in figures), "|", flush=True
                )


if __name__ == "__main__":
    main()
