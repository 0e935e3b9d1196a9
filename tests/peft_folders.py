"""HF PEFT's folders of a small decoder, and of three layers of different shapes: read here, and ours written back."""

import json
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import near, numbers
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.interop import peft as folders

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TOKENS = np.arange(12).reshape(2, 6)
SIZES = {"first": (8, 12), "second": (12, 4), "third": (4, 4)}
X = numbers(3, 8)


def network(p, x):
    for name in SIZES:
        x = jnp.tanh(x @ p[name]["kernel"].T + p[name]["bias"])  # torch stores (out, in)
    return x


def make_network():
    """The same in torch, and its params."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    parts = {}
    for name, (n_in, n_out) in SIZES.items():
        parts |= {name: torch.nn.Linear(n_in, n_out), f"{name}_tanh": torch.nn.Tanh()}
    params = {n: {"kernel": parts[n].weight, "bias": parts[n].bias} for n in SIZES}
    params = jax.tree.map(lambda x: x.detach().numpy().copy(), params)
    return torch.nn.Sequential(OrderedDict(parts)), params


def assert_same_from_folder(config, tmp_path: Path) -> None:
    """PEFT's adapter, read from its folder, gives the same output, gradients and merge, fp32 within 1e-5.

    Written again, the folder holds PEFT's tensors to the bit; PEFT's gradients are compared by the names in it.
    """
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    net, params = make_network()
    model = peft.get_peft_model(net, config)
    trained = {n.removesuffix(".default"): p for n, p in model.named_parameters() if p.requires_grad}
    once = lambda name: f"base_model.{name.rpartition('.')[2]}"  # what torch names by the first layer that shares it
    for parameter in trained.values():
        parameter.data += torch.randn_like(parameter) / 2
    model.save_pretrained(tmp_path / "theirs")

    sites = jpeft.find_sites(network, params, X)
    method, trainable, frozen = folders.load(tmp_path / "theirs", params, sites)

    @jax.jit
    def run(trainable, frozen):
        apply = lambda t: jpeft.lift(network)(method.bind(t, frozen), X)
        grads = jax.grad(lambda t: jnp.sin(apply(t)).sum())(trainable)
        return apply(trainable), grads, jpeft.merge(method.bind(trainable, frozen))

    out, grads, merged = run(trainable, frozen)
    expected = model(torch.from_numpy(X))
    torch.sin(expected).sum().backward()
    near(out, expected.detach().numpy())

    def written(name, half):
        folders.save(tmp_path / name, method, half, frozen=frozen, sites=sites, prefix="", task_type=None)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    theirs, ours = load_file(tmp_path / "theirs" / "adapter_model.safetensors"), written("ours", trainable)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    gradients = written("gradients", grads)
    assert jpeft.count(trainable).trainable == sum(p.numel() for p in trained.values())
    for name, parameter in trained.items():
        scale = max(1.0, float(parameter.grad.abs().max()))
        near(gradients[name if name in gradients else once(name)] / scale, parameter.grad.numpy() / scale)
    unloaded = model.merge_and_unload()
    for name in SIZES:
        near(merged[name]["kernel"], getattr(unloaded, name).weight.detach().numpy())


def started(method, params, sites, seed=0):
    """`(trainable, frozen)` with noise on all that trains."""
    trainable, frozen = jax.jit(lambda k, p: method.init(k, p, sites))(jax.random.key(0), params)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + rng.normal(size=x.shape) / 5, x.dtype), trainable), frozen


def edit(folder, config=None, tensors=None):
    """Change a folder's options and tensors in place."""
    if config is not None:
        content = json.loads((folder / "adapter_config.json").read_text())
        content.update(config)
        (folder / "adapter_config.json").write_text(json.dumps(content))
    if tensors is not None:
        content = load_file(folder / "adapter_model.safetensors")
        tensors(content)
        save_file(content, folder / "adapter_model.safetensors")
