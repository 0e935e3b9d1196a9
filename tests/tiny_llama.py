"""A tiny Llama folder with a byte-level tokenizer, and tiny data."""

import json

import jax
import pytest

from jpeft import models

CONFIG = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "bos_token_id": 257,
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": True,
}


def write_tokenizer(folder, bos=True, chat_template=None):
    """One token per byte, `<eos>` 256 and `<bos>` 257; the latter in front of every text where `bos` is true."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<bos>", special=True)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "bos_token": "<bos>"}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny random Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    _, params = models.init(jax.random.key(0), CONFIG)
    models.save(folder, params, CONFIG)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def data_file(tmp_path):
    """Twenty prompt-completion records."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
