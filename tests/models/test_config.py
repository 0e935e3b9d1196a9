"""Configs: published sizes to the integer, and refusal of what the decoder would not honour."""

import json
import math

import jax
import pytest
from tiny_decoders import BASE, FAMILIES

from jpeft import models

PUBLISHED = {  # hidden, layers, heads, kv heads, head_dim, feed-forward, vocabulary, options, parameters
    "Llama-2-7B": ("llama", 4096, 32, 32, 32, 128, 11008, 32000, {}, 6_738_415_616),
    "Llama-2-13B": ("llama", 5120, 40, 40, 40, 128, 13824, 32000, {}, 13_015_864_320),
    "Llama-33B": ("llama", 6656, 60, 52, 52, 128, 17920, 32000, {}, 32_528_943_616),
    "Llama-65B": ("llama", 8192, 80, 64, 64, 128, 22016, 32000, {}, 65_285_660_672),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, {}, 8_030_261_248),
    "Llama-3.1-70B": ("llama", 8192, 80, 64, 8, 128, 28672, 128256, {}, 70_553_706_496),
    "Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, {"tie_word_embeddings": True}, 1_235_814_400),
    "Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, {"tie_word_embeddings": True}, 3_212_749_824),
    "Mistral-7B": ("mistral", 4096, 32, 32, 8, 128, 14336, 32000, {}, 7_241_732_096),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, {}, 8_190_735_360),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_are_the_published_ones(name):
    family, *sizes, feed_forward, vocabulary, options, total = PUBLISHED[name]
    config = dict(zip(SIZES, sizes, strict=True), model_type=family, intermediate_size=feed_forward)
    apply, shapes = models.abstract(config | options | {"vocab_size": vocabulary, "torch_dtype": "bfloat16"})
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == total
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    assert jax.eval_shape(apply, shapes, tokens).shape == (1, 8, vocabulary)


def test_a_config_may_come_as_dictionary_file_or_folder(tmp_path):
    config = FAMILIES["qwen3"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.abstract(tmp_path) == models.abstract(str(tmp_path / "config.json")) == models.abstract(config)


def test_old_and_new_spellings_of_rope_are_one():
    old = BASE | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    new = BASE | {"model_type": "llama", "rope_parameters": rope}
    assert models.abstract(old)[0] == models.abstract(new)[0]


def test_windows_follow_the_family():
    windows = lambda **config: models.abstract(BASE | {"num_key_value_heads": 2} | config)[0].config.windows
    assert windows(model_type="mistral") == (4096,) * 3
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 3
    assert windows(model_type="qwen2", sliding_window=8, max_window_layers=1) == (None,) * 3
    assert windows(model_type="qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1) == (None, 8, 8)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(model_type="qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds) == (8, None, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "quen3"}, "model_type to be one of .*, got 'quen3'; did you mean 'qwen3'"),
        ({"model_type": "gpt_neox"}, "expected model_type to be one of .*'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"hidden_size": None}, "expected hidden_size, which is absent"),
        ({"num_key_value_heads": 3}, "expected num_key_value_heads that divides num_attention_heads=4, got 3"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu', got 'gelu'"),
        ({"attention_dropout": 0.1}, "expected attention_dropout 0.0, got 0.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized weights .* quant_method='gptq'"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types only with model_type qwen2 or qwen3"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, r"got \['chunked_attention'\]"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "expected 3 layer_types, got 1"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected a causal language model"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type of 'default', 'linear' or 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, r"\['low_freq_factor', .* in a rope of type"),
        ({"partial_rotary_factor": 0.5}, "expected partial_rotary_factor 1.0, got 0.5"),
    ],
)
def test_what_the_decoder_cannot_honour_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(BASE | {"model_type": "llama"} | change)


def test_all_problems_of_a_config_are_reported_together():
    config = BASE | {"model_type": "llama", "hidden_act": "gelu", "attention_dropout": 0.1}
    with pytest.raises(ValueError) as error:
        models.abstract(config, remat="some")
    assert [word in str(error.value) for word in ("hidden_act", "attention_dropout", "'some'")] == [True] * 3


def test_config_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*config.json"):
        models.abstract(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON in .*config.json"):
        models.abstract(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object in .*, got list"):
        models.abstract(tmp_path)


def test_labels_are_refused_where_there_is_no_head_for_them():
    with pytest.raises(ValueError, match="expected num_labels=None for 'qwen3', which has no head for labels here"):
        models.abstract(FAMILIES["qwen3"], num_labels=2)
