"""A bias beside a kernel is found by its parent and its size."""

import jax
import jax.numpy as jnp
import pytest
from small_models import make_model

import jpeft
from jpeft.core.biases import Owned, ends, with_biases
from jpeft.core.targets import select

DENSE = ("dense",)


def sites_of(fn, params, *inputs):
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), params, is_leaf=lambda x: type(x) is tuple)
    return jpeft.find_sites(fn, shapes, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in inputs))


@pytest.mark.parametrize("kind", ["linen-scanned", "linen-scanned-axis-1", "nnx"])
def test_a_kernel_and_its_bias_name_the_kernel(kind):
    sites = make_model(kind).sites
    whole = with_biases(select(sites, ["key", "value"], DENSE), sites)
    assert list(whole) == [f"layers/attention/{n}/{leaf}" for leaf in ("kernel", "bias") for n in ("key", "value")]
    owners = [site.owner for site in whole.values()]
    assert owners == ["layers/attention/key/kernel", "layers/attention/value/kernel"] * 2
    assert {site.kind for site in whole.values()} == {"dense", "bias"}


def test_a_kernel_without_a_bias_stays_as_it_is():
    sites = make_model("plain").sites
    chosen = select(sites, ["fused", "out"], DENSE)
    assert with_biases(chosen, sites) == chosen
    whole = with_biases(select(sites, "torch_head", DENSE), sites)
    assert list(whole) == ["torch_head", "bias"] and all(isinstance(site, Owned) for site in whole.values())


def test_the_bias_of_experts_has_their_axes():
    fn = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["kernel"]) + p["bias"][:, None]
    sites = sites_of(fn, {"kernel": (3, 4, 5), "bias": (3, 5)}, (3, 2, 4))
    whole = with_biases(select(sites, "kernel", ("experts",)), sites)
    assert [whole[n].axes for n in ("kernel", "bias")] == ["bio", "bo"]


def test_more_than_one_fit_is_refused():
    fn = lambda p, x: x @ p["one"] + x @ p["two"] + p["bias"]
    sites = sites_of(fn, {"one": (4, 3), "two": (4, 3), "bias": (3,)}, (2, 4))
    with pytest.raises(ValueError, match="leave these out of targets\nbias may belong to one or two"):
        with_biases(select(sites, "one", DENSE), sites)
    fn = lambda p, x: x @ p["kernel"] + p["here"] + p["there"]
    sites = sites_of(fn, {"kernel": (4, 3), "here": (3,), "there": (3,)}, (2, 4))
    with pytest.raises(ValueError, match="kernel may have several biases"):
        with_biases(select(sites, "kernel", DENSE), sites)


# ---- where outputs are complete ----


def test_outputs_are_complete_at_the_bias_of_a_kernel_that_has_one():
    sites = make_model("linen-scanned").sites
    by_kernel, by_either = (ends(sites, t, DENSE) for t in ("down", "layers/(down|norm2)"))
    assert list(by_kernel) == list(by_either) == list(ends(sites, "down/bias", DENSE)) == ["layers/down/bias"]
    assert by_kernel["layers/down/bias"].owner == "layers/down/kernel"
    sites = make_model("plain").sites
    assert list(ends(sites, ["^out$", "torch_head"], DENSE)) == ["out", "bias"]
    with pytest.raises(ValueError, match="'norm2' matches only layers/norm2/scale"):
        ends(make_model("linen-scanned").sites, "norm2", DENSE)  # a norm's bias belongs to no kernel
