"""RoAd against HF PEFT, its rotation of pairs and its counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import Case, assert_same_as_peft, linear, numbers
from small_models import make_model
from test_oft import LLAMA32_3B

import jpeft
import jpeft.models

KEY = jax.random.key(0)


@pytest.mark.parity
@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(variant, group_size):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    assert_same_as_peft(
        Case(torch.nn.Linear(6, 8), linear, numbers(3, 6), None),
        jpeft.RoAd(variant=variant, group_size=group_size, targets="kernel"),
        peft.RoadConfig(variant=variant, group_size=group_size, target_modules=["0"]),
        lambda layer: (layer.road_theta["default"], layer.road_alpha["default"]),
        lambda w: (w.theta, w.alpha),
    )


def test_neighbours_are_turned_and_stretched_with_their_bias():
    params, x = {"kernel": jnp.asarray(numbers(4, 6)), "bias": jnp.asarray(numbers(4))}, numbers(3, 6)
    method = jpeft.RoAd(targets="kernel")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(linear, params, x))
    assert sorted(trainable.arrays) == ["kernel/alpha", "kernel/theta"]
    theta, alpha = np.array([0.3, -1.2]), np.array([2.0, 0.5])
    trainable.arrays.update({"kernel/theta": jnp.asarray(theta), "kernel/alpha": jnp.asarray(alpha)})
    y = np.float64(linear(params, x))
    expected = np.empty_like(y)
    for n, (angle, stretch) in enumerate(zip(theta, alpha, strict=True)):
        turn = stretch * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        expected[:, 2 * n : 2 * n + 2] = y[:, 2 * n : 2 * n + 2] @ turn.T
    bound = method.bind(trainable, frozen)
    np.testing.assert_allclose(jpeft.lift(linear)(bound, x), expected, atol=1e-5)
    np.testing.assert_allclose(linear(jpeft.merge(bound), x), expected, atol=1e-5)


@pytest.mark.parametrize(("variant", "expected"), [("road_1", 114_688), ("road_2", 229_376), ("road_4", 458_752)])
def test_counts_on_public_models(variant, expected):
    apply, shapes = jpeft.models.abstract(LLAMA32_3B)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.RoAd(variant=variant, targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == expected == int(variant[-1]) * 28 * (3072 + 1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "road_3"}, "expected variant in .*'road_1'.*, got 'road_3'"),
        ({"group_size": 3}, "expected an even group_size >= 2, got group_size=3"),
        ({"group_size": 0}, "got group_size=0"),
        ({"group_size": 16, "targets": "up"}, "up/kernel: group_size=16 does not divide its 40 outputs"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    model = make_model("linen-unrolled")
    with pytest.raises(ValueError, match=message):
        jpeft.RoAd(**options).init(KEY, model.params, model.sites)
