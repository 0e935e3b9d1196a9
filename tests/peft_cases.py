"""One layer in torch and as a function, and the comparison that every method HF PEFT has must pass."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.method import Tied

near = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def linear(p, x):
    return x @ p["kernel"].T + p["bias"]  # torch stores (out, in)


def embedding(p, tokens):
    return p["kernel"][tokens]


def convolution(p, x, groups=1, **options):
    dims = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(
        x, p["kernel"], padding=((1, 1), (1, 1)), dimension_numbers=dims, feature_group_count=groups, **options
    ) + p["bias"].reshape(-1, 1, 1)


@dataclass(frozen=True)
class Case:
    """A torch layer, the function that it is, an input, and PEFT's shapes of our A (in, r) and B (r, out)."""

    module: Any
    fn: Callable
    x: Any
    factors: Callable
    vector: Callable = lambda v: v

    @property
    def params(self):
        params = {n: jnp.asarray(p.detach().numpy()) for n, p in self.module.named_parameters()}
        return {"kernel" if n == "weight" else n: p for n, p in params.items()}


def make_case(name: str) -> Case:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    flat = lambda a, b: (a.T, b.T)
    if name == "linear":
        return Case(torch.nn.Linear(6, 5), linear, numbers(3, 6), flat)
    if name == "wide linear":  # for methods that cut a matrix in equal blocks
        return Case(torch.nn.Linear(12, 8), linear, numbers(3, 12), flat)
    if name == "embedding":
        return Case(torch.nn.Embedding(7, 5), embedding, np.array([[1, 6], [0, 1]]), flat)
    stride = {"convolution": 1, "strided convolution": 2}[name]  # PEFT's A forgets a dilation
    module = torch.nn.Conv2d(4, 6, 3, padding=1, stride=stride)
    fn = functools.partial(convolution, window_strides=(stride,) * 2)
    kernels = lambda a, b: (a.T.reshape(-1, 4, 3, 3), b.T[:, :, None, None])
    return Case(module, fn, numbers(2, 4, 6, 6), kernels, lambda v: v.reshape(1, -1, 1, 1))


def assert_same_as_peft(
    case: Case, method, config, theirs_of: Callable, ours_of: Callable, calibration=None, prepare=lambda model: None
) -> None:
    """The same random trainables give the same output, gradients and merge, fp32 within 1e-5.

    `theirs_of(layer)` are PEFT's trainable tensors, `ours_of(weight)` ours in the same order and shapes.
    `prepare(model)` is what PEFT runs before the adapters are put in, for methods that start from data.
    """
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    sites = jpeft.find_sites(case.fn, case.params, case.x)
    start = jax.jit(lambda k, p: method.init(k, p, sites, calibration))
    trainable, frozen = jax.block_until_ready(start(jax.random.key(0), case.params))
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: jnp.asarray(x + rng.normal(size=x.shape) / 2, x.dtype), trainable)

    model = torch.nn.Sequential(case.module)
    prepare(model)
    model = peft.get_peft_model(model, config).eval()
    theirs = theirs_of(model.base_model.model[0])
    for parameter, value in zip(theirs, ours_of(_kernel_of(trainable)), strict=True):
        assert tuple(parameter.shape) == value.shape
        parameter.data = torch.from_numpy(np.array(value))

    @jax.jit
    def run(trainable, frozen):
        apply = lambda t: jpeft.lift(case.fn)(method.bind(t, frozen), case.x)
        grads = jax.grad(lambda t: jnp.sin(apply(t)).sum())(trainable)
        return apply(trainable), grads, jpeft.merge(method.bind(trainable, frozen))

    out, grads, merged = run(trainable, frozen)
    expected = model(torch.from_numpy(case.x))
    torch.sin(expected).sum().backward()
    near(out, expected.detach().numpy())
    for parameter, grad in zip(theirs, ours_of(_kernel_of(grads)), strict=True):
        scale = max(1.0, float(np.abs(grad).max()))
        near(grad / scale, parameter.grad.numpy() / scale)
    unloaded = dict(model.merge_and_unload()[0].named_parameters())
    near(merged["kernel"], unloaded["weight"].detach().numpy())
    if "bias" in merged:
        near(merged["bias"], unloaded["bias"].detach().numpy())


def _kernel_of(half):
    """The kernel's Weight in one half, with the arrays that it shares with others."""
    if not isinstance(half, Tied):
        return half["kernel"]
    weight = half.tree["kernel"]
    return weight.replace(**{field: half.arrays[name] for field, name in weight.tied().items()})


def low_rank_tensors(layer) -> tuple:
    """PEFT's A and B of a layer."""
    if hasattr(layer, "lora_embedding_A") and "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def assert_starts_as_peft(case: Case, method, config, calibration=None, prepare=lambda model: None) -> None:
    """A low-rank method starts at PEFT's A and B, up to the signs of their columns, on PEFT's base."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    sites = jpeft.find_sites(case.fn, case.params, case.x)
    trainable, frozen = jax.block_until_ready(method.init(jax.random.key(0), case.params, sites, calibration))
    model = torch.nn.Sequential(case.module)
    prepare(model)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    theirs = [tensor.detach().numpy() for tensor in low_rank_tensors(layer)]
    ours = case.factors(trainable["kernel"].a, trainable["kernel"].b)
    for one, other in zip(ours, theirs, strict=True):
        near(np.abs(one), np.abs(other))
    near(ours[1] @ ours[0], theirs[1] @ theirs[0])
    near(frozen["kernel"].base, layer.get_base_layer().weight.detach().numpy())


def assert_named_as_peft(case: Case, method, config) -> None:
    """The method's `EXPORT` gives the names and shapes of PEFT's own state dict, and its configuration."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(torch.nn.Sequential(case.module), config)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs = {name.removeprefix("base_model.model.0."): tuple(x.shape) for name, x in state.items()}
    site = jpeft.find_sites(case.fn, case.params, case.x)["kernel"]
    trainable, _ = method.init(jax.random.key(0), case.params, jpeft.find_sites(case.fn, case.params, case.x))
    w, window = trainable["kernel"], site.shape[1:] if site.kind == "conv" else ()

    def shape(field, letters):
        sizes = dict(zip(w.FIELDS[field], getattr(w, field).shape[-len(w.FIELDS[field]) :], strict=True))
        one = (1,) * len(window[1:])
        parts = {**{k: (n,) for k, n in sizes.items()}, "w": one, **({"i": window} if window else {})}
        return sum((parts.get(letter, (1,)) for letter in letters), ())

    assert {name: shape(*rule) for name, rule in method.EXPORT.tensors[site.kind].items()} == theirs
    for name, field in method.EXPORT.config.items():
        value = getattr(method, field) if isinstance(field, str) else getattr(method, field[0]) == field[1]
        assert getattr(config, name) == value, name
    assert {name: getattr(config, name) for name in method.EXPORT.fixed} == method.EXPORT.fixed
    assert config.peft_type == method.EXPORT.peft_type
