"""What the `adapters` package computed on a tiny BERT (tests/golden/adapters), and the comparison with it."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jpeft
import jpeft.models
from jpeft.core.method import Tied
from jpeft.core.tree import map_with_paths

FOLDER = Path(__file__).parent / "golden" / "adapters"


def bottleneck(get: Callable, name: str = "a", down: int = 0) -> dict:
    """The fields of a Bottleneck from the tensors of an adapter, whose down projection is its module number `down`."""
    return {
        "down": get(f"adapters.{name}.adapter_down.{down}.weight").mT,
        "down_bias": get(f"adapters.{name}.adapter_down.{down}.bias"),
        "up": get(f"adapters.{name}.adapter_up.weight").mT,
        "up_bias": get(f"adapters.{name}.adapter_up.bias"),
    }


def assert_same_as_adapters(name: str, method, fields_of: Callable, shared_of=lambda get: {}, given_of=None) -> None:
    """The same numbers give the same output and the same gradient of every trainable, fp32.

    Args:
        fields_of: the trainable fields at one place, from `get(tensor's name after the module's)`, layers stacked.
        shared_of: those that the method keeps once, from `get(tensor's whole name)`.
        given_of: what `init` is given for one place, in place of a calibration.
    """
    found = load_file(FOLDER / f"{name}.safetensors")
    apply, params = jpeft.models.load(FOLDER / "base")
    tokens = jnp.asarray(found["tokens"])
    sites = jpeft.find_sites(apply, params, tokens)
    layers = lambda prefix, path: (
        lambda tensor: np.stack([found[f"{prefix}{module(path, n)}.{tensor}"] for n in (0, 1)])
    )
    given = {path: given_of(layers("", path)) for path in method.chosen(sites)} if given_of else None
    trainable, frozen = method.init(jax.random.key(0), params, sites, given)

    def theirs(prefix: str):
        at = lambda path, leaf: leaf.replace(**fields_of(layers(prefix, path))) if jax.tree.leaves(leaf) else leaf
        if not isinstance(trainable, Tied):
            return map_with_paths(at, trainable)
        return Tied(map_with_paths(at, trainable.tree), shared_of(lambda tensor: found[f"{prefix}{tensor}"]))

    def run(trainable):
        out = jpeft.lift(apply)(method.bind(trainable, frozen), tokens)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(run, has_aux=True))(theirs(""))
    np.testing.assert_allclose(out, found["output"], atol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable) == jax.tree.structure(theirs("grad."))
    for ours, its in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs("grad.")), strict=True):
        scale = max(1.0, np.abs(its).max())
        np.testing.assert_allclose(ours / scale, its / scale, atol=1e-5)


def module(path: str, layer: int) -> str:
    """The package's name of the module whose bias lies at a path."""
    return path.replace("encoder/layer/", f"encoder/layer/{layer}/").removesuffix("/dense/bias").replace("/", ".")
