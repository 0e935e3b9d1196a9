"""TinyLoRA against HF PEFT, its formula in float64 and the published counts."""

import dataclasses
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import near, numbers

import jpeft
import jpeft.models
from jpeft.core.method import Tied
from jpeft.core.tree import map_with_paths
from jpeft.interop import peft as folders
from jpeft.methods.tinylora import Projected
from jpeft.train import adapter

KEY = jax.random.key(0)


def network(p, tokens):
    x = p["table"]["kernel"][tokens]
    x = jnp.tanh(x @ p["first"]["kernel"].T)
    return x @ p["second"]["kernel"].T


TOKENS = np.array([[1, 6], [0, 1]])
SIZES = {"table": (7, 5), "first": (6, 5), "second": (4, 6)}
PARAMS = {name: {"kernel": numbers(*shape)} for name, shape in SIZES.items()}
SITES = jpeft.find_sites(network, PARAMS, TOKENS)
ALL = "table|first|second"


def start(fn=network, params=PARAMS, sites=SITES, **options):
    method = jpeft.TinyLoRA(**{"u": 3, "targets": ALL, **options})
    trainable, frozen = jax.jit(lambda k, p: method.init(k, p, sites))(KEY, params)
    return method, jax.tree.map(lambda x: jnp.asarray(numbers(*x.shape)), trainable), frozen


def of_leaves(half):
    return half.tree if isinstance(half, Tied) else half


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("weight_tying", [0.0, 0.4, 1.0])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(weight_tying):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    parts = OrderedDict(table=torch.nn.Embedding(7, 5), first=torch.nn.Linear(5, 6, bias=False))
    parts |= OrderedDict(tanh=torch.nn.Tanh(), second=torch.nn.Linear(6, 4, bias=False))
    for name, w in PARAMS.items():
        parts[name].weight.data = torch.from_numpy(w["kernel"].copy())
    config = peft.TinyLoraConfig(r=2, u=3, weight_tying=weight_tying, target_modules=list(SIZES))
    model = peft.get_peft_model(torch.nn.Sequential(parts), config)
    vectors = dict(model.base_model.tinylora_v["default"].items())
    groups = {0.0: 3, 0.4: 2, 1.0: 1}[weight_tying]
    assert len(vectors) == groups
    given = numbers(groups, 3)
    for n, v in vectors.items():
        v.data = torch.from_numpy(given[int(n)].copy())

    method, trainable, frozen = start(weight_tying=weight_tying, balanced=True)

    def adopted(path, w):
        if not isinstance(w, Projected):
            return w
        layer = getattr(model.base_model.model, path.split("/")[0])
        a, b, p = (getattr(layer, f"tinylora_{name}")["default"].numpy() for name in "ABP")
        a, b, p = (b, a, p) if path.startswith("table") else (a.T, b.T, p.swapaxes(1, 2))
        near(np.abs(w.a), np.abs(a))
        near(np.abs(w.b), np.abs(b))
        return w.replace(a=jnp.asarray(a), b=jnp.asarray(b), p=jnp.asarray(p))

    tree = map_with_paths(adopted, of_leaves(frozen))
    if weight_tying:
        frozen = dataclasses.replace(frozen, tree=tree)
        trainable = dataclasses.replace(trainable, arrays=trainable.arrays | {"vectors": jnp.asarray(given)})
    else:
        frozen = tree
        own = {n: {"kernel": trainable[n]["kernel"].replace(v=jnp.asarray(given[k]))} for k, n in enumerate(SIZES)}
        trainable = own

    @jax.jit
    def run(trainable, frozen):
        apply = lambda t: jpeft.lift(network)(method.bind(t, frozen), TOKENS)
        return apply(trainable), jax.grad(lambda t: jnp.sin(apply(t)).sum())(trainable)

    out, grads = run(trainable, frozen)
    expected = model(torch.from_numpy(TOKENS))
    torch.sin(expected).sum().backward()
    near(out, expected.detach().numpy())
    ours = grads.arrays["vectors"] if weight_tying else jnp.stack([grads[n]["kernel"].v for n in SIZES])
    theirs = np.stack([vectors[str(n)].grad.numpy() for n in range(groups)])
    near(ours / np.abs(theirs).max(), theirs / np.abs(theirs).max())
    unloaded = model.merge_and_unload()
    for name, w in jpeft.merge(method.bind(trainable, frozen)).items():
        near(w["kernel"], getattr(unloaded, name).weight.detach().numpy())


# ---- closed form ----


@pytest.mark.parametrize("balanced", [False, True])
def test_the_update_is_within_the_leading_singular_vectors_in_float64(balanced):
    method, trainable, frozen = start(balanced=balanced)
    merged = jpeft.merge(method.bind(trainable, frozen))
    for name in ("first", "second"):
        w = np.float64(PARAMS[name]["kernel"])  # (out, in)
        left, sigma, right = np.linalg.svd(w)
        signs = np.sign(np.sum(np.float64(frozen[name]["kernel"].a) * right[:2].T, axis=0))
        r = np.einsum("u,uqr->rq", np.float64(trainable[name]["kernel"].v), np.float64(frozen[name]["kernel"].p))
        r = signs[:, None] * r * signs
        root = np.diag(np.sqrt(sigma[:2]))
        middle = root @ r @ root if balanced else np.diag(sigma[:2]) @ r
        update = left[:, :2] @ middle @ right[:2]
        np.testing.assert_allclose(merged[name]["kernel"], w + update, atol=1e-4)


# ---- layers that share ----

LAYERS = 3
STACKED = {"in": numbers(5, 6), "q": numbers(LAYERS, 6, 6) / 4, "v": numbers(LAYERS, 6, 6) / 4, "out": numbers(6, 4)}
X = numbers(2, 5)


def stacked(p, x):
    step = lambda h, w: (jnp.tanh(h @ w["q"]) @ w["v"], None)
    return lax.scan(step, x @ p["in"], {"q": p["q"], "v": p["v"]})[0] @ p["out"]


STACKED_SITES = jpeft.find_sites(stacked, STACKED, X)


@pytest.mark.parametrize(("weight_tying", "groups"), [(0.125, 7), (0.5, 4), (0.75, 2), (0.9, 1), (1.0, 1)])
def test_neighbours_within_and_across_layers_share(weight_tying, groups):
    method, trainable, frozen = start(stacked, STACKED, STACKED_SITES, weight_tying=weight_tying, targets="all-linear")
    assert trainable.arrays["vectors"].shape == (groups, 3)
    order = [("in", ()), *((name, (n,)) for n in range(LAYERS) for name in "qv"), ("out", ())]
    found = [int(frozen.arrays[f"group of {name}"][place]) for name, place in order]
    assert found == [min(k // (8 // groups), groups - 1) for k in range(8)]
    bound = method.bind(trainable, frozen)
    lifted = jax.grad(lambda t: jnp.sum(jpeft.lift(stacked)(method.bind(t, frozen), X) ** 2))(trainable)
    merged = jax.grad(lambda t: jnp.sum(stacked(jpeft.merge(method.bind(t, frozen)), X) ** 2))(trainable)
    scale = np.abs(merged.arrays["vectors"]).max()
    np.testing.assert_allclose(lifted.arrays["vectors"] / scale, merged.arrays["vectors"] / scale, atol=1e-5)
    np.testing.assert_allclose(jpeft.lift(stacked)(bound, X), stacked(jpeft.merge(bound), X), rtol=1e-4, atol=1e-4)
    assert jpeft.count(bound).trainable == 3 * groups


@pytest.mark.parametrize("weight_tying", [0.0, 1.0])
def test_what_is_saved_is_read_back_and_not_made_again(weight_tying, tmp_path):
    method, trainable, frozen = start(stacked, STACKED, STACKED_SITES, weight_tying=weight_tying, targets="all-linear")
    flip = lambda w: w.replace(a=-w.a) if isinstance(w, Projected) else w  # as another machine's decomposition may be
    tree = {name: flip(w) for name, w in of_leaves(frozen).items()}
    frozen = dataclasses.replace(frozen, tree=tree) if weight_tying else tree
    mark = adapter.fingerprint(STACKED)
    adapter.save_adapter(tmp_path, method, trainable, frozen, base="here", base_fingerprint=mark, seed=0)
    loaded = adapter.load_adapter(tmp_path, STACKED, STACKED_SITES, jpeft.methods())
    for ours, theirs in zip(jax.tree.leaves(loaded[1:]), jax.tree.leaves((trainable, frozen)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (tmp_path / "frozen.safetensors").unlink()
    with pytest.raises(ValueError, match="in: the saved adapter has lost its frozen arrays a, b, p"):
        adapter.load_adapter(tmp_path, STACKED, STACKED_SITES, jpeft.methods())


@pytest.mark.parametrize("weight_tying", [0.0, 1.0])
def test_other_libraries_get_the_lora_that_it_amounts_to(weight_tying, tmp_path):
    method, trainable, frozen = start(weight_tying=weight_tying)
    folders.save(tmp_path, method, trainable, frozen=frozen, sites=SITES, prefix="", overwrite=True)
    plain, *halves = folders.load(tmp_path, PARAMS, SITES)
    assert isinstance(plain, jpeft.LoRA)
    near(jpeft.lift(network)(plain.bind(*halves), TOKENS), jpeft.lift(network)(method.bind(trainable, frozen), TOKENS))


# ---- the start ----


def test_v_starts_at_zero_between_random_matrices_of_each_layer():
    method = jpeft.TinyLoRA(rank=3, u=400)
    trainable, frozen = method.init(KEY, STACKED, STACKED_SITES)
    assert all(np.all(x == 0) for x in jax.tree.leaves(trainable))
    p = frozen["q"].p
    assert p.shape == (LAYERS, 400, 3, 3) and abs(p.std() - 3**-0.5) < 0.01 and not np.allclose(p[0], p[1])
    grads = jax.grad(lambda t: jnp.sum(jpeft.lift(stacked)(method.bind(t, frozen), X) ** 2))(trainable)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads))


# ---- published counts ----


@pytest.mark.parametrize(("weight_tying", "published"), [(0.0, 3_584), (1.0, 64)])
def test_counts_on_a_public_model_equal_the_published_integers(weight_tying, published):
    config = dict(model_type="llama", hidden_size=3072, num_hidden_layers=28, num_attention_heads=24)
    config |= dict(num_key_value_heads=8, intermediate_size=8192, vocab_size=128256)
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.TinyLoRA(targets=["q_proj", "v_proj"], weight_tying=weight_tying)
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == published


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "whole rank >= 1, got rank=0"),
        ({"u": 1.5}, "whole u >= 1, got u=1.5"),
        ({"weight_tying": 1.1}, "0 <= weight_tying <= 1, got weight_tying=1.1"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.TinyLoRA(**options)


def test_sites_are_checked_before_anything_is_made():
    with pytest.raises(ValueError, match=r"second/kernel: rank 5 is above min\(in, out\) = min\(6, 4\)"):
        start(rank=5)
