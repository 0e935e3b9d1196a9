"""The optimizer's state in the host's memory: the same numbers, in the same places, never silently on the device."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.parallel import offload as module
from jpeft.parallel.offload import in_host, offload

SHAPES = {"stack": (4, 8, 6), "deep": (7, 3, 2, 8), "matrix": (5, 9), "vector": (3,), "scalar": (), "none": (0, 4)}
RATE = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 10)
MATRICES = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1),
    "masked": lambda: optax.adamw(RATE, weight_decay=0.1, mask=MATRICES, mu_dtype=jnp.bfloat16),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
    "lion": lambda: optax.lion(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "stateless": lambda: optax.sgd(RATE),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(RATE)),
    "partition": lambda: optax.partition(
        {True: optax.adam(1e-2), False: optax.sgd(1e-3, momentum=0.5)}, lambda p: jax.tree.map(lambda x: x.ndim > 2, p)
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several turns of the loop and a rest, on small arrays."""
    monkeypatch.setattr(module, "PIECE", 100)
    monkeypatch.setattr(module, "SMALL", 4)


def tree(seed=0, shapes=SHAPES, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {n: jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def run(tx, params, steps=3):
    state, step = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        updates, state = step(tree(i + 1), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, state


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (g.dtype, g.shape) == (e.dtype, e.shape)
        np.testing.assert_array_equal(raw(g), raw(e))


def assert_close(got, expected):
    """As far as sums may be rounded otherwise."""
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-6, atol=1e-8), got, expected)


def test_the_bits_are_those_of_the_resident_optimizer():
    """In a process without the instruction that multiplies and adds in one rounding, which LLVM uses wherever XLA
    happens to have fused the two: there the bits follow from the operations alone.
    """
    flags = os.environ["XLA_FLAGS"] + " --xla_cpu_max_isa=AVX"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(jpeft.__file__).parent.parent)}
    ran = subprocess.run([sys.executable, "-W", "error", __file__], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.split() == [*OPTIMIZERS, "chained"], ran.stderr


def compare_bits():
    module.PIECE, module.SMALL = 100, 4
    pairs = {name: (offload(make()), make()) for name, make in OPTIMIZERS.items()}
    pairs["chained"] = optax.chain(optax.clip_by_global_norm(1.0), offload(optax.adamw(RATE))), OPTIMIZERS["clipped"]()
    for name, (tx, resident) in pairs.items():
        assert_same_bits(run(tx, tree()), run(resident, tree()))
        print(name)


def test_without_jit():
    assert_close(*(tx.update(tree(1), tx.init(tree()), tree()) for tx in (offload(optax.adam(1)), optax.adam(1))))


def test_updates_of_another_dtype_than_the_gradients():
    shapes = {"stack": (4, 8, 6)}
    params, gradients = tree(0, shapes), tree(1, shapes, jnp.bfloat16)
    steps = [(tx, tx.init(params)) for tx in (offload(optax.adamw(RATE)), optax.adamw(RATE))]
    got, expected = (jax.jit(tx.update)(gradients, state, params) for tx, state in steps)
    assert got[0]["stack"].dtype == jnp.float32
    assert_close(got, expected)


def test_what_is_large_lies_in_the_host_and_the_rest_on_the_device():
    _, state = run(offload(OPTIMIZERS["adamw"]()), tree())
    adam = state[0]
    kinds = {name: x.sharding.memory_kind for name, x in adam.mu.items()}
    assert kinds == dict.fromkeys(SHAPES, "pinned_host") | {"scalar": "device"}
    assert adam.count.sharding.memory_kind == "device" and int(adam.count) == 3
    assert [in_host(x) for x in (adam.nu["stack"], adam.nu["scalar"])] == [True, False]


def test_state_follows_the_shardings_of_the_parameters_and_donation_keeps_it_in_place():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"in": P(None, "model"), "out": P(None, None, "model"), "layers": P("data")}
    shapes = {"in": (4, 8, 6), "out": (4, 6, 8), "layers": (4, 4, 4)}
    place = lambda tree: jax.device_put(tree, {n: NamedSharding(mesh, s) for n, s in specs.items()})
    params, gradients = place(tree(0, shapes)), place(tree(1, shapes))

    def step(tx):
        def apply(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        donating = jax.jit(apply, donate_argnums=(0, 1))
        state = tx.init(params)
        return donating(jax.tree.map(jnp.copy, params), state, gradients)

    got, expected = step(offload(optax.adamw(RATE))), step(optax.adamw(RATE))
    assert_close(got, expected)
    for name, spec in specs.items():
        sharding = got[1][0].mu[name].sharding
        assert sharding.memory_kind == "pinned_host"
        assert sharding.is_equivalent_to(NamedSharding(mesh, spec, memory_kind="pinned_host"), 3)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    tx, params = offload(optax.adamw(RATE)), tree()
    _, before = run(tx, params)
    update = jax.jit(lambda g, s, finite: tx.update(g, s, params, finite=finite))
    kept, after = update(jax.tree.map(lambda x: x * jnp.nan, tree(4)), before, False)
    assert_same_bits(after, before)
    assert not any(jnp.any(x) for x in jax.tree.leaves(kept))
    assert_close(update(tree(4), before, True), jax.jit(tx.update)(tree(4), before, params))


def test_a_program_that_is_not_run_here_knows_where_its_state_lies():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P(None, "model"))
    params = {"stack": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32, sharding=sharding)}
    tx = offload(optax.adamw(RATE))
    state = tx.init(params)
    assert state[0].mu["stack"].sharding == sharding.with_memory_kind("pinned_host")
    assert state[0].count.sharding == NamedSharding(mesh, P())
    memory = jax.jit(tx.update).lower(params, state, params).compile().memory_analysis()
    assert memory.host_argument_size_in_bytes in (0, 2 * 4 * 2 * 6 * 4)  # a CPU need not tell the two apart
    inside = jax.eval_shape(lambda p: jax.tree.map(lambda x: jnp.float32(in_host(x)), tx.init(p)), params)
    assert jax.tree.structure(inside) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "optimizer, primitive",
    [
        (optax.lamb(1e-3), "reduce_sum"),
        (optax.apply_if_finite(optax.adam(1e-3), 3), "cond"),
        (optax.chain(optax.adam(1e-3), optax.clip_by_global_norm(1.0)), "reduce_sum"),
    ],
    ids=["lamb", "apply_if_finite", "clipped afterwards"],
)
def test_an_optimizer_that_takes_its_state_as_a_whole_is_refused(optimizer, primitive):
    with pytest.raises(ValueError, match=rf"`{primitive}` .*as a whole; wrap the elementwise part.*jpeft.offload"):
        offload(optimizer).init(tree())


def test_what_needs_keywords_is_refused_when_it_is_given_them():
    def update(updates, state, params=None, *, value, **extra):
        return updates, jax.tree.map(lambda s: s / jnp.sum(s) * value, state)

    tx = offload(optax.GradientTransformationExtraArgs(lambda params: params, update))
    params = {"stack": jnp.ones((4, 8, 6))}
    with pytest.raises(ValueError, match="`reduce_sum`"):
        tx.update(params, tx.init(params), params, value=1.0)


def test_state_that_left_the_host_is_refused():
    tx, params = offload(optax.adamw(RATE)), tree()
    state = jax.device_put(tx.init(params), jax.memory.Space.Device)
    with pytest.raises(ValueError, match=r"host's memory, but 0/mu/deep, .* is on the device; put it back by"):
        tx.update(params, state, params)


def test_state_that_belongs_to_no_parameter_is_refused():
    tx = optax.GradientTransformation(lambda p: {"other": jnp.zeros((4, 8, 6))}, lambda u, s, p=None: (u, s))
    with pytest.raises(ValueError, match=r"state other \(4, 8, 6\) is shaped like a parameter"):
        offload(tx).init({"stack": jnp.ones((4, 8, 6))})


def test_an_optimizer_that_changes_the_form_of_its_state_is_refused():
    grow = lambda u, s, p=None: (u, jax.tree.map(lambda x: jnp.concatenate([x, x]), s))
    with pytest.raises(ValueError, match="gives back its state in the structure, shapes and dtypes"):
        offload(optax.GradientTransformation(lambda p: p, grow)).init({"stack": jnp.ones((4, 8, 6))})


def test_a_platform_without_such_memory_is_refused_unless_told_otherwise(monkeypatch):
    device = SimpleNamespace(
        addressable_memories=lambda: [SimpleNamespace(kind="device")], device_kind="Some", platform="some"
    )
    monkeypatch.setattr(module, "_devices", lambda params: [device])
    params = tree()
    with pytest.raises(
        ValueError, match=r"pinned host memory, but Some of platform 'some' has device; .*fallback=True"
    ):
        offload(optax.adamw(RATE)).init(params)
    tx = offload(optax.adamw(RATE), fallback=True)
    assert not any(map(in_host, jax.tree.leaves(tx.init(params))))
    assert_close(run(tx, params), run(optax.adamw(RATE), params))


def test_it_is_public():
    assert jpeft.offload is offload


if __name__ == "__main__":
    compare_bits()
