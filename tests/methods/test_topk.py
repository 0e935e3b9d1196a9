"""TopK and what it shares with the other sparse methods, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import numbers

import jpeft
from jpeft.methods._sparse import largest_index, random_index, scatter

KEY = jax.random.key(0)


def start(fn, params, *inputs, **options):
    method = jpeft.TopK(**options)
    sites = jpeft.find_sites(fn, params, *inputs)
    return method, *jax.jit(lambda k, p: method.init(k, p, sites))(KEY, params)


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_the_entries_with_these_magnitudes_train_and_no_others(which):
    fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])
    w, x = numbers(6, 2, 4), numbers(3, 6)
    method, trainable, frozen = start(fn, {"w": w}, x, fraction=0.25, which=which)
    added = {"w": trainable["w"].replace(values=jnp.ones(12))}
    change = np.asarray(jpeft.merge(method.bind(added, frozen))["w"]) - w
    order = np.sort(np.abs(w), axis=None)
    chosen = np.abs(w) >= order[-12] if which == "largest" else np.abs(w) <= order[11]
    np.testing.assert_allclose(change, chosen, atol=1e-6)


def test_each_layer_and_each_expert_has_entries_of_its_own():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.einsum("ebi,eio->ebo", x, w), None), x, p["w"])[0]

    w, x = numbers(3, 2, 5, 5), numbers(2, 4, 5)
    method, trainable, frozen = start(fn, {"w": w}, x, count=4, targets="experts")
    assert trainable["w"].values.shape == (3, 2, 4) and frozen["w"].index.shape == (3, 2, 2, 4)
    outputs, inputs = np.moveaxis(np.asarray(frozen["w"].index), 2, 0)
    found = np.abs(np.take_along_axis(w.reshape(3, 2, 25), inputs * 5 + outputs, -1))
    np.testing.assert_array_equal(found, -np.sort(-np.abs(w.reshape(3, 2, 25)))[..., :4])


def test_a_position_outside_counts_for_nothing_and_the_gradient_gathers():
    index = jnp.array([[0, 4, 3], [2, 0, 7]])  # outputs, inputs; the last is outside of 5 × 6
    values = jnp.array([2.0, 3.0, 5.0])
    matrix = scatter(values, index, 5, 6)
    assert matrix[2, 0] == 2 and matrix[0, 4] == 3 and float(matrix.sum()) == 5
    weights = jnp.asarray(numbers(5, 6))
    grad = jax.grad(lambda v: (scatter(v, index, 5, 6) * weights).sum())(values)
    np.testing.assert_array_equal(grad, [weights[2, 0], weights[0, 4], 0])


def test_random_positions_are_distinct_and_differ_by_matrix():
    index = np.asarray(random_index(KEY, (2, 3), 4, 6, 20)).reshape(6, 2, 20)
    assert index[:, 0].max() == 5 and index[:, 1].max() == 3 and index.min() == 0
    flat = [set((one[1] * 6 + one[0]).tolist()) for one in index]
    assert all(len(s) == 20 for s in flat) and len({frozenset(s) for s in flat}) == 6
    every = random_index(KEY, (), 4, 6, 24)
    assert set((every[1] * 6 + every[0]).tolist()) == set(range(24))


def test_of_equal_scores_the_first_are_taken():
    index = largest_index(jnp.zeros((3, 4)), 5)
    np.testing.assert_array_equal(index[1] * 4 + index[0], np.arange(5))


def test_a_16_bit_base_gets_float32_values_and_stays_16_bit():
    fn = lambda p, x: x @ p["w"]
    w, x = jnp.asarray(numbers(8, 6), jnp.bfloat16), jnp.ones((2, 8), jnp.bfloat16)
    method, trainable, frozen = start(fn, {"w": w}, x, fraction=0.1)
    assert trainable["w"].values.dtype == jnp.float32 and trainable["w"].values.shape == (4,)
    bound = method.bind(trainable, frozen)
    assert jpeft.lift(fn)(bound, x).dtype == jpeft.merge(bound)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "0 < fraction <= 1, got fraction=0.0"),
        ({"fraction": 1.5}, "got fraction=1.5"),
        ({"count": 0}, "count >= 1, got count=0"),
        ({"which": "most"}, "'largest' or 'smallest', got 'most'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.TopK(**options)


def test_a_matrix_with_too_few_or_too_many_entries_is_refused():
    fn = lambda p, x: x @ p["w"]
    with pytest.raises(ValueError, match=r"w: count 25 is above its 6 × 4 entries"):
        start(fn, {"w": jnp.ones((6, 4))}, jnp.ones((1, 6)), count=25)
    large = {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    sites = jpeft.find_sites(fn, large, jax.ShapeDtypeStruct((1, 2**16), jnp.float32))
    with pytest.raises(ValueError, match="more than 32 bits can number"):
        jpeft.TopK().chosen(sites)
