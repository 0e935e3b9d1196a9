"""Folders that transformers and bitsandbytes wrote, against the models that they make of them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_llama import CONFIG, data_file, write_tokenizer  # noqa: F401  a fixture

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.quant.pieces import Pieces

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # their warnings, not ours
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

IDS = np.arange(24).reshape(2, 12)
LLAMA = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
FORMATS = {  # what BitsAndBytesConfig is given; dimensions are multiples of 64, which its CPU code wants
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    "partial": {
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp", "self_attn.q_proj"],
    },
    "int8": {"load_in_8bit": True},
}


def compressed(dense, folder, options):
    """A dense folder's model, compressed and saved."""
    options = options if "load_in_8bit" in options else {"load_in_4bit": True, **options}
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k not in ("model_type", "architectures")})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "dense")
    made = {name: compressed(root / "dense", root / name, options) for name, options in FORMATS.items()}
    for folder in made.values():
        write_tokenizer(folder)
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_the_packed_tree_computes_what_transformers_model_of_the_decoded_weights_does(folders, name):
    apply, params = models.load(folders[name], dtype="float32")
    assert isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], Pieces) == (name == "partial")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).dequantize().float()
    np.testing.assert_allclose(jpeft.lift(apply)(params, IDS), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "fp4", "partial"])
def test_it_is_as_near_to_bitsandbytes_own_products_as_bfloat16_is(folders, name):
    """Its products on CPU round their operands to bfloat16."""
    apply, params = models.load(folders[name], dtype="float32")
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32))
    assert np.abs(jpeft.lift(apply)(params, IDS) - theirs).max() < 0.02 * np.abs(theirs).max()


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_written_back_to_the_byte_and_transformers_reads_it(folders, name, tmp_path):
    models.save(tmp_path / "again", models.load(folders[name])[1], folders[name])
    first, again = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(again[key].tobytes() == x.tobytes() for key, x in first.items())
    both = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folders[name], tmp_path / "again"))
    np.testing.assert_array_equal(*map(logits, both))


def test_a_conv1d_is_kept_as_a_linear_layer_is(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "dense")
    folder = compressed(tmp_path / "dense", tmp_path / "packed", FORMATS["nf4"])
    _, params = models.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize().float().state_dict()
    dense = jpeft.merge(params)
    for path, name in {"attn/c_attn": "attn.c_attn", "attn/c_proj": "attn.c_proj", "mlp/c_fc": "mlp.c_fc"}.items():
        part, kernel = path.split("/")
        ours = np.float32(dense["h"][part][kernel]["kernel"][1])
        np.testing.assert_array_equal(ours, theirs[f"transformer.h.1.{name}.weight"].numpy().reshape(ours.T.shape).T)


def test_the_commands_run_on_such_a_folder(folders, data_file, tmp_path, capsys):  # noqa: F811
    peft = pytest.importorskip("peft")
    base, run, merged, exported = folders["nf4"], *(tmp_path / n for n in ("run", "merged", "exported"))
    given = ["--model", str(base), "--adapter", str(run)]
    options = ["--method", "qlora", "--rank", "2", "--max-steps", "2", "--samples", "1", "--learning-rate", "0.1"]
    main(["train", "--model", str(base), "--data", str(data_file), *options, "--out", str(run)])
    main(["generate", *given, "--prompt", "1 + 1 =", "--max-tokens", "4"])
    main(["merge", *given, "--out", str(merged)])
    main(["merge", *given, "--out", str(tmp_path / "packed"), "--quantize"])
    main(["export", *given, "--out", str(exported)])
    assert "relative error of compressing again" in capsys.readouterr().out
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    decoded = transformers.AutoModelForCausalLM.from_pretrained(base).dequantize().float()
    before = logits(decoded)
    adapted = logits(peft.PeftModel.from_pretrained(decoded, exported))  # which changes its base too
    assert np.abs(adapted - before).max() > 0.01
    np.testing.assert_allclose(theirs, adapted, atol=0.01 * np.abs(adapted).max())  # the merged folder is bfloat16
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert said["bnb_4bit_quant_type"] == "nf4" and said["bnb_4bit_use_double_quant"]
    packed = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize().float())
    apply, params = models.load(tmp_path / "packed", dtype="float32")
    np.testing.assert_allclose(jax.jit(jpeft.lift(apply))(params, IDS), packed, atol=1e-5)
