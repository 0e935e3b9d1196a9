"""P-tuning v2 on a classifier against HF PEFT's prefix tuning, its published counts, and what is exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BERT, KEY, assert_the_cache_changes_nothing, bound_to, close, count
from small_models import make_model
from tiny_decoders import random_model

import jpeft
from jpeft import models

CLASSIFIER = {
    "model_type": "bert",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_classifier_gives_what_peft_s_gives(tmp_path):
    """Padded rows, attention in both directions, positions behind the prefix."""
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    apply, params = random_model(CLASSIFIER)
    models.save(tmp_path / "model", params, CLASSIFIER)
    bert = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation="eager")
    theirs = peft.get_peft_model(bert, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)).eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 7))
    mask = np.array([[1] * 7, [1] * 5 + [0] * 2])
    sites = jpeft.find_sites(apply, params, tokens)
    method = jpeft.PTuningV2(num_tokens=4)
    trainable, frozen = bound_to(method, params, sites)
    flat = lambda tree: np.concatenate(
        [np.asarray(x).transpose(1, 0, 2, 3).reshape(4, 3, -1) for x in jax.tree.leaves(tree)], -1
    ).reshape(4, -1)
    prompt = theirs.prompt_encoder["default"].embedding.weight
    prompt.data = torch.from_numpy(flat(trainable))
    batch = jpeft.prompted({"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}, method)
    options = {"segment_ids": batch["mask"], "positions": batch["positions"]}
    run = lambda t: jpeft.lift(apply)(method.bind(t, frozen), batch["tokens"], **options)
    loss = lambda t: (jnp.sin(out := run(t)).sum(), out)
    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    # The encoder is called as PEFT calls it: transformers 5.24 renamed the argument that PEFT 0.21 looks for.
    behind = torch.cat([torch.ones(2, 4, dtype=torch.long), torch.from_numpy(mask)], 1)
    past = theirs.get_prompt(2)
    encoded = bert.bert(input_ids=torch.from_numpy(tokens), attention_mask=behind, past_key_values=past)
    expected = bert.classifier(encoded.pooler_output)
    torch.sin(expected).sum().backward()
    close(logits, expected.detach().numpy(), 1e-5)
    close(flat(grads), prompt.grad.numpy(), 1e-5)


def test_generation_with_a_cache_is_generation_without():
    assert_the_cache_changes_nothing(jpeft.PTuningV2(num_tokens=4), size=1.0)


def test_defaults_are_the_authors():
    model = make_model("nnx")
    halves = jpeft.PTuningV2(num_tokens=4).init(KEY, model.params, model.sites)
    prefix = halves[0]["layers"]["attention"]["query"]["kernel"]
    assert prefix.keys.shape == prefix.values.shape == (3, 4, 2, 12)
    run = lambda key: jpeft.lift(model.apply)(jpeft.PTuningV2().bind(*halves, key), *model.inputs)
    assert not np.allclose(run(jax.random.key(1)), run(None), atol=1e-3), "dropout is on while it trains"


@pytest.mark.parametrize("reparametrize", [False, True])
def test_other_libraries_know_it_as_prefix_tuning(reparametrize):
    model = make_model("nnx")
    method = jpeft.PTuningV2(num_tokens=3, reparametrize=reparametrize, encoder_hidden_size=5, dropout=0.0)
    trainable, frozen = bound_to(method, model.params, model.sites)
    plain, exported = method.exported(trainable, frozen)
    assert plain == jpeft.PrefixTuning(num_tokens=3, reparametrize=False, encoder_hidden_size=5)
    _, rest = plain.init(KEY, model.params, model.sites)
    run = lambda m, t, f: jpeft.lift(model.apply)(m.bind(t, f), *model.inputs)
    np.testing.assert_allclose(run(plain, exported, rest), run(method, trainable, frozen), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "config", "labels", "expected"),
    [
        ({"num_tokens": 5, "reparametrize": True, "modules_to_save": ("classifier",)}, {}, 9, 9_860_105),
        ({"num_tokens": 20, "modules_to_save": ("classifier",)}, {"vocab_size": 28996}, 2, 370_178),
        ({}, {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, None, 983_040),
    ],
    ids=["BERT-base, authors", "BERT-base, PEFT", "BERT-large"],
)
def test_counts_on_public_models_equal_the_published_integers(options, config, labels, expected):
    assert count(jpeft.PTuningV2(**options), BERT | config, num_labels=labels) == expected


def test_options_are_checked_where_they_are_written():
    with pytest.raises(ValueError, match="0 <= dropout < 1, got dropout=1.5"):
        jpeft.PTuningV2(dropout=1.5)
