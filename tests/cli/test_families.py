"""The commands on models that are no Llamas."""

import jax
import pytest
from safetensors.numpy import load_file
from tiny_llama import write_tokenizer

from jpeft import models
from jpeft.cli import main

GPT2 = {"model_type": "gpt2", "vocab_size": 258, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"architectures": ["GPT2LMHeadModel"], "eos_token_id": 256, "bos_token_id": 257}
BERT = {"model_type": "bert", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "architectures": ["BertModel"]}


def write_model(folder, config):
    models.save(folder, models.init(jax.random.key(0), config)[1], config)
    write_tokenizer(folder)
    return folder


def run(*arguments):
    main([str(a) for a in arguments])


def test_a_gpt2_goes_through_the_commands(data_file, tmp_path, capsys):
    base, out = write_model(tmp_path / "gpt2", GPT2), tmp_path / "run"
    options = ("--max-steps", 1, "--batch-size", 2, "--samples", 0, "--targets", "c_attn", "mlp")
    run("train", "--model", base, "--data", data_file, "--out", out, "--method", "lora", "--rank", 2, *options)
    run("generate", "--model", base, "--adapter", out, "--prompt", "1 + 1 =", "--max-tokens", 3)
    run("export", "--model", base, "--adapter", out, "--out", tmp_path / "exported")
    modules = ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
    assert set(load_file(tmp_path / "exported" / "adapter_model.safetensors")) == {
        f"base_model.model.transformer.h.{k}.{module}.lora_{half}.weight"
        for k in range(2)
        for module in modules
        for half in "AB"
    }
    run("merge", "--model", base, "--adapter", out, "--out", tmp_path / "merged")
    merged, _ = models.load(tmp_path / "merged", dtype="float32")
    assert merged == models.abstract(base, dtype="float32")[0]


@pytest.mark.parametrize("command", ["train", "generate"])
def test_an_encoder_is_inspected_and_does_not_write(command, data_file, tmp_path, capsys):
    base = write_model(tmp_path / "bert", BERT)
    run("inspect", "--model", base, "--method", "lora", "--rank", 2, "--targets", "attention")
    assert "encoder/layer/attention/self/query/kernel" in capsys.readouterr().out
    options = {"train": ("--data", data_file, "--out", tmp_path / "run"), "generate": ("--prompt", "1 + 1 =")}
    with pytest.raises(SystemExit):
        run(command, "--model", base, *options[command])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "expected a decoder-only language model in" in shown and "got 'bert'" in shown
    assert not (tmp_path / "run").exists()
