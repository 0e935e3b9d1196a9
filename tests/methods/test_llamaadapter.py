"""LLaMA-Adapter against HF PEFT and by hand; layers, quantized and adapted projections, caches, published counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    KEY,
    LLAMA2_7B,
    LLAMA3_3B,
    LLAMA3_8B,
    LLAMA3_70B,
    PROJECTION,
    QWEN3_8B,
    Pair,
    assert_the_cache_changes_nothing,
    bound_to,
    close,
    count,
    filled,
)
from small_models import make_model
from tiny_decoders import BASE

import jpeft
from jpeft.core.tree import leaves_with_paths, map_with_paths
from jpeft.methods.llamaadapter import Prompted

QUERY = PROJECTION.format("q")


def weight_of(half, path=QUERY):
    return dict(leaves_with_paths(half))[path]


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layers", [2, 3])
def test_the_same_numbers_give_what_peft_gives(layers, kv_heads, tmp_path):
    peft = pytest.importorskip("peft")
    pair = Pair(
        tmp_path,
        BASE | {"model_type": "llama", "num_key_value_heads": kv_heads},
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers),
        jpeft.LLaMAAdapter(num_tokens=4, num_layers=layers, gate="scalar", tanh=False),
    )
    modules = [layer.self_attn for layer in pair.theirs.base_model.model.model.layers[-layers:]]
    of = lambda w: [x for n in range(layers) for x in (w.prompt[n][None], w.gate[n])]
    tensors = [x for module in modules for x in (module.adaption_prompt, module.adaption_gate)]
    pair.assert_same(tensors, lambda trainable: of(weight_of(trainable)))


# ---- by hand ----


def layered(params, x, prompts=(), gates=()):
    """Layers of attention with biases on keys and values, each kernel in another layout; prompts put in by hand."""
    for n, p in enumerate(params["layers"]):
        project = {
            "query": lambda x, p=p: jnp.einsum("btd,dhk->bthk", x, p["query"]["kernel"]),
            "key": lambda x, p=p: (x @ p["key"]["kernel"].T + p["key"]["bias"]).reshape(*x.shape[:2], 2, 3),
            "value": lambda x, p=p: jnp.einsum("btd,hdk->bthk", x, p["value"]["kernel"]) + p["value"]["bias"],
        }
        q, k, v = (project[name](x) for name in ("query", "key", "value"))
        out = jpeft.attention(jnp.sin(q), jnp.sin(k), v, is_causal=True)
        if len(prompts) > n and prompts[n] is not None:
            rows = prompts[n][None]
            k, v = (jnp.repeat(project[name](rows), 2, 2) for name in ("key", "value"))
            weights = jax.nn.softmax(jnp.einsum("bqhd,pkhd->bhqk", jnp.sin(q), k) / 3**0.5, -1)
            out = out + gates[n][:, None] * jnp.einsum("bhqk,pkhd->bqhd", weights, v)
        x = x + jnp.einsum("bthk,hkd->btd", out, p["out"])
    return x


def layered_params(layers=3):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
    layer = lambda: {
        "query": {"kernel": array(8, 4, 3)},
        "key": {"kernel": array(6, 8), "bias": array(6)},
        "value": {"kernel": array(2, 8, 3), "bias": array(2, 3)},
        "out": array(4, 3, 8),
    }
    return {"layers": [layer() for _ in range(layers)]}, array(2, 5, 8)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("gate", ["head", "scalar"])
def test_prompts_go_through_the_projections_and_their_biases_alone(gate, tanh):
    params, x = layered_params()
    sites = jpeft.find_sites(layered, params, x)
    method = jpeft.LLaMAAdapter(num_tokens=4, num_layers=2, gate=gate, tanh=tanh)
    trainable, frozen = bound_to(method, params, sites)
    got = jpeft.lift(layered)(method.bind(trainable, frozen), x)
    placed = {path: w for path, w in leaves_with_paths(trainable) if isinstance(w, Prompted)}
    assert list(placed) == ["layers/1/query/kernel", "layers/2/query/kernel"]
    prompts = [None, *(w.prompt for w in placed.values())]
    act = jnp.tanh if tanh else lambda x: x
    gates = [None, *(act(w.gate) for w in placed.values())]
    np.testing.assert_allclose(got, layered(params, x, prompts, gates), atol=2e-6)
    assert not np.allclose(got, layered(params, x), atol=1e-2)


@pytest.mark.parametrize(
    "other", [jpeft.NF4(block_size=16), jpeft.Int8(), jpeft.LoRA(rank=2, targets=["key", "value"])]
)
def test_prompts_go_through_quantized_and_adapted_projections(other):
    params, x = layered_params()
    sites = jpeft.find_sites(layered, params, x)
    method = jpeft.LLaMAAdapter(num_tokens=4, num_layers=3)
    both = jpeft.chain(other, method)
    trainable, frozen = both.init(KEY, params, sites)
    trainable = filled(trainable)
    inner = jpeft.merge(other.bind(trainable[0], other.init(KEY, params, sites)[1]))
    own, rest = method.init(KEY, inner, sites)
    prompts = dict(leaves_with_paths(trainable[1]))
    put = lambda path, w: w.replace(prompt=prompts[path].prompt, gate=prompts[path].gate)
    own = map_with_paths(lambda path, w: put(path, w) if isinstance(w, Prompted) else w, own)
    got = jpeft.lift(layered)(both.bind(trainable, frozen), x)
    close(got, jpeft.lift(layered)(method.bind(own, rest), x), 2e-6)


def test_it_is_last_in_a_chain_with_methods_on_keys_and_values():
    params, x = layered_params()
    sites = jpeft.find_sites(layered, params, x)
    method = jpeft.LLaMAAdapter(num_tokens=4, num_layers=2)
    with pytest.raises(ValueError, match="layers/1/key/kernel: .*put its method last in the chain"):
        jpeft.chain(method, jpeft.LoRA(rank=2)).init(KEY, params, sites)
    jpeft.chain(method, jpeft.LoRA(rank=2, targets="query")).init(KEY, params, sites)


# ---- starts ----


@pytest.mark.parametrize("kind", ["linen-scanned", "linen-unrolled", "nnx", "plain"])
def test_it_starts_at_the_pretrained_function_to_the_bit_and_moves_by_its_gates(kind):
    model = make_model(kind)
    method = jpeft.LLaMAAdapter(**jpeft.LLaMAAdapter.SMALL)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    run = jax.jit(lambda t: jpeft.lift(model.apply)(method.bind(t, frozen), *model.inputs))
    far = map_with_paths(lambda _, w: w.replace(prompt=100 * w.prompt) if isinstance(w, Prompted) else w, trainable)
    assert np.array_equal(run(trainable), run(far))
    np.testing.assert_allclose(run(trainable), model.apply(model.params, *model.inputs), atol=1e-5)
    grads = jax.jit(jax.grad(lambda t: jnp.sin(run(t)).sum()))(trainable)
    for _, w in leaves_with_paths(grads):
        if isinstance(w, Prompted):
            assert np.all(w.gate != 0) and not np.any(w.prompt)


def test_starts():
    model = make_model("nnx")
    method = jpeft.LLaMAAdapter(num_tokens=200, num_layers=2)
    w = weight_of(method.init(KEY, model.params, model.sites)[0], "layers/attention/query/kernel")
    assert w.prompt.shape == (2, 200, 24) and w.gate.shape == (2, 2) and not np.any(w.gate)
    assert not np.allclose(w.prompt[0], w.prompt[1])
    assert float(w.prompt.std()) == pytest.approx(1, rel=0.03)
    scalar = jpeft.LLaMAAdapter(num_layers=2, gate="scalar").init(KEY, model.params, model.sites)[0]
    assert weight_of(scalar, "layers/attention/query/kernel").gate.shape == (2, 1)


# ---- layers ----


def scanned_like(unrolled, scanned, start):
    """The trainables of a scanned model from those of the unrolled one's last layers."""
    found = {path: w for path, w in leaves_with_paths(unrolled) if isinstance(w, Prompted)}
    assert [path.split("/")[0] for path in found] == [f"layer_{n}" for n in range(start, 3)]
    stacked = lambda name: jnp.stack([getattr(w, name) for w in found.values()])
    put = lambda _, w: w.replace(prompt=stacked("prompt"), gate=stacked("gate")) if isinstance(w, Prompted) else w
    return map_with_paths(put, scanned)


@pytest.mark.parametrize("kind", ["linen-scanned", "linen-scanned-axis-1"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_top_of_a_stack_is_what_the_last_layers_by_number_are(num_layers, kind):
    one, other = make_model("linen-unrolled"), make_model(kind)
    method = jpeft.LLaMAAdapter(num_tokens=3, num_layers=num_layers)
    axis = 1 if kind.endswith("1") else 0
    stack = lambda *layers: jnp.stack(layers, min(axis, layers[0].ndim))
    params = dict(one.params)
    layers = [params.pop(f"layer_{n}") for n in range(3)]
    params["layers"] = jax.tree.map(stack, *layers)
    unrolled = bound_to(method, one.params, one.sites)
    trainable, frozen = method.init(KEY, params, other.sites)
    trainable = scanned_like(unrolled[0], trainable, 3 - num_layers)
    got = jax.jit(lambda t: jpeft.lift(other.apply)(method.bind(t, frozen), *other.inputs))(trainable)
    np.testing.assert_allclose(got, jpeft.lift(one.apply)(method.bind(*unrolled), *one.inputs), atol=1e-5)


def test_lower_layers_hold_no_prompts_and_compute_none():
    model = make_model("linen-scanned")
    found = {}
    for num_layers in (1, 3):
        method = jpeft.LLaMAAdapter(num_tokens=300, num_layers=num_layers)
        bound = method.bind(*method.init(KEY, model.params, model.sites))
        compiled = jax.jit(jpeft.lift(model.apply)).lower(bound, *model.inputs).compile()
        found[num_layers] = compiled.as_text().count("f32[3,300,24]"), compiled.as_text().count(" while(")
    assert found[1] == (0, 1) and found[3][0] > 0, "one layer is no loop, and two are one"


def one_layer(params, n, x):
    return layered({"layers": [jax.tree.map(lambda w: w[n], params["layers"])]}, x)


def looped(params, x):
    return one_layer(params, 2, one_layer(params, 1, one_layer(params, 0, x)))


@pytest.mark.parametrize("index", ["known", "traced"])
def test_layers_taken_one_by_one_have_their_own_prompts(index):
    """A loop that indexes the stack; where the index is traced a lower layer has a prompt behind a gate of zero."""
    params, x = layered_params()
    stacked = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}

    fn = looped if index == "known" else lambda p, x: jax.lax.fori_loop(0, 3, lambda n, x: one_layer(p, n, x), x)
    method = jpeft.LLaMAAdapter(num_tokens=4, num_layers=2)
    sites = jpeft.find_sites(looped, stacked, x)
    trainable, frozen = bound_to(method, stacked, sites)
    w = weight_of(trainable, "layers/query/kernel")
    assert w.prompt.shape == (2, 4, 8)
    by_hand = layered(params, x, [None, *w.prompt], [None, *jnp.tanh(w.gate)])
    np.testing.assert_allclose(jpeft.lift(fn)(method.bind(trainable, frozen), x), by_hand, atol=2e-6)


# ---- caches ----


@pytest.mark.parametrize("family", ["llama3", "llama-linear-biases", "qwen2"])
def test_generation_with_a_cache_is_generation_without(family):
    assert_the_cache_changes_nothing(jpeft.LLaMAAdapter(num_tokens=4, num_layers=2), family, size=1.0)


def test_positions_are_the_model_s_own():
    assert jpeft.LLaMAAdapter().position_shift == 0


# ---- published counts ----

PEFT = {"gate": "scalar", "tanh": False}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (LLAMA2_7B, {}, 1_229_760),
        (LLAMA3_8B, {}, 1_229_760),
        (LLAMA3_70B, {}, 2_459_520),
        (QWEN3_8B, {}, 1_229_760),
        (LLAMA3_3B, {"num_tokens": 100, "num_layers": 28} | PEFT, 8_601_628),
    ],
)
def test_counts_on_public_models_equal_the_published_integers(config, options, expected):
    assert count(jpeft.LLaMAAdapter(**options), config) == expected


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "whole num_tokens >= 1, got num_tokens=0"),
        ({"num_layers": 1.5}, "whole num_layers >= 1"),
        ({"gate": "none"}, "gate in .*'scalar'.*, got 'none'"),
        ({"layer_pattern": "layer"}, "layer_pattern with a group"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LLaMAAdapter(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nnx", {}, "layers/attention/query/kernel: num_layers 30 is above its 3 layers; write num_layers=3"),
        ("linen-unrolled", {}, "at least num_layers=30 layers, got layer_.: 3 layers"),
        ("linen-unrolled", {"num_layers": 1, "targets": "layer_0/"}, "layer_0/.* is in the last 1 layers"),
        ("plain", {"num_layers": 2}, "fused: fused makes queries as well as keys or values"),
    ],
)
def test_layers_and_calls_that_do_not_fit_are_refused(kind, options, message):
    model = make_model(kind)
    with pytest.raises(ValueError, match=message):
        jpeft.LLaMAAdapter(**options).init(KEY, model.params, model.sites)


SHAPED = {  # a call's keys and values, and how many heads they have
    "no one kernel makes its keys": (lambda p, x: (x @ p["k"] + x @ p["v"], x @ p["v"]), 2),
    "keys are made of 6 numbers and its values of 8": (lambda p, x: (x[..., :6] @ p["w"], x @ p["v"]), 2),
    r"key has outputs \[2, 4\]; expected \(4, 2\), the heads first": (
        lambda p, x: (jnp.einsum("btd,dhk->btkh", x, p["key"]), x @ p["v"]),
        4,
    ),
}


@pytest.mark.parametrize("message", SHAPED)
def test_projections_that_a_prompt_cannot_take_are_refused(message):
    make, kv_heads = SHAPED[message]
    heads = lambda y: y.reshape(2, 5, kv_heads, -1)
    fn = lambda p, x: jpeft.attention(heads(x @ p["q"]), *map(heads, make(p, x)))
    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "w": (6, 8), "key": (8, 2, 4)}
    params, x = {name: jnp.ones(shape) for name, shape in shapes.items()}, jnp.ones((2, 5, 8))
    sites = jpeft.find_sites(fn, params, x)
    with pytest.raises(ValueError, match=message):
        jpeft.LLaMAAdapter(num_layers=1).init(KEY, params, sites)


def test_layers_stacked_in_two_ways_have_no_order():
    site = dataclasses.replace(make_model("plain").sites["query"], axes="ss")
    assert "stacked in more than one way" in jpeft.LLaMAAdapter().check(site)


def test_keys_that_do_not_come_through_their_projection_are_refused():
    model = make_model("plain")
    method = jpeft.LLaMAAdapter(targets="query", modules_to_save=("^key$",))
    bound = method.bind(*method.init(KEY, model.params, model.sites))
    with pytest.raises(ValueError, match="come from key and value in the same run, key made none"):
        jpeft.lift(model.apply)(bound, *model.inputs)


def test_it_cannot_be_merged():
    model = make_model("plain")
    method = jpeft.LLaMAAdapter(targets="query")
    with pytest.raises(ValueError, match="query: a gated prompt is no change of the weights"):
        jpeft.merge(method.bind(*method.init(KEY, model.params, model.sites)))
