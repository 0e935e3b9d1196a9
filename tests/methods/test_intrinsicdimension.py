"""The random projection against its definition, what the subspace promises, and the search for its dimension."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import numbers
from small_models import make_model

import jpeft
import jpeft.models
from jpeft.methods.intrinsicdimension import _hadamard, _permutation, fastfood

KEY = jax.random.key(0)
SEED = jnp.uint32(7)


def hadamard(levels):
    matrix = np.ones((1, 1))
    for _ in range(levels):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


# ---- the projection ----


@pytest.mark.parametrize("levels", [0, 1, 2, 5])
def test_the_transform_is_the_hadamard_matrix(levels):
    x = numbers(2**levels)
    np.testing.assert_allclose(_hadamard(jnp.asarray(x)), hadamard(levels) @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 10])
def test_the_permutation_has_every_number_once_and_depends_on_the_key(levels):
    orders = [np.asarray(_permutation(jax.random.key(n), levels)) for n in range(2)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(2**levels))
    if levels == 10:
        assert (orders[0] == orders[1]).mean() < 0.02
        for order in orders:  # neighbours do not stay neighbours
            assert (np.abs(np.diff(order.astype(np.int64))) < 8).mean() < 0.05


@pytest.mark.parametrize(("size", "dimension"), [(24, 10), (100, 33), (5, 40), (1, 3)])
def test_the_projection_is_fastfoods_product_in_float64(size, dimension):
    theta = numbers(dimension)
    levels = math.ceil(math.log2(max(size, dimension)))
    draws_key, order_key = jax.random.split(jax.random.key(SEED))
    draws = np.asarray(jax.random.normal(draws_key, (dimension + 2**levels,)), np.float64)
    signs, gaussian = np.sign(draws[:dimension]), draws[dimension:]
    place = np.eye(2**levels)[np.asarray(_permutation(order_key, levels))]
    h = hadamard(levels)
    b = np.eye(2**levels, dimension) * signs
    p = (h * gaussian) @ place @ h @ b / np.sqrt(2**levels * np.sum(gaussian**2)) / np.sqrt(size / 2**levels)
    np.testing.assert_allclose(fastfood(jnp.asarray(theta), size, SEED), p[:size] @ theta, rtol=1e-4, atol=1e-5)


def test_the_columns_have_norm_one_and_are_nearly_orthogonal():
    p = np.asarray(jax.vmap(lambda e: fastfood(e, 3000, SEED), out_axes=1)(jnp.eye(64)))
    gram = p.T @ p
    np.testing.assert_allclose(np.diag(gram), 1, atol=0.15)
    off = gram[~np.eye(64, dtype=bool)]
    assert np.abs(off).max() < 6 / np.sqrt(3000) and np.sqrt((off**2).mean()) < 1.5 / np.sqrt(3000)
    assert not np.allclose(p, np.asarray(jax.vmap(lambda e: fastfood(e, 3000, SEED + 1), out_axes=1)(jnp.eye(64))))


# ---- the method ----


@pytest.mark.parametrize("structure", ["SAID", "DID"])
def test_every_kind_of_leaf_moves_by_its_own_projection(structure):
    model = make_model("plain")
    method = jpeft.IntrinsicDimension(dimension=60, structure=structure)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    scales = sum(x.size for x in jax.tree.leaves(trainable.tree))
    assert trainable.arrays["theta"].size + scales == 60 == jpeft.count(method.bind(trainable, frozen)).trainable
    assert scales == (0 if structure == "DID" else 1 + 1 + 3 + 3 + 4 + 2 + 2 + 1 + 1 + 1)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype), trainable)
    bound = method.bind(trainable, frozen)
    merged = jpeft.merge(bound)
    for name, base in model.params.items():
        moved = np.asarray(merged[name] - base)
        assert np.all(np.any(moved.reshape(-1, 1) != 0, -1)), name
    w, theta = bound["scale"], trainable.arrays["theta"]
    moved = fastfood(theta, 19, w.seed) * (1 if w.scale is None else w.scale)
    np.testing.assert_allclose(merged["scale"] - model.params["scale"], moved, atol=1e-5)
    layers = np.asarray(merged["out"] - model.params["out"])
    assert np.abs(np.corrcoef(layers.reshape(3, -1))[~np.eye(3, dtype=bool)]).max() < 0.3, "each layer has its own"


def test_a_subspace_as_large_as_the_parameters_can_reach_any_solution():
    x, y = numbers(32, 4), numbers(32, 2)
    fn = lambda p, x: x @ p["w"]
    params = {"w": jnp.asarray(numbers(4, 2))}
    method = jpeft.IntrinsicDimension(dimension=8, structure="DID")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    p = jax.jacobian(lambda t: jpeft.merge(method.bind(t, frozen))["w"].ravel())(trainable).arrays["theta"]
    assert np.linalg.matrix_rank(np.asarray(p)) == 8
    want = np.linalg.lstsq(x, y, rcond=None)[0] - params["w"]
    solved = trainable.__class__(trainable.tree, {"theta": jnp.linalg.solve(p, want.ravel())})
    loss = lambda w: float(np.mean((x @ np.asarray(w) - y) ** 2))
    assert loss(jpeft.merge(method.bind(solved, frozen))["w"]) == pytest.approx(loss(want + params["w"]), rel=1e-3)


def test_the_step_keeps_nothing_of_the_weights_size_for_the_backward_pass():
    fn = lambda p, x: jnp.sin(x @ p["w"])
    params, x = {"w": jnp.asarray(numbers(64, 48))}, jnp.asarray(numbers(2, 64))
    method = jpeft.IntrinsicDimension(dimension=16)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    run = lambda t: jpeft.lift(fn)(method.bind(t, frozen), x).sum()
    _, backward = jax.vjp(run, trainable)
    kept = [r.shape for r in jax.tree.leaves(backward) if r.size >= 64 * 48 and not np.array_equal(r, params["w"])]
    assert not kept


def test_the_count_on_a_public_model_is_the_dimension():
    config = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    apply, shapes = jpeft.models.abstract(config | dict(intermediate_size=11008, vocab_size=32000))
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.IntrinsicDimension(dimension=1000)
    trainable, _ = jax.eval_shape(lambda key, p: method.init(key, p, sites), KEY, shapes)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(trainable)) == 1000
    assert trainable.arrays["theta"].shape == (1000 - (32 * (7 + 2) + 3),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "whole dimension >= 1, got dimension=0"),
        ({"dimension": 1e3}, "whole dimension"),
        ({"structure": "said"}, "expected structure 'SAID' or 'DID', got 'said'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.IntrinsicDimension(**options)


def test_fewer_dimensions_than_scales_are_refused():
    model = make_model("plain")
    with pytest.raises(ValueError, match="each of 19 matrices and vectors; expected dimension > 19, got 19"):
        jpeft.IntrinsicDimension(dimension=19).chosen(model.sites)


# ---- the search ----


@pytest.mark.parametrize("least", [1, 2, 37, 1024, 5000, 2**20])
@pytest.mark.parametrize("precision", [0.1, 1e-9])
def test_the_search_finds_the_least_dimension_that_is_enough(least, precision):
    asked = []

    def score(method):
        asked.append(method.dimension)
        assert method.structure == "DID"
        return 0.8 if method.dimension >= least else 0.2

    method = jpeft.IntrinsicDimension(structure="DID")
    found = jpeft.intrinsic_dimension(score, 0.85, method, precision=precision)
    assert least <= found.dimension <= max(least, (1 + precision) * least)
    assert found.threshold == pytest.approx(0.9 * 0.85)
    assert [d for d, _ in found.tries] == asked and len(set(asked)) == len(asked), "no dimension is run twice"
    assert len(asked) < 40
    assert f"the least that was enough: {found.dimension:,}" in str(found)


def test_the_search_says_where_nothing_was_enough_and_keeps_to_its_range():
    found = jpeft.intrinsic_dimension(lambda m: 0.1, 1.0, start=100, largest=900)
    assert found.dimension is None and found.tries == ((100, 0.1), (400, 0.1), (900, 0.1))
    assert str(found).endswith("none was enough")
    found = jpeft.intrinsic_dimension(lambda m: 0.95, 1.0, start=100, smallest=30)
    assert found.dimension == 30 and [d for d, _ in found.tries] == [100, 30]
    assert jpeft.intrinsic_dimension(lambda m: float("nan"), 1.0, start=4, largest=8).dimension is None


def test_a_search_of_a_real_task():
    """A target that a subspace of dimension one cannot reach and the whole space can."""
    x = jnp.asarray(numbers(64, 6))
    fn = lambda p, x: x @ p["w"]
    params = {"w": jnp.zeros((6, 4))}
    y = x @ jnp.asarray(numbers(6, 4))
    sites = jpeft.find_sites(fn, params, x)

    def score(method):
        trainable, frozen = method.init(KEY, params, sites)
        predict = lambda t: jpeft.lift(fn)(method.bind(t, frozen), x).ravel()
        jacobian = jax.jacobian(predict)(trainable).arrays["theta"]
        solution = jnp.linalg.lstsq(jacobian, y.ravel())[0]
        return 1 - jnp.sum((jacobian @ solution - y.ravel()) ** 2) / jnp.sum(y**2)

    found = jpeft.intrinsic_dimension(
        score, 1.0, jpeft.IntrinsicDimension(structure="DID"), start=4, largest=24, precision=0.01
    )
    assert 12 <= found.dimension <= 24
    scores = dict(found.tries)
    assert scores[4] < 0.6 and scores[found.dimension] >= 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": 0.0}, "baseline above zero"),
        ({"baseline": float("nan")}, "baseline above zero"),
        ({"fraction": 1.5}, "0 < fraction <= 1, got fraction=1.5"),
        ({"start": 5, "smallest": 9}, "got smallest=9, start=5"),
        ({"factor": 1}, "whole factor > 1"),
        ({"precision": 0.0}, "precision > 0"),
    ],
)
def test_searches_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.intrinsic_dimension(**{"score": lambda m: 1.0, "baseline": 1.0, **options})
