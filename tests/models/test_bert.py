"""BERT, RoBERTa and XLM-R: `transformers`' hidden states and logits, heads old and new, published sizes, sites."""

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

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
BERT = SIZES | {"model_type": "bert"}
ROBERTA = SIZES | {"model_type": "roberta", "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
LABELS = {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
CONFIGS = {
    "bert": BERT,
    "bert-relu": BERT | {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 3},
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA | {"model_type": "xlm-roberta", "pad_token_id": 4, "hidden_act": "gelu_new"},
}
CLOSE = dict(rtol=0, atol=2e-5)


def of(config, kind, **more):
    """The config of a Hugging Face class of this kind."""
    return config | {"architectures": [CLASSES[config["model_type"]] + kind]} | more


def parity(test):
    return pytest.mark.parity(pytest.mark.filterwarnings("ignore")(test))  # their warnings, not ours


def tokens(rows=3, length=12):
    return jax.random.randint(jax.random.key(3), (rows, length), 0, SIZES["vocab_size"])


@pytest.fixture(scope="session", params=["bert", "roberta"])
def classifier(request):
    """`(apply, params)` with a head for three labels."""
    return random_model(of(CONFIGS[request.param], "ForSequenceClassification", **LABELS))


def torch_class(config):
    return getattr(pytest.importorskip("transformers"), config["architectures"][0])


def random_torch_model(config, folder):
    """A model of the class that the config names, saved."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    cls = torch_class(config)
    their_config = cls.config_class(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")})
    their_config._attn_implementation = "eager"
    model = cls(their_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.3) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    return model


def torch_results(model, tokens, **inputs):
    import torch

    with torch.no_grad():
        inputs = {name: torch.tensor(np.asarray(array)) for name, array in inputs.items() if array is not None}
        return model(torch.tensor(np.asarray(tokens)), **inputs)


@parity
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_pooled_vectors_are_those_of_transformers(name, tmp_path):
    model = random_torch_model(of(CONFIGS[name], "Model"), tmp_path)
    apply, params = models.load(tmp_path)
    expected = torch_results(model, tokens())
    hidden = apply(params, tokens())
    assert np.abs(hidden).max() > 0.5
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), **CLOSE)
    np.testing.assert_allclose(apply.pooled(params, hidden), expected.pooler_output.numpy(), **CLOSE)


@parity
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_masks_positions_and_token_types_are_those_of_transformers(name, mask, tmp_path):
    model = random_torch_model(of(CONFIGS[name], "Model"), tmp_path)
    apply, params = models.load(tmp_path)
    masks = {
        "right": [[1] * 12, [1] * 7 + [0] * 5, [1] * 2 + [0] * 10],
        "left": [[1] * 12, [0] * 5 + [1] * 7, [0] * 10 + [1] * 2],
        "holes": [[0, 1] * 6, [1, 1, 0] * 4, [1] + [0] * 10 + [1]],
    }
    mask = np.array(masks[mask])
    padding = CONFIGS[name].get("pad_token_id", 0)
    padded = jnp.where(mask == 1, tokens(), padding)
    types = np.arange(36).reshape(3, 12) % CONFIGS[name].get("type_vocab_size", 2)
    for ids in (padded, tokens()):  # what is masked is padding, or is not
        expected = torch_results(model, ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        got = apply(params, ids, jnp.asarray(types), segment_ids=jnp.asarray(mask))
        np.testing.assert_allclose(got, expected.numpy(), **CLOSE)
    positions = np.arange(36).reshape(3, 12) % 7
    expected = torch_results(model, tokens(), position_ids=positions).last_hidden_state
    np.testing.assert_allclose(apply(params, tokens(), positions=jnp.asarray(positions)), expected, **CLOSE)


@parity
@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_of_transformers_gives_the_same_logits_here(name, tmp_path):
    model = random_torch_model(of(CONFIGS[name], "ForSequenceClassification", **LABELS), tmp_path)
    apply, params = models.load(tmp_path)
    mask = np.array([[1] * 12, [1] * 7 + [0] * 5, [1] * 2 + [0] * 10])
    expected = torch_results(model, tokens(), attention_mask=mask).logits.numpy()
    logits = apply(params, tokens(), segment_ids=jnp.asarray(mask))
    assert logits.shape == (3, 3) and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, **CLOSE)


@parity
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_ours_gives_the_same_results_there(name, kind, tmp_path):
    config = of(CONFIGS[name], kind)
    cls = torch_class(config)
    apply, params = random_model(config)
    models.save(tmp_path / "model", params, config, max_shard_bytes=20_000)
    model, report = cls.from_pretrained(tmp_path / "model", output_loading_info=True, attn_implementation="eager")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = torch_results(model.eval(), tokens())
    theirs = theirs.last_hidden_state if kind == "Model" else theirs.logits
    np.testing.assert_allclose(theirs.numpy(), apply(params, tokens()), **CLOSE)


@parity
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_heads_for_masked_words_are_not_read(name, tmp_path):
    model = random_torch_model(of(CONFIGS[name], "ForMaskedLM"), tmp_path)
    apply, params = models.load(tmp_path)
    assert set(params) == {"embeddings", "encoder"}
    expected = torch_results(model.base_model, tokens()).last_hidden_state
    np.testing.assert_allclose(apply(params, tokens()), expected.numpy(), **CLOSE)
    with pytest.raises(ValueError, match="expected a model with a pooler"):
        apply.pooled(params, apply(params, tokens()))


@parity
def test_the_names_of_older_folders_are_read(tmp_path):
    model = random_torch_model(of(BERT, "ForPreTraining"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    tensors = {old(name): array for name, array in tensors.items()}
    tensors["bert.embeddings.position_ids"] = np.arange(24)[None]
    assert "bert.encoder.layer.2.output.LayerNorm.gamma" in tensors and any(name.startswith("cls.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    apply, params = models.load(tmp_path)
    expected = torch_results(model.bert, tokens())
    np.testing.assert_allclose(apply(params, tokens()), expected.last_hidden_state.numpy(), **CLOSE)
    np.testing.assert_allclose(apply.pooled(params, apply(params, tokens())), expected.pooler_output.numpy(), **CLOSE)


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_new_head_is_drawn_on_a_folder_without_one(name, kind, tmp_path):
    config = of(CONFIGS[name], kind)
    base, params = random_model(config)
    models.save(tmp_path / "base", params, config)
    with pytest.raises(ValueError, match="no head for these labels: pass key="):
        models.load(tmp_path / "base", num_labels=3)
    apply, ours = models.load(tmp_path / "base", num_labels=3, key=jax.random.key(1))
    for part in ("embeddings", "encoder"):
        jax.tree.map(np.testing.assert_array_equal, ours[part], params[part])
    if name == "bert" and kind == "Model":
        jax.tree.map(np.testing.assert_array_equal, ours["pooler"], params["pooler"])
    np.testing.assert_array_equal(apply.hidden(ours, tokens()), base(params, tokens()))
    assert apply(ours, tokens()).shape == (3, 3)
    kernel = ours["classifier"]["kernel"] if name == "bert" else ours["classifier"]["out_proj"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.3)
    _, again = models.load(tmp_path / "base", num_labels=3, key=jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_a_new_head_goes_where_and_as_the_rest_goes(tmp_path):
    config = of(BERT, "Model")
    models.save(tmp_path / "base", random_model(config)[1], config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    apply, shapes = models.abstract(tmp_path / "base", num_labels=3, param_dtype="bfloat16")
    for shardings in (everywhere, jax.tree.map(lambda _: everywhere, shapes)):
        options = dict(num_labels=3, key=jax.random.key(1), param_dtype="bfloat16", shardings=shardings)
        _, params = models.load(tmp_path / "base", **options)
        assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {everywhere}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_is_read_for_as_many_labels_and_replaced_for_others(name, tmp_path):
    config = of(CONFIGS[name], "ForSequenceClassification", **LABELS)
    _, params = random_model(config)
    models.save(tmp_path / "three", params, config)
    _, same = models.load(tmp_path / "three", num_labels=3)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    apply, other = models.load(tmp_path / "three", num_labels=5, key=jax.random.key(1))
    assert apply(other, tokens()).shape == (3, 5)
    models.save(tmp_path / "five", other, tmp_path / "three", num_labels=5)
    _, back = models.load(tmp_path / "five")
    jax.tree.map(np.testing.assert_array_equal, back, other)
    written = [json.loads((tmp_path / n / "config.json").read_text())["id2label"] for n in ("three", "five")]
    assert written == [LABELS["id2label"], {str(k): f"LABEL_{k}" for k in range(5)}]


def test_a_packed_row_equals_its_sequences_run_apart(classifier):
    apply, params = classifier
    a, b = tokens(1, 7) % 50 + 5, tokens(1, 9)[:, 2:] % 50 + 5
    packed = jnp.concatenate([a, jnp.ones((1, 1), a.dtype), b, jnp.ones((1, 2), a.dtype)], 1)
    segments = jnp.array([[1] * 7 + [0] + [2] * 7 + [0] * 2])
    hidden = apply.hidden(params, packed, segment_ids=segments)
    np.testing.assert_allclose(hidden[:, :7], apply.hidden(params, a), **CLOSE)
    np.testing.assert_allclose(hidden[:, 8:15], apply.hidden(params, b), **CLOSE)
    assert np.isfinite(hidden).all()


def test_positions_end(classifier):
    apply, params = classifier
    first = 0 if apply.config.padding_position is None else 2  # RoBERTa's tables hold positions of padding before it
    longest = jnp.full((1, 24 - first), 5)
    assert np.isfinite(apply(params, longest)).all()
    assert np.isnan(apply.hidden(params, jnp.full((1, 25 - first), 5))).any()


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_rematerialisation_changes_no_gradient(classifier, remat):
    apply, params = classifier
    config = of(CONFIGS[apply.config.model_type], "ForSequenceClassification", **LABELS)
    again, _ = models.abstract(config, remat=remat)
    loss = lambda apply: lambda params: apply(params, tokens(2, 5)).var()
    expected, got = (jax.jit(jax.grad(loss(f)))(params) for f in (apply, again))
    jax.tree.map(lambda e, g: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), expected, got)
    assert "remat" in str(jax.make_jaxpr(lambda p: again(p, tokens(1, 5)))(params))


def test_computing_in_bfloat16_leaves_the_parameters_and_the_logits_in_float32(classifier):
    exact, params = classifier
    config = of(CONFIGS[exact.config.model_type], "ForSequenceClassification", **LABELS)
    apply, _ = models.abstract(config, dtype="bfloat16")
    logits = apply(params, tokens())
    assert logits.dtype == jnp.float32 and apply.hidden(params, tokens()).dtype == jnp.bfloat16
    error = np.abs(logits - exact(params, tokens())).max() / np.abs(logits).max()
    assert 0 < error < 0.1  # bfloat16 rounds to 2^-8; three layers and a head add a few roundings each


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA_SIZES = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
PUBLISHED = {
    "bert-base-uncased": (BASE | {"model_type": "bert", "vocab_size": 30522}, 109_482_240),
    "bert-large-uncased": (LARGE | {"model_type": "bert", "vocab_size": 30522}, 335_141_888),
    "roberta-base": (BASE | ROBERTA_SIZES, 124_645_632),
    "roberta-large": (LARGE | ROBERTA_SIZES, 355_359_744),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_are_the_published_ones(name):
    config, total = PUBLISHED[name]
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    count = lambda shapes: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    _, shapes = models.abstract(config | dropout)
    assert count(shapes) == total
    width = config["hidden_size"]
    _, shapes = models.abstract(config | dropout, num_labels=2)
    head = 2 * width + 2  # RoBERTa's has a layer of its own, as large as the pooler that it stands for
    assert count(shapes) == total + head


def test_the_sites_are_what_they_should_be(classifier):
    apply, params = classifier
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    layer = "encoder/layer/"
    linear = ["attention/self/query", "attention/self/key", "attention/self/value", "attention/output/dense"]
    linear += ["intermediate/dense", "output/dense"]
    dense = {site.path.removesuffix("/kernel"): site.axes for site in sites if site.kind == "dense"}
    assert not any(site.head for site in sites)
    heads = {name for name in dense if not name.startswith(layer)}
    assert heads == (
        {"pooler/dense", "classifier"} if apply.config.pools else {"classifier/dense", "classifier/out_proj"}
    )
    assert dense == {layer + name: "sio" for name in linear} | {name: "io" for name in heads}

    def named(preset, kind="dense"):
        return {p.removeprefix(layer).removesuffix("/kernel") for p in select(sites, preset, (kind,))}

    assert named("attention") == set(linear[:4])
    assert named("mlp") == set(linear[4:])
    assert named("key-value") == {"attention/self/key", "attention/self/value"}
    assert named("down") == {"output/dense"}
    assert named("all-linear") == set(linear) | heads
    assert len(named("embedding", "embedding")) == 3 and len(named("norm", "scale")) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"intermediate_size": None}, "expected intermediate_size, which is absent"),
        ({"num_attention_heads": 5}, "expected num_attention_heads that divides hidden_size=32, got 5"),
        ({"hidden_act": "mish"}, "expected hidden_act to be one of .*'gelu'.*, got 'mish'"),
        (
            {"position_embedding_type": "relative_key"},
            "expected position_embedding_type 'absolute', got 'relative_key'",
        ),
        ({"is_decoder": True}, "expected is_decoder False, got True"),
        ({"add_cross_attention": True}, "expected add_cross_attention False, got True"),
        ({"pruned_heads": {"0": [1]}}, "expected no pruned_heads"),
        ({"architectures": ["BertForTokenClassification"]}, "architectures to be one of .*'BertForMaskedLM'"),
        ({"architectures": ["RobertaModel"]}, r"architectures to be one of .*, got \['RobertaModel'\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized weights .* quant_method='gptq'"),
    ],
)
@pytest.mark.parametrize("num_labels", [None, 2])
def test_what_the_model_cannot_honour_is_refused(change, message, num_labels):
    with pytest.raises(ValueError, match=f"(?s)the encoder cannot honour this config.*{message}"):
        models.abstract(BERT | change, num_labels=num_labels)


def test_inputs_and_uses_that_do_not_fit_are_refused(classifier):
    apply, params = classifier
    with pytest.raises(ValueError, match=r"expected token_type_ids of the tokens' shape \(3, 12\), got \(1, 12\)"):
        apply(params, tokens(), jnp.ones((1, 12), int))
    with pytest.raises(ValueError, match="expected a model that generates, got '.*bert.*', which keeps no cache"):
        models.init_cache(apply, batch=1, max_length=4)
    with pytest.raises(ValueError, match="expected at least one label, got num_labels=0"):
        models.abstract(BERT, num_labels=0)
