"""Prefix tuning against HF PEFT, by hand, in caches and encoder-decoders, and the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    GPT2_M,
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
    count,
)
from flax import linen as nn
from flax import nnx
from small_models import make_model
from tiny_decoders import FAMILIES

import jpeft
from jpeft.core.tree import leaves_with_paths
from jpeft.methods._prefix import Prefix

QUERY = PROJECTION.format("q")


def weight_of(half, path=QUERY):
    return dict(leaves_with_paths(getattr(half, "tree", half)))[path]


# ---- HF PEFT ----


def prompt_embeddings(w):
    """PEFT's (num_tokens, layers · 2 · kv_heads · head_dim)."""
    both = np.stack([w.keys, w.values], 1)
    return both.transpose(2, 0, 1, 3, 4).reshape(both.shape[2], -1)


def projection(trainable):
    """PEFT's embedding, first and last layer."""
    shared, w = trainable.arrays, weight_of(trainable)
    kernel = np.stack([w.key_kernel, w.value_kernel], 1).transpose(0, 1, 3, 4, 2)
    bias = np.stack([w.key_bias, w.value_bias], 1)
    first = shared["prefix_kernel"].T, shared["prefix_bias"]
    return shared["prefix_embedding"], *first, kernel.reshape(-1, kernel.shape[-1]), bias.reshape(-1)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projected", [False, True], ids=["direct", "projected"])
@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen3"])
def test_the_same_numbers_give_what_peft_gives(family, projected, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projected, encoder_hidden_size=6
    )
    method = jpeft.PrefixTuning(num_tokens=4, reparametrize=projected, encoder_hidden_size=6)
    pair = Pair(tmp_path, FAMILIES[family], config, method)
    encoder = pair.theirs.prompt_encoder["default"]
    ours_of = projection if projected else lambda trainable: [prompt_embeddings(weight_of(trainable))]
    pair.assert_same(list(encoder.parameters()), ours_of)
    if projected:
        _, made, _ = method.after_training(pair.trainable, pair.frozen)
        saved = pair.theirs.get_prompt_embedding_to_save("default")
        np.testing.assert_allclose(prompt_embeddings(weight_of(made)), saved.numpy(), atol=1e-5)


# ---- by hand ----


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, attention_fn=jpeft.attention, name="attention")(x)


def flax_attention(kind, x):
    """`(apply, params)` of Flax's multi-head attention alone."""
    if kind == "linen":
        apply, _ = jpeft.from_linen(LinenAttention())
        return apply, LinenAttention().init(KEY, x)["params"]["attention"], lambda p, x: apply({"attention": p}, x)
    module = nnx.MultiHeadAttention(2, x.shape[-1], decode=False, attention_fn=jpeft.attention, rngs=nnx.Rngs(0))
    apply, params = jpeft.from_nnx(module)
    return apply, params, apply


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_the_prefix_is_among_the_keys_of_flax_s_attention(kind):
    x = jax.random.normal(KEY, (2, 5, 8))
    _, params, apply = flax_attention(kind, x)
    sites = jpeft.find_sites(apply, params, x)
    method = jpeft.PrefixTuning(num_tokens=3, reparametrize=False)
    trainable, frozen = bound_to(method, params, sites)
    got = jpeft.lift(apply)(method.bind(trainable, frozen), x)
    project = lambda name: np.einsum("btd,dhk->bthk", x, params[name]["kernel"]) + params[name]["bias"]
    prefix = weight_of(trainable, "query/kernel")
    behind = lambda rows, own: np.concatenate([np.broadcast_to(rows, (2, *rows.shape)), own], 1)
    q, k, v = project("query"), behind(prefix.keys, project("key")), behind(prefix.values, project("value"))
    weights = jax.nn.softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 2, -1)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    expected = np.einsum("bqhd,hdo->bqo", out, params["out"]["kernel"]) + params["out"]["bias"]
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_the_mlp_is_what_the_paper_says():
    model = make_model("nnx")
    method = jpeft.PrefixTuning(num_tokens=3, encoder_hidden_size=5, embedding_size=4)
    trainable, frozen = bound_to(method, model.params, model.sites)
    w, shared = weight_of(trainable, "layers/attention/query/kernel"), trainable.arrays
    assert shared["prefix_embedding"].shape == (3, 4)
    hidden = np.tanh(shared["prefix_embedding"] @ shared["prefix_kernel"] + shared["prefix_bias"])
    plain, made, rest = method.after_training(trainable, frozen)
    got = weight_of(made, "layers/attention/query/kernel")
    for field in ("key", "value"):
        kernel, bias = np.asarray(getattr(w, f"{field}_kernel")), np.asarray(getattr(w, f"{field}_bias"))
        expected = [[hidden @ kernel[n, :, h] + bias[n, h] for h in range(2)] for n in range(3)]
        np.testing.assert_allclose(getattr(got, f"{field}s"), np.moveaxis(expected, 1, 2), atol=1e-6)


# ---- after training, starts, dropout ----


@pytest.mark.parametrize("kind", ["linen-unrolled", "nnx", "plain"])
def test_after_training_the_mlp_is_gone_and_nothing_else_changes(kind):
    model = make_model(kind)
    method = jpeft.PrefixTuning(num_tokens=3, encoder_hidden_size=5)
    trainable, frozen = bound_to(method, model.params, model.sites)
    plain, kept, rest = method.after_training(trainable, frozen)
    assert plain == jpeft.PrefixTuning(num_tokens=3, encoder_hidden_size=5, reparametrize=False)
    assert plain.after_training(kept, rest)[1] is kept
    halves = jax.eval_shape(lambda p: plain.init(KEY, p, model.sites), model.params)
    assert jax.tree.structure((kept, rest)) == jax.tree.structure(halves)
    run = jax.jit(lambda m, t, f: jpeft.lift(model.apply)(m.bind(t, f), *model.inputs), static_argnums=0)
    np.testing.assert_allclose(run(plain, kept, rest), run(method, trainable, frozen), atol=2e-5)


def test_starts():
    model = make_model("nnx")
    path = "layers/attention/query/kernel"
    start = lambda **options: jpeft.PrefixTuning(**options).init(KEY, model.params, model.sites)[0]
    direct = weight_of(start(num_tokens=200, reparametrize=False), path)
    assert direct.keys.shape == direct.values.shape == (3, 200, 2, 12)
    assert not np.allclose(direct.keys[0], direct.keys[1]) and not np.allclose(direct.keys, direct.values)
    assert float(direct.keys.mean()) == pytest.approx(0, abs=0.03)
    assert float(direct.keys.std()) == pytest.approx(1, rel=0.03)
    trained = start(num_tokens=200, encoder_hidden_size=100)
    w, shared = weight_of(trained, path), trained.arrays
    assert shared["prefix_embedding"].shape == (200, 24)
    assert float(shared["prefix_embedding"].std()) == pytest.approx(1, rel=0.03)
    for array, inputs in [(shared["prefix_kernel"], 24), (w.key_kernel, 100), (w.value_bias, 100)]:
        assert 0.8 * inputs**-0.5 < float(jnp.abs(array).max()) <= inputs**-0.5
    zero = start(init_prefix="zero", reparametrize=False)
    assert not any(np.any(x) for x in jax.tree.leaves(zero))
    zero = start(init_prefix="zero")
    assert not any(np.any(x) for x in jax.tree.leaves(zero.tree)) and np.any(zero.arrays["prefix_embedding"])


def test_dropout_is_each_row_s_and_each_layer_s_own():
    model = make_model("nnx")
    method = jpeft.PrefixTuning(num_tokens=3, reparametrize=False, dropout=0.25)
    trainable, frozen = bound_to(method, model.params, model.sites)
    tokens = jnp.tile(model.inputs[0][:1], (2, 1))
    run = jax.jit(lambda key: jpeft.lift(model.apply)(method.bind(trainable, frozen, key), tokens))
    one, other, off = run(jax.random.key(1)), run(jax.random.key(2)), run(None)
    assert np.array_equal(off[0], off[1]) and not np.allclose(one[0], one[1], atol=1e-3)
    assert not np.allclose(one, other, atol=1e-3)
    keys = method.bind(trainable, frozen, KEY)["layers"]["attention"]["query"]["kernel"].key
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3

    class Call:
        query = jnp.zeros((500, 7, 2, 12))
        joined = staticmethod(lambda keys, values: (keys, values))

    prefix = Prefix(None, jnp.ones((3, 2, 12)), jnp.ones((3, 2, 12)), KEY, axes="ioo", dropout=0.25)
    for rows in prefix.attend(Call):
        assert rows.shape == (500, 3, 2, 12)
        np.testing.assert_allclose(np.unique(rows), [0, 4 / 3], atol=1e-6)
        assert float(rows.mean()) == pytest.approx(1, abs=0.02)


# ---- positions, caches ----


def test_positions_begin_behind_the_prefix():
    batch = {"tokens": jnp.ones((1, 4), jnp.int32), "segment_ids": jnp.array([[1, 1, 2, 0]])}
    shifted = jpeft.prompted(batch, jpeft.PrefixTuning(num_tokens=5))
    assert shifted["positions"].tolist() == [[5, 6, 5, 0]] and shifted["tokens"].shape == (1, 4)
    assert jpeft.chain(jpeft.PrefixTuning(num_tokens=5), jpeft.PTuningV2(num_tokens=3)).position_shift == 8


@pytest.mark.parametrize("family", ["llama3", "mistral"])
@pytest.mark.parametrize("reparametrize", [False, True], ids=["direct", "projected"])
def test_generation_with_a_cache_is_generation_without(family, reparametrize):
    method = jpeft.PrefixTuning(num_tokens=4, reparametrize=reparametrize, encoder_hidden_size=6)
    assert_the_cache_changes_nothing(method, family, size=1.0)


# ---- encoder and decoder ----

CALLS = ("encoder/self", "decoder/self", "decoder/cross")


def encoder_decoder(params, tokens, decoder_tokens, prefixes=None):
    """Two stacks of one layer each; `prefixes` are put in by hand, `{call: (keys, values)}`."""

    def attend(name, x, y, causal):
        p = params[name]
        q, k, v = (jnp.einsum("btd,dhk->bthk", z, p[n]) for n, z in (("query", x), ("key", y), ("value", y)))
        extra = 0
        if prefixes and name in prefixes:
            k, v = (
                jnp.concatenate([jnp.broadcast_to(p, (len(z), *p.shape)), z], 1)
                for p, z in zip(prefixes[name], (k, v), strict=True)
            )
            extra = len(prefixes[name][0])
        mask = jnp.tri(q.shape[1], k.shape[1], extra, dtype=bool) if causal else None
        return x + jnp.einsum("bthk,hkd->btd", jpeft.attention(q, k, v, mask=mask), p["out"])

    memory = attend(CALLS[0], params["embed"][tokens], params["embed"][tokens], False)
    x = params["embed"][decoder_tokens]
    x = attend(CALLS[1], x, x, True)
    return attend(CALLS[2], x, memory, False) @ params["embed"].T


@functools.cache
def encoder_decoder_params():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
    call = lambda: {n: array(8, 2, 4) for n in ("query", "key", "value")} | {"out": array(2, 4, 8)}
    return {"embed": array(11, 8)} | {name: call() for name in CALLS}


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("^encoder/", CALLS[:1]),
        ("^decoder/self", CALLS[1:2]),
        ("cross", CALLS[2:]),
        ("attention-calls", CALLS),
    ],
)
def test_the_targets_say_which_calls_of_an_encoder_decoder(targets, adapted):
    params = encoder_decoder_params()
    inputs = jnp.array([[1, 2, 3, 4]]), jnp.array([[5, 6, 7]])
    sites = jpeft.find_sites(encoder_decoder, params, *inputs)
    method = jpeft.PrefixTuning(num_tokens=3, reparametrize=False, targets=targets)
    trainable, frozen = bound_to(method, params, sites)
    placed = {path.removesuffix("/query"): w for path, w in leaves_with_paths(trainable) if isinstance(w, Prefix)}
    assert set(placed) == set(adapted)
    got = jpeft.lift(encoder_decoder)(method.bind(trainable, frozen), *inputs)
    by_hand = encoder_decoder(params, *inputs, {name: (w.keys, w.values) for name, w in placed.items()})
    np.testing.assert_allclose(got, by_hand, atol=2e-5)
    assert not np.allclose(got, encoder_decoder(params, *inputs), atol=1e-2)


# ---- published counts ----


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (LLAMA2_7B, {"reparametrize": False}, 5_242_880),
        (LLAMA3_8B, {"reparametrize": False}, 1_310_720),
        (LLAMA3_70B, {"reparametrize": False}, 3_276_800),
        (QWEN3_8B, {"reparametrize": False}, 1_474_560),
        (LLAMA3_3B, {"reparametrize": False, "num_tokens": 200}, 11_468_800),
        (GPT2_M, {"reparametrize": False, "num_tokens": 5}, 245_760),
        (LLAMA2_7B, {}, 136_659_456),
        (LLAMA3_8B, {}, 34_165_248),
        (QWEN3_8B, {}, 38_367_744),
        (GPT2_M, {"num_tokens": 5}, 25_744_896),
    ],
)
def test_counts_on_public_models_equal_the_published_integers(config, options, expected):
    assert count(jpeft.PrefixTuning(**options), config) == expected


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "whole num_tokens >= 1, got num_tokens=0"),
        ({"encoder_hidden_size": 2.5}, "whole encoder_hidden_size >= 1"),
        ({"embedding_size": 0}, "whole embedding_size >= 1"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
        ({"init_prefix": "random"}, "init_prefix in .*'zero'.*, got 'random'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.PrefixTuning(**options)


def test_a_model_that_shows_no_attention_is_told_which_line_to_change():
    fn = lambda p, x: nn.dot_product_attention(*[(x @ p["w"]).reshape(2, 5, 2, 4)] * 3)
    params, x = {"w": jnp.ones((8, 8))}, jnp.ones((2, 5, 8))
    sites = jpeft.find_sites(fn, params, x)
    with pytest.raises(ValueError, match=r"matches no call of jpeft.attention(.|\n)*attention_fn=jpeft.attention"):
        jpeft.PrefixTuning().init(KEY, params, sites)


def test_it_cannot_be_merged():
    model = make_model("plain")
    method = jpeft.PrefixTuning(num_tokens=3, encoder_hidden_size=5, targets="query")
    with pytest.raises(ValueError, match="query: a prefix is no change of the weights"):
        jpeft.merge(method.bind(*method.init(KEY, model.params, model.sites)))
