"""The commands on models that are no Llamas."""

import jax
import pytest
from safetensors.numpy import load_file
from tiny_llama import write_tokenizer

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.train import adapter

GPT2 = {"model_type": "gpt2", "vocab_size": 258, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"architectures": ["GPT2LMHeadModel"], "eos_token_id": 256, "bos_token_id": 257}
T5 = {"model_type": "t5", "vocab_size": 258, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"architectures": ["T5ForConditionalGeneration"], "eos_token_id": 256, "pad_token_id": 0}
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


def test_an_encoder_decoder_is_inspected_exported_and_merged(tmp_path, capsys):
    base = write_model(tmp_path / "t5", T5)
    run("inspect", "--model", base, "--method", "lora", "--rank", 2, "--targets", "attention")
    assert "decoder/block/layer/1/EncDecAttention/q/kernel" in capsys.readouterr().out
    apply, params = models.load(base, dtype="float32")
    sites = jpeft.find_sites(apply, params, *apply.inputs())
    method = jpeft.LoRA(rank=2, targets="attention")
    trainable, frozen = method.init(jax.random.key(0), params, sites)
    mark = adapter.fingerprint(params)
    adapter.save_adapter(tmp_path / "run", method, trainable, frozen, base="", base_fingerprint=mark, seed=0)
    run("export", "--model", base, "--adapter", tmp_path / "run", "--out", tmp_path / "exported")
    keys = set(load_file(tmp_path / "exported" / "adapter_model.safetensors"))
    assert "base_model.model.decoder.block.1.layer.1.EncDecAttention.q.lora_A.weight" in keys and len(keys) == 48
    run("merge", "--model", base, "--adapter", tmp_path / "run", "--out", tmp_path / "merged")
    assert models.abstract(tmp_path / "merged", dtype="float32")[0] == apply
