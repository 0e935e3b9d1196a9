"""DeLoRA against HF PEFT, its bound, and its two starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, make_case, numbers

import jpeft

KEY = jax.random.key(0)


def start(**options):
    """`(method, trainable, frozen, params)` on one matrix (9, 7)."""
    params = {"w": jnp.asarray(numbers(9, 7))}
    method = jpeft.DeLoRA(**{"rank": 3, "boundary": 2.0, **options})
    sites = jpeft.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((1, 9)))
    return method, *method.init(KEY, params, sites), params


def moved(trainable, size=1.0):
    return jax.tree.map(lambda t: t + size * jnp.asarray(numbers(*t.shape)), trainable)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives():
    peft = pytest.importorskip("peft")
    assert_same_as_peft(
        make_case("linear"),
        jpeft.DeLoRA(rank=3, boundary=2.0, init_b="zero", targets="kernel"),
        peft.DeloraConfig(r=3, delora_lambda=2, target_modules=["0"]),
        lambda layer: tuple(getattr(layer, f"delora_{name}")["default"] for name in ("A", "B", "lambda")),
        lambda w: (w.a.T, w.b.T, w.boundary.reshape(1)),
    )


def test_the_update_is_that_of_the_formula_in_float64():
    method, trainable, frozen, params = start()
    first = trainable["w"]
    trainable = moved(trainable)

    def term(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return sum(np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(a.T, b, strict=True))

    w = trainable["w"]
    strength = np.linalg.norm(np.asarray(params["w"], np.float64), axis=1)[:, None] * float(w.boundary) / 3
    expected = np.asarray(params["w"]) + strength * (term(w.a, w.b) - term(first.a, first.b))
    np.testing.assert_allclose(jpeft.merge(method.bind(trainable, frozen))["w"], expected, atol=1e-5)


@pytest.mark.parametrize("size", [0.1, 1e4])
def test_the_norm_is_bounded_however_large_a_and_b_become(size):
    method, trainable, frozen, params = start(init_b="zero")
    trainable = {"w": moved(trainable, size)["w"].replace(boundary=trainable["w"].boundary)}
    update = jpeft.merge(method.bind(trainable, frozen))["w"] - params["w"]
    relative = np.asarray(update) / np.linalg.norm(params["w"], axis=1)[:, None]
    assert 0.1 < np.linalg.norm(relative) <= 2.0 * (1 + 1e-5)


@pytest.mark.parametrize("init_b", ["kaiming", "zero"])
def test_the_start_is_the_pretrained_function_and_its_gradients_are_finite(init_b):
    method, trainable, frozen, params = start(init_b=init_b)
    np.testing.assert_allclose(jpeft.merge(method.bind(trainable, frozen))["w"], params["w"], atol=1e-6)
    run = lambda t: jnp.sin(jpeft.lift(lambda p, x: x @ p["w"])(method.bind(t, frozen), jnp.ones((1, 9)))).sum()
    grads = jax.grad(run)(trainable)["w"]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)) and np.any(grads.b != 0)
    assert np.any(np.abs(grads.a) > 1e-6) == (init_b == "kaiming")
    assert (frozen["w"].first_a is None) == (init_b == "zero")


def test_what_trains_is_lora_and_one_number_for_each_matrix():
    _, trainable, _, _ = start()
    assert sum(t.size for t in jax.tree.leaves(trainable)) == 3 * (9 + 7) + 1


@pytest.mark.parametrize("init_b", ["kaiming", "zero"])
def test_other_libraries_get_the_same_numbers(init_b):
    """With the second term a LoRA of twice the rank, without it the method itself."""
    method, trainable, frozen, params = start(init_b=init_b)
    trainable = moved(trainable)
    plain, exported = method.exported(trainable, frozen)
    assert type(plain) is (jpeft.LoRA if init_b == "kaiming" else jpeft.DeLoRA)
    sites = jpeft.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((1, 9)))
    shaped, rest = plain.init(KEY, params, sites)
    assert jax.tree.structure(shaped) == jax.tree.structure(exported)
    same = [jpeft.merge(bound)["w"] for bound in (plain.bind(exported, rest), method.bind(trainable, frozen))]
    np.testing.assert_allclose(*same, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1 and boundary > 0, got rank=0"),
        ({"dropout": -0.1}, "0 <= dropout < 1, got dropout=-0.1"),
        ({"boundary": 0.0}, "boundary=0.0"),
        ({"init_b": "one"}, "expected init_b in .*'zero'.*, got 'one'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.DeLoRA(**options)


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(ValueError, match=r"w: rank 8 is above min\(in, out\) = min\(9, 7\)"):
        start(rank=8)
