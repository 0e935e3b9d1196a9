"""DoRA against HF PEFT and against its formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.dora import norm

KEY = jax.random.key(0)
near = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def linear(p, x):
    return x @ p["kernel"].T + p["bias"]  # torch stores (out, in)


def embedding(p, tokens):
    return p["kernel"][tokens]


def convolution(p, x):
    dims = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)


def torch_case(name, torch):
    """`(module, function, input, ours to theirs, magnitude to theirs)`."""
    if name == "linear":
        return torch.nn.Linear(6, 5), linear, numbers(3, 6), lambda a, b: (a.T, b.T), lambda m: m
    if name == "embedding":
        return torch.nn.Embedding(7, 5), embedding, np.array([[1, 6], [0, 1]]), lambda a, b: (a.T, b.T), lambda m: m
    module = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False)
    kernels = lambda a, b: (a.T.reshape(-1, 4, 3, 3), b.T[:, :, None, None])
    return module, convolution, numbers(2, 4, 6, 6), kernels, lambda m: m.reshape(1, -1, 1, 1)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    module, fn, x, convert, reshape = torch_case(name, torch)
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
    params["kernel"] = params.pop("weight")
    method = jpeft.DoRA(rank=3, alpha=5, targets="kernel")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    ours = trainable["kernel"]
    ours = ours.replace(a=numbers(*ours.a.shape), b=numbers(*ours.b.shape), magnitude=1 + ours.magnitude)
    trainable = {**trainable, "kernel": ours}

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(torch.nn.Sequential(module), config).eval()
    layer = model.base_model.model[0]
    if name == "embedding":
        factors = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    theirs = (*factors, layer.lora_magnitude_vector["default"].weight)
    all_of = lambda w: (*convert(w.a, w.b), reshape(w.magnitude))
    for parameter, value in zip(theirs, all_of(ours), strict=True):
        assert tuple(parameter.shape) == value.shape
        parameter.data = torch.from_numpy(np.array(value))

    @jax.jit
    def run(trainable, frozen):
        apply = lambda t: jpeft.lift(fn)(method.bind(t, frozen), x)
        grads = jax.grad(lambda t: jnp.sin(apply(t)).sum())(trainable)
        return apply(trainable), grads, jpeft.merge(method.bind(trainable, frozen))["kernel"]

    out, grads, merged = run(trainable, frozen)
    expected = model(torch.from_numpy(x))
    torch.sin(expected).sum().backward()
    near(out, expected.detach().numpy())
    for parameter, grad in zip(theirs, all_of(grads["kernel"]), strict=True):
        scale = max(1.0, float(np.abs(grad).max()))
        near(grad / scale, parameter.grad.numpy() / scale)
    near(merged, model.merge_and_unload()[0].weight.detach().numpy())


def test_the_norm_is_that_of_the_updated_matrix_in_float64():
    w, a, b = numbers(2, 9, 7), numbers(2, 9, 3), numbers(2, 3, 7)
    wide = [x.astype(np.float64) for x in (w, a, b)]
    expected = np.linalg.norm(wide[0] + 0.7 * wide[1] @ wide[2], axis=-2)
    np.testing.assert_allclose(norm(*map(jnp.asarray, (w, a, b)), 0.7), expected, rtol=1e-5)


def test_counts_are_lora_and_one_number_per_output():
    fn = lambda p, x: x @ p["kernel"]
    params, x = {"kernel": jnp.ones((6, 5))}, jnp.ones((2, 6))
    method = jpeft.DoRA(rank=2)
    trainable, _ = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 2 * (6 + 5) + 5
