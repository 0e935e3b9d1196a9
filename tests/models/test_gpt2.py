"""GPT-2: logits of `transformers` in both directions, cached and packed runs, published sizes, sites."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_decoders import random_model

import jpeft
from jpeft import models
from jpeft.core.targets import select

BASE = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
BASE |= {"bos_token_id": 0, "eos_token_id": 0}  # within the small vocabulary
OPTIONS = {
    "n_inner": 40,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-3,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "public": BASE,
    "options": BASE | OPTIONS,
    "scaled-by-layer": BASE | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled": BASE | {"scale_attn_weights": False, "activation_function": "relu"},
}
CLOSE = dict(rtol=0, atol=2e-5)
theirs = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # their warnings, not ours


def parity(test):
    for mark in theirs:
        test = mark(test)
    return test


def tokens(rows=2, length=12):
    return jax.random.randint(jax.random.key(3), (rows, length), 0, BASE["vocab_size"])


@pytest.fixture(scope="session")
def gpt2():
    return random_model(CONFIGS["scaled-by-layer"])


def random_torch_model(config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(**config, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.3) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def torch_logits(model, tokens, **inputs):
    import torch

    with torch.no_grad():
        inputs = {name: torch.tensor(np.asarray(array)) for name, array in inputs.items()}
        return model(torch.tensor(np.asarray(tokens)), **inputs).logits.numpy()


@parity
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_transformers_gives_the_same_logits_here(name, tmp_path):
    model = random_torch_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    apply, params = models.load(tmp_path)
    expected = torch_logits(model, tokens())
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(apply(params, tokens()), expected, **CLOSE)


@parity
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_ours_gives_the_same_logits_there(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    apply, params = random_model(CONFIGS[name])
    models.save(tmp_path / "model", params, CONFIGS[name], max_shard_bytes=20_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(torch_logits(model.eval(), tokens()), apply(params, tokens()), **CLOSE)


@parity
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_means_there_what_it_means_here(side, tmp_path):
    model = random_torch_model(BASE)
    model.save_pretrained(tmp_path)
    apply, params = models.load(tmp_path)
    mask = np.array([[1] * 8 + [0] * 4, [1] * 12])
    mask = mask[:, ::-1].copy() if side == "left" else mask
    positions = np.maximum(mask.cumsum(1) - 1, 0)  # as their generation has them
    expected = torch_logits(model, tokens(), attention_mask=mask, position_ids=positions)
    logits = apply(params, tokens(), segment_ids=jnp.asarray(mask))
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], **CLOSE)


@parity
def test_folders_of_the_model_without_its_head_are_read(tmp_path):
    model = random_torch_model(BASE)
    model.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "wte.weight" in tensors
    causal = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.0.attn.masked_bias": np.ones((), np.float32)}
    save_file(tensors | causal, tmp_path / "model.safetensors", metadata={"format": "pt"})  # as in OpenAI's folder
    apply, params = models.load(tmp_path)
    np.testing.assert_allclose(apply(params, tokens()), torch_logits(model, tokens()), **CLOSE)


def test_cached_decoding_equals_the_full_forward(gpt2):
    apply, params = gpt2
    full = apply(params, tokens())
    assert full.dtype == jnp.float32 and full.shape == (2, 12, 61)
    logits, cache = apply(params, tokens()[:, :9], cache=models.init_cache(apply, batch=2, max_length=12))
    steps = [logits]
    for k in range(9, 12):
        logits, cache = apply(params, tokens()[:, k : k + 1], cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), full, **CLOSE)
    assert int(cache.index) == 12


def test_generation_goes_through_the_cache(gpt2):
    from jpeft.train.generation import generate

    apply, params = gpt2
    prompts = [tokens()[0, :5].tolist(), tokens()[1, :3].tolist()]
    new_cache = lambda rows, length: models.init_cache(apply, rows, length)
    new = generate(apply, params, prompts, new_cache, new_tokens=4, stops=[], context=32)
    for prompt, found in zip(prompts, new, strict=True):
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(apply(params, jnp.array([ids]))[0, -1].argmax()))
        assert found == ids[len(prompt) :]


def test_a_packed_row_equals_its_sequences_run_apart(gpt2):
    apply, params = gpt2
    a, b = tokens(1, 7), tokens(1, 9)[:, 2:]
    packed = jnp.concatenate([a, b, jnp.zeros((1, 2), a.dtype)], 1)
    logits = apply(params, packed, segment_ids=jnp.array([[1] * 7 + [2] * 7 + [0] * 2]))
    np.testing.assert_allclose(logits[:, :7], apply(params, a), **CLOSE)
    np.testing.assert_allclose(logits[:, 7:14], apply(params, b), **CLOSE)
    assert np.isfinite(logits).all()


def test_hidden_states_and_head_compose_to_the_logits(gpt2):
    apply, params = gpt2
    hidden = apply.hidden(params, tokens())
    assert hidden.shape == (2, 12, 32)
    np.testing.assert_array_equal(apply.logits_from_hidden(params, hidden), apply(params, tokens()))


def test_positions_are_learned_and_end(gpt2):
    apply, params = gpt2
    moved = apply(params, tokens(1, 4), positions=jnp.array([[1, 2, 3, 4]]))
    assert np.abs(moved - apply(params, tokens(1, 4))).max() > 1e-3
    assert np.isnan(apply(params, tokens(1, 33))[0, -1]).all() and np.isfinite(apply(params, tokens(1, 32))).all()


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_rematerialisation_changes_no_gradient(gpt2, remat):
    apply, params = gpt2
    again, _ = models.abstract(CONFIGS["scaled-by-layer"], remat=remat)
    loss = lambda apply: lambda params: apply(params, tokens(1, 5)).var()
    expected, got = (jax.jit(jax.grad(loss(f)))(params) for f in (apply, again))
    jax.tree.map(lambda e, g: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), expected, got)


def test_computing_in_bfloat16_leaves_the_parameters_and_the_logits_in_float32(gpt2):
    exact, params = gpt2
    apply, _ = models.abstract(CONFIGS["scaled-by-layer"], dtype="bfloat16")
    logits = apply(params, tokens())
    assert logits.dtype == jnp.float32 and apply.hidden(params, tokens()).dtype == jnp.bfloat16
    error = np.abs(logits - exact(params, tokens())).max() / np.abs(logits).max()
    assert 0 < error < 0.05  # bfloat16 rounds to 2^-8; three layers add a few roundings each


PUBLISHED = {"gpt2": (768, 12, 12, 124_439_808), "gpt2-xl": (1600, 48, 25, 1_557_611_200)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_are_the_published_ones(name):
    width, layers, heads, total = PUBLISHED[name]
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": heads}
    dropout = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    _, shapes = models.abstract({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | sizes | dropout)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == total


def test_round_trip_is_exact(gpt2, tmp_path):
    _, params = gpt2
    models.save(tmp_path / "model", params, CONFIGS["scaled-by-layer"])
    _, back = models.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["scale_attn_by_inverse_layer_idx"]


def test_the_sites_are_what_they_should_be(gpt2):
    apply, params = gpt2
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    dense = {site.path: (site.axes, site.head) for site in sites if site.kind == "dense"}
    assert dense == {
        "h/attn/c_attn/kernel": ("sio", False),
        "h/attn/c_proj/kernel": ("sio", False),
        "h/mlp/c_fc/kernel": ("sio", False),
        "h/mlp/c_proj/kernel": ("sio", False),
        "wte/embedding": ("oi", True),
    }
    named = lambda preset, kind="dense": sorted(path.removesuffix("/kernel") for path in select(sites, preset, (kind,)))
    assert named("attention") == ["h/attn/c_attn", "h/attn/c_proj"]
    assert named("mlp") == ["h/mlp/c_fc", "h/mlp/c_proj"]
    assert named("down") == ["h/mlp/c_proj"]
    assert named("embedding", "embedding") == ["wpe/embedding", "wte/embedding"]
    assert named("norm", "scale") == ["h/ln_1/scale", "h/ln_2/scale", "ln_f/scale"]
    assert len(named("bias", "bias")) == 7
    with pytest.raises(ValueError, match="'key-value' matches no site"):
        named("key-value")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_embd": None}, "expected n_embd, which is absent"),
        ({"n_head": 5}, "expected n_head that divides n_embd=32, got 5"),
        ({"activation_function": "mish"}, "expected activation_function to be one of .*'gelu_new'.*, got 'mish'"),
        ({"add_cross_attention": True}, "expected add_cross_attention False, got True"),
        ({"pruned_heads": {"0": [1]}}, "expected no pruned_heads"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "expected a language model .*, got .'GPT2DoubleHeadsModel'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized weights .* quant_method='gptq'"),
    ],
)
def test_what_the_model_cannot_honour_is_refused(change, message):
    with pytest.raises(ValueError, match=f"(?s)GPT-2 cannot honour this config.*{message}"):
        models.abstract(BASE | change)


def test_all_problems_of_a_config_are_reported_together():
    with pytest.raises(ValueError) as error:
        models.abstract(BASE | {"n_head": 5, "add_cross_attention": True}, remat="some")
    assert [word in str(error.value) for word in ("n_head", "add_cross_attention", "'some'")] == [True] * 3
