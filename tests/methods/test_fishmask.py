"""FISH Mask against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import numbers

import jpeft
from jpeft.methods.fishmask import at_least, kth_largest

KEY = jax.random.key(0)


def network(p, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
    return x @ p["head"] + p["bias"]


LOSS = lambda p, x: jnp.sum(jnp.sin(network(p, x)))
PARAMS = {"layers": numbers(3, 5, 5) / 2, "head": numbers(5, 4), "bias": numbers(4)}
BATCHES = [numbers(1, 5, seed=n) for n in range(4)]


def fisher():
    grads = [jax.grad(LOSS)(PARAMS, x) for x in BATCHES]
    return {name: sum(np.square(np.asarray(g[name], np.float64)) for g in grads) for name in PARAMS}


def start(**options):
    method = jpeft.FishMask(**options)
    sites = jpeft.find_sites(network, PARAMS, BATCHES[0])
    calibration = jpeft.calibrate(network, PARAMS, sites, BATCHES, method=method, loss=LOSS)
    trainable, frozen = method.init(KEY, PARAMS, sites, calibration)
    ones = jax.tree.map(jnp.ones_like, trainable)
    changed = jpeft.merge(method.bind(ones, frozen))
    return method, trainable, frozen, {n: np.asarray(changed[n] - PARAMS[n]) > 0.5 for n in PARAMS}


def test_the_most_informative_entries_of_all_train():
    _, _, _, masks = start(fraction=0.4)
    scores = fisher()
    least = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-int(0.4 * 99)]
    for name, mask in masks.items():
        rest = np.zeros_like(mask)
        for n, layer in enumerate(scores[name]) if name == "layers" else [(..., scores[name])]:
            rest[n] = layer >= min(least, layer.max())  # each matrix keeps at least one
        np.testing.assert_array_equal(mask, rest)


def test_a_layer_with_fewer_entries_is_filled_with_ones_that_do_nothing():
    method, trainable, frozen, masks = start(fraction=0.4)
    counts = masks["layers"].sum((1, 2))
    assert len(set(counts.tolist())) > 1 and trainable["layers"].values.shape == (3, counts.max())
    loss = lambda t: jnp.sum(jnp.sin(jpeft.lift(network)(method.bind(t, frozen), BATCHES[0])))
    grads = jax.grad(loss)(trainable)["layers"].values
    np.testing.assert_array_equal((np.asarray(grads) != 0).sum(1), counts)


def test_of_each_matrix_its_own_fraction():
    _, trainable, _, masks = start(fraction=0.2, scope="matrix", targets=["layers", "head"])
    assert trainable["layers"].values.shape == (3, 5) and trainable["head"].values.shape == (4,)
    for n, scores in enumerate(fisher()["layers"]):
        np.testing.assert_array_equal(masks["layers"][n], scores >= np.sort(scores, None)[-5])


@pytest.mark.parametrize("k", [1, 2, 7, 30, 59, 60])
def test_the_kth_largest_is_the_sorted_one(k):
    arrays = [np.abs(numbers(4, 10)), np.abs(numbers(20)) * 1e-3]
    arrays[0][0, :3] = arrays[1][:3] = 0.25
    together = np.sort(np.concatenate([a.ravel() for a in arrays]))
    assert kth_largest(arrays, k) == together[-k]


def test_a_matrix_without_information_keeps_one_entry():
    index = at_least(jnp.array([[[0.0, 3.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]), 1.0)
    np.testing.assert_array_equal(index, [[[1, 0], [0, 1]], [[0, 2], [0, 2]]])


def test_parameters_that_the_loss_never_sees_are_not_chosen():
    calibration = jpeft.FishMask(fraction=0.9).conclude({"w": jnp.eye(3)}, {"w": _site(3, 3)})
    np.testing.assert_array_equal(calibration["w"], [[0, 1, 2], [0, 1, 2]])


def _site(*shape):
    return jpeft.find_sites(lambda p, x: x @ p["w"], {"w": jnp.ones(shape)}, jnp.ones((1, shape[0])))["w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "0 < fraction <= 1, got fraction=0.0"),
        ({"scope": "leaf"}, "'global' or 'matrix', got 'leaf'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.FishMask(**options)
