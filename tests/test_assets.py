"""The embedded default: a complete, small model folder, and a task that never shares a module between its splits."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tokenizers

from jpeft import assets, models
from jpeft.assets import docstrings


@pytest.fixture(scope="module")
def summaries():
    return {split: assets.summaries(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))


def modules(examples):
    return {re.match(r"Signature: (\w+)\.", example["prompt"])[1] for example in examples}


def test_splits_share_no_module_and_no_completion(summaries):
    train, validation = summaries["train"], summaries["validation"]
    assert len(train) > 3000 and len(validation) > 250
    assert not modules(train) & modules(validation)
    completions = [example["completion"] for example in train + validation]
    assert len(completions) == len(set(completions))


def test_pretraining_text_holds_no_validation_module():
    headings = {
        split: set(re.findall(r"^module (\w+)", "\n".join(docstrings.documents(split)), re.MULTILINE))
        for split in ("train", "validation")
    }
    assert "json" in headings["train"] and "threading" in headings["validation"]
    assert not headings["train"] & headings["validation"]


def test_twin_modules_are_on_one_side():
    for module, twin in [("datetime", "_pydatetime"), ("io", "_pyio"), ("threading", "_threading")]:
        assert docstrings.split_of(module) == docstrings.split_of(twin)
    assert docstrings.split_of("threading") == "validation" and docstrings.split_of("json.decoder") == "train"


def test_completions_are_short_clean_sentences(summaries):
    for example in summaries["train"] + summaries["validation"]:
        assert re.fullmatch(r"Signature: [\w.]+\(.*\)\nSummary:\n", example["prompt"])
        assert re.fullmatch(r"[A-Z][ -~]{10,110}[.!?]", example["completion"])


def test_the_task_is_the_same_every_time(summaries):
    docstrings._definitions.cache_clear()
    assert assets.summaries("validation") == summaries["validation"]


def test_task_from_a_small_library(tmp_path):
    (tmp_path / "json.py").write_text(
        '"""Read."""\n'
        "class Reader:\n"
        "    def read(self, n: int = 1, *, strict=False):\n"
        '        """Read at most n\n        characters. Never more.\n\n        Longer text.\n        """\n'
        "def undocumented(): pass\n"
        'def terse(x): "terse(x) -> y"\n'
    )
    (tmp_path / "threading.py").write_text('def run(*names): "Run every thread by name"\n')
    for skipped in ("site-packages", "test"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "other.py").write_text('def other(): "Return another value."\n')
    assert assets.summaries("train", tmp_path) == [
        {
            "prompt": "Signature: json.Reader.read(n=1, *, strict=False)\nSummary:\n",
            "completion": "Read at most n characters.",
        }
    ]
    assert assets.summaries("validation", tmp_path) == [
        {"prompt": "Signature: threading.run(*names)\nSummary:\n", "completion": "Run every thread by name."}
    ]


def test_a_wrong_split_or_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="split='test'"):
        assets.summaries("test")
    with pytest.raises(FileNotFoundError, match="--data FILE.jsonl"):
        assets.summaries("train", tmp_path)


def test_the_folder_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in assets.model_path().iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 6_000_000


def test_weights_are_those_of_the_config():
    config = json.loads((assets.model_path() / "config.json").read_text())
    weights = safetensors.numpy.load_file(assets.model_path() / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    layers = {int(match[1]) for name in weights if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    assert layers == set(range(config["num_hidden_layers"])) and "lm_head.weight" not in weights
    assert {str(weight.dtype) for weight in weights.values()} == {"bfloat16"}
    assert all(np.isfinite(weight.astype(np.float32)).all() for weight in weights.values())


def test_the_model_has_learned_unseen_documentation(tokenizer):
    apply, params = models.load(assets.model_path(), param_dtype="float32")
    text = next(text for text in docstrings.documents("validation") if text.startswith("module threading\n"))
    tokens = jnp.array([tokenizer.encode(text).ids[:257]])
    losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, tokens[:, :-1]), tokens[:, 1:])
    assert losses.mean() < 5.5 < math.log(tokenizer.get_vocab_size())


def test_tokenizer_round_trip(tokenizer, summaries):
    config = json.loads((assets.model_path() / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    odd = ["  tabs\tand\r\nlines ", "naïve λ → 🦜", "def f(*, x=None):\n    return x\n"]
    for text in odd + [example["prompt"] + example["completion"] for example in summaries["validation"]]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_boundary_of_prompt_and_completion_is_a_token_boundary(tokenizer, summaries):
    for example in summaries["validation"]:
        prompt, completion = (tokenizer.encode(example[field]).ids for field in ("prompt", "completion"))
        assert tokenizer.encode(example["prompt"] + example["completion"]).ids == prompt + completion


def test_chat_template_marks_the_assistant():
    settings = json.loads((assets.model_path() / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == settings["pad_token"] == "<|endoftext|>" and settings["bos_token"] is None
    assert "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}" in settings["chat_template"]
