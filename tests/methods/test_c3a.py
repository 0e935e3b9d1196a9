"""C3A against HF PEFT, its circulant blocks and the published count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import Case, assert_same_as_peft, linear, numbers
from test_oft import LLAMA32_3B

import jpeft
import jpeft.models

KEY = jax.random.key(0)


@pytest.mark.parity
@pytest.mark.parametrize("block_size", [1, 3, 6], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(block_size):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    assert_same_as_peft(
        Case(torch.nn.Linear(12, 6), linear, numbers(3, 12), None),
        jpeft.C3A(block_size=block_size, targets="kernel"),
        peft.C3AConfig(block_size=block_size, target_modules=["0"]),
        lambda layer: (layer.c3a_kernel["default"],),
        lambda w: (w.kernel,),
    )


def start(fn, params, x, **options):
    method = jpeft.C3A(**{"block_size": 4, "targets": lambda site: site.kind in jpeft.C3A.KINDS, **options})
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, x))


def test_the_update_is_of_circulant_blocks_in_float64():
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.asarray(numbers(8, 12))}, numbers(3, 8)
    method, trainable, frozen = start(fn, params, x)
    kernel = numbers(3, 2, 4)
    bound = method.bind({"w": trainable["w"].replace(kernel=jnp.asarray(kernel))}, frozen)
    update = np.zeros((8, 12))
    for c in range(8):
        for a in range(12):
            update[c, a] = kernel[a // 4, c // 4, (c - a) % 4] / 8
    np.testing.assert_allclose(jpeft.merge(bound)["w"], np.float64(params["w"]) + update, atol=1e-6)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), x @ (np.float64(params["w"]) + update), atol=1e-5)


@pytest.mark.parametrize("way", ["grouped rows", "transposed"])
def test_other_products(way):
    if way == "transposed":
        fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
        params, x = {"w": jnp.asarray(numbers(8, 12))}, numbers(3, 8)
    else:
        fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0, 1]))
        params, x = {"w": jnp.asarray(numbers(3, 8, 12))}, numbers(4, 8)
    method, trainable, frozen = start(fn, params, x, targets="w")
    bound = method.bind(jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable), frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), fn(jpeft.merge(bound), x), atol=1e-5)


@pytest.mark.parametrize("name", ["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"])
def test_starts(name):
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.zeros((64, 128))}, jnp.ones((2, 64))
    method, trainable, _ = start(fn, params, x, block_size=16, start=name)
    kernel = np.asarray(trainable["w"].kernel)
    expected = {"xavier_uniform": math.sqrt(6 / 192), "kaiming_uniform": 1 / 8, "gaussian": None, "zeros": 0.0}[name]
    assert kernel.shape == (8, 4, 16) and method.NO_OP_AT_START == (name == "zeros")
    if expected is None:
        assert kernel.std() == pytest.approx(1, rel=0.15)
    else:
        assert np.abs(kernel).max() == pytest.approx(expected, rel=0.05)


def test_compute_follows_the_activation_s_dtype_outside_the_transform():
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.ones((8, 8), jnp.bfloat16)}, jnp.ones((2, 8), jnp.bfloat16)
    method, trainable, frozen = start(fn, params, x)
    assert trainable["w"].kernel.dtype == jnp.float32
    bound = method.bind(trainable, frozen)
    assert jpeft.lift(fn)(bound, x).dtype == jpeft.merge(bound)["w"].dtype == jnp.bfloat16


def test_the_count_on_a_public_model_equals_the_published_integer():
    apply, shapes = jpeft.models.abstract(LLAMA32_3B)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.C3A(block_size=64, targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == 5_505_024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "expected block_size >= 1, got block_size=0"),
        ({"start": "normal"}, "expected start in .*'zeros'.*, got 'normal'"),
        ({"block_size": 6}, "w: block_size=6 does not divide its 8 inputs and 12 outputs; 4 does"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        start(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 12))}, jnp.ones((2, 8)), **options)
