"""HRA against HF PEFT, its product of reflections and the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, linear, make_case, numbers
from test_oft import LLAMA3_8B, LLAMA32_3B

import jpeft
import jpeft.models

KEY = jax.random.key(0)


@pytest.mark.parity
@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("name", ["linear", "convolution", "strided convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name, gram_schmidt):
    peft = pytest.importorskip("peft")
    assert_same_as_peft(
        make_case(name),
        jpeft.HRA(r=4, gram_schmidt=gram_schmidt, targets="kernel"),
        peft.HRAConfig(r=4, apply_GS=gram_schmidt, target_modules=["0"]),
        lambda layer: (layer.hra_u["default"],),
        lambda w: (w.u,),
    )


def start(**options):
    params, x = {"kernel": jnp.asarray(numbers(5, 8)), "bias": jnp.asarray(numbers(5))}, numbers(3, 8)
    method = jpeft.HRA(**{"r": 4, "targets": "kernel", **options})
    return method, params, x, *method.init(KEY, params, jpeft.find_sites(linear, params, x))


def test_the_chain_is_the_product_of_reflections_in_float64():
    method, params, x, trainable, frozen = start()
    u = numbers(8, 4)
    bound = method.bind({**trainable, "kernel": trainable["kernel"].replace(u=jnp.asarray(u))}, frozen)
    reflect = lambda v: np.eye(8) - 2 * np.outer(v, v) / (v @ v)
    rotation = functools.reduce(np.matmul, map(reflect, np.float64(u).T[::-1]))
    np.testing.assert_allclose(jpeft.merge(bound)["kernel"], np.float64(params["kernel"]) @ rotation.T, atol=1e-5)
    expected = x @ rotation @ np.float64(params["kernel"]).T + params["bias"]
    np.testing.assert_allclose(jpeft.lift(linear)(bound, x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_of_equal_reflections_cancel(dtype):
    method, params, x, *_ = start()
    params, x = jax.tree.map(lambda p: p.astype(dtype), params), jnp.asarray(x, dtype)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(linear, params, x))
    u = trainable["kernel"].u
    assert u.dtype == jnp.float32 and np.array_equal(u[:, 0], u[:, 1]) and not np.array_equal(u[:, 1], u[:, 2])
    out = jpeft.lift(linear)(method.bind(trainable, frozen), x)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.float32(out), np.float32(linear(params, x)), atol=tolerance)


def test_gram_schmidt_starts_away_from_the_pretrained_function_and_says_so():
    method, params, x, trainable, frozen = start(gram_schmidt=True, r=3)
    assert not method.NO_OP_AT_START and jpeft.HRA().NO_OP_AT_START
    assert not jpeft.chain(method, jpeft.LoRA()).NO_OP_AT_START
    bound = method.bind(trainable, frozen)
    assert not np.allclose(jpeft.lift(linear)(bound, x), linear(params, x), atol=0.1)
    norms = lambda kernel: np.linalg.norm(kernel, axis=1)
    np.testing.assert_allclose(norms(jpeft.merge(bound)["kernel"]), norms(params["kernel"]), rtol=1e-5)


def test_the_penalty_is_the_distance_from_orthogonal_directions():
    method, _, _, trainable, _ = start(regularization=0.5)
    u = numbers(8, 4)
    unit = np.float64(u) / np.linalg.norm(np.float64(u), axis=0)
    expected = 0.5 * np.sum((np.eye(4) - unit.T @ unit) ** 2)
    of = lambda m: m.penalty({**trainable, "kernel": trainable["kernel"].replace(u=jnp.asarray(u))})
    np.testing.assert_allclose(of(method), expected, rtol=1e-5)
    assert of(jpeft.HRA()) == 0.0


@pytest.mark.parametrize(("config", "expected"), [(LLAMA3_8B, 2_097_152), (LLAMA32_3B, 1_376_256)], ids=["8B", "3B"])
def test_counts_on_public_models(config, expected):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.HRA(targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "got r=0"),
        ({"r": 3}, "expected an even r >= 2, for reflections that start in pairs, got r=3"),
        ({"r": 0, "gram_schmidt": True}, "got r=0"),
        ({"regularization": -1.0}, "regularization >= 0, got regularization=-1.0"),
        ({"r": 10}, "kernel: r=10 is above 8, the size of what is turned; choose r <= 8"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)
