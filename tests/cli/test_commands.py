"""The commands on a tiny model folder, from flags to files, and every mistake of a user."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tiny_llama import CONFIG

import jpeft
from jpeft import models
from jpeft.cli import main, model
from jpeft.cli.options import build_method, parse
from jpeft.train.config import TrainConfig


def ok(*arguments):
    main([str(a) for a in arguments])


def refused(capsys, *arguments):
    """What a refused command says; exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as stop:
        ok(*arguments)
    shown = "".join(capsys.readouterr())
    assert stop.value.code == 2 and "Traceback" not in shown and len(shown.splitlines()) < 40
    return " ".join(shown.replace("│", " ").split())


TRAIN = (
    "--method",
    "lora",
    "--rank",
    2,
    "--alpha",
    4,
    "--max-steps",
    2,
    "--batch-size",
    2,
    "--samples",
    2,
    "--sample-tokens",
    3,
    "--learning-rate",
    0.05,
)


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(20)))
    ok("train", "--model", tiny, "--data", data, *TRAIN, "--targets", "q_proj", "v_proj", "--out", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_train_on_a_mesh(tiny, tmp_path, method):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(20)))
    options = (
        "--method",
        method,
        "--rank",
        2,
        "--max-steps",
        2,
        "--batch-size",
        8,
        "--samples",
        1,
        "--sample-tokens",
        2,
    )
    ok("train", "--model", tiny, "--data", data, *options, "--mesh", "data=2,fsdp=4", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert np.isfinite(summary["heldout_loss_after"])
    assert (tmp_path / "out" / "adapter").is_dir()


def test_train_writes_everything(run_folder):
    names = {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "loss.png", "samples.md", "summary.json"}
    assert {p.name for p in run_folder.iterdir()} == names
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["trainable"] == 2 * 2 * (16 + 16 + 16 + 8) < summary["total"]
    assert {"heldout_loss_before", "heldout_loss_after", "tokens_per_second"} <= summary.keys()
    samples = (run_folder / "samples.md").read_text()
    assert samples.count("**before**") == samples.count("**after**") == 2
    assert json.loads((run_folder / "adapter/method.json").read_text())["method"]["targets"] == ["q_proj", "v_proj"]
    assert (run_folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_is_kept_and_its_config_runs_again(run_folder, tmp_path, capsys):
    written = run_folder / "config.yaml"
    assert "it is finished" in refused(capsys, "train", "--config", written)
    ok("train", "--config", written, "--out", tmp_path / "again")
    for name in ("adapter/trainable.safetensors", "samples.md"):
        assert (tmp_path / "again" / name).read_bytes() == (run_folder / name).read_bytes()
    assert "rank: 2 -> 3" in refused(capsys, "train", "--config", written, "--rank", 3)


def test_generate_with_and_without_the_adapter(tiny, run_folder, capsys):
    adapter = ("--adapter", run_folder / "adapter", "--temperature", 1.0)
    for extra in ((), ("--adapter", run_folder), adapter, ("--chat",)):
        ok("generate", "--model", tiny, "--prompt", "3 + 1 =", "--max-tokens", 3, *extra)
    assert len(capsys.readouterr().out) > 4
    assert "prompt 0 has 81 tokens" in refused(capsys, "generate", "--model", tiny, "--prompt", "x" * 80)


def test_merge_writes_a_model_with_the_same_logits(tiny, run_folder, tmp_path, capsys):
    from jpeft.cli import model

    ok("merge", "--model", tiny, "--adapter", run_folder, "--out", tmp_path / "merged")
    apply, params = models.load(tiny, dtype="float32")
    _, merged = models.load(tmp_path / "merged", dtype="float32")
    import jpeft

    tokens = jnp.array([[1, 2, 3, 4]])
    wanted = jpeft.lift(apply)(model.with_adapter(apply, params, run_folder)[0], tokens)
    np.testing.assert_allclose(apply(merged, tokens), wanted, atol=1e-5)
    assert "exists; give another --out" in refused(
        capsys, "merge", "--model", tiny, "--adapter", run_folder, "--out", tmp_path / "merged"
    )
    ok("generate", "--model", tmp_path / "merged", "--prompt", "3", "--max-tokens", 2)


def test_a_folder_of_compressed_weights_is_made_trained_on_and_merged_into(
    tiny, run_folder, data_file, tmp_path, capsys
):
    data, packed = ("--data", data_file), tmp_path / "packed"
    blocks = ("--set", "NF4.block_size=8")  # of the tiny model's 16 and 24 inputs
    ok("train", "--model", tiny, *data, *TRAIN[2:], "--method", "qlora", *blocks, "--out", tmp_path / "first")
    ok("merge", "--model", tiny, "--adapter", tmp_path / "first", "--quantize", "--out", packed)
    assert "layers/mlp/up_proj/kernel       0.0" in capsys.readouterr().out
    _, params = models.load(packed)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert type(kernel).__name__ == "NormalFloat4" and kernel.double_quant and kernel.block_size == 8

    ok("train", "--model", packed, *data, *TRAIN[2:], "--method", "qlora", "--out", tmp_path / "second")
    given = ("--model", packed, "--adapter", tmp_path / "second")
    ok("generate", *given, "--prompt", "3", "--max-tokens", 2)
    ok("export", *given, "--out", tmp_path / "peft")
    ok("merge", *given, "--out", tmp_path / "dense")
    ok("merge", *given, "--quantize", "--out", tmp_path / "again")
    of = lambda name: models.load(tmp_path / name)[1]["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(of("dense"), jax.Array) and jax.tree.structure(of("again")) == jax.tree.structure(kernel)
    assert "FP4 would compress it once more" in refused(
        capsys, "train", "--model", packed, *data, *TRAIN[2:], "--method", "fp4+lora", "--out", tmp_path / "third"
    )
    assert "nothing here was; leave it out" in refused(
        capsys, "merge", "--model", tiny, "--adapter", run_folder, "--quantize", "--out", tmp_path / "no"
    )


def test_an_exported_adapter_is_read_wherever_ours_is(tiny, run_folder, tmp_path, capsys):
    ok("export", "--model", tiny, "--adapter", run_folder, "--out", tmp_path / "peft", "--base", "org/tiny")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny" and config["target_modules"] == ["q_proj", "v_proj"]
    for adapter, out in ((run_folder, "ours"), (tmp_path / "peft", "theirs")):
        ok("merge", "--model", tiny, "--adapter", adapter, "--out", tmp_path / out)
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()
    ok("generate", "--model", tiny, "--adapter", tmp_path / "peft", "--prompt", "3", "--max-tokens", 2)
    again = ("export", "--model", tiny, "--adapter", run_folder, "--out", tmp_path / "peft")
    assert "exists and is not empty" in refused(capsys, *again)
    ok(*again, "--overwrite")


def test_inspect_shows_sites_and_counts(tiny, capsys):
    ok("inspect", "--model", tiny)
    assert "layers/self_attn/q_proj/kernel" in capsys.readouterr().out
    ok("inspect", "--model", tiny, "--method", "LoRA", "--rank", 1, "--targets", "q_proj")
    assert "64" in capsys.readouterr().out
    assert "say which with --method" in refused(capsys, "inspect", "--model", tiny, "--rank", 3)


def test_chat_data_and_other_fields_of_the_method(tiny, tmp_path):
    turns = lambda i: [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]
    rows = [{"messages": turns(i)} for i in range(6)]
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    ok(
        "train",
        "--model",
        tiny,
        "--data",
        data,
        *TRAIN,
        "--set",
        "scaling=rslora",
        "--set",
        "rank_pattern={q_proj: 1}",
        "--accumulation",
        2,
        "--remat",
        "offload",
        "--offload-optimizer",
        "--out",
        tmp_path / "out",
    )
    method = json.loads((tmp_path / "out/adapter/method.json").read_text())["method"]
    assert method["scaling"] == "rslora" and method["rank_pattern"] == [["q_proj", 1]]


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--method", "lora", "--rank", 3], jpeft.LoRA(rank=3)),
        (["--method", "rs-lora", "--alpha", 4], jpeft.LoRA(alpha=4, scaling="rslora")),
        (["--method", "last", "--set", "num_layers=2"], jpeft.LastLayers(num_layers=2)),
        (
            [
                "--method",
                "qlora",
                "--rank",
                2,
                "--targets",
                "q_proj",
                "--set",
                "NF4.block_size=32",
                "double_quant=false",
            ],
            jpeft.chain(jpeft.NF4(block_size=32, double_quant=False), jpeft.LoRA(rank=2, targets="q_proj")),
        ),
        (["--method", "int8+ia3"], jpeft.chain(jpeft.Int8(), jpeft.IA3())),
    ],
)
def test_methods_by_name(arguments, wanted):
    config = parse(TrainConfig, [str(a) for a in arguments], "train")
    assert build_method(config) == wanted


ACTING = {
    "prompt": ["--set", "num_tokens=3"],
    "ptuning": ["--set", "num_tokens=3", "--set", "encoder_hidden_size=8"],
    "prefix": ["--set", "num_tokens=3", "--set", "encoder_hidden_size=8"],
    "multitask": ["--set", "num_tokens=3", "--set", "num_tasks=2"],
    "llama-adapter": ["--set", "num_tokens=3", "--set", "num_layers=1"],
    "houlsby": ["--set", "bottleneck=4"],
    "qlora": ["--rank", 2, "--set", "NF4.targets=mlp", "--set", "NF4.block_size=8"],
    "nf4+prefix": ["--set", "num_tokens=3", "--set", "NF4.targets=mlp", "--set", "NF4.block_size=8"],
}


@pytest.mark.parametrize("name", ACTING)
def test_methods_that_act_on_activations_or_quantize_train_and_generate(tiny, data_file, tmp_path, capsys, name):
    """What is trained is saved, and is what generates afterwards."""
    settings = ["--max-steps", 2, "--batch-size", 2, "--samples", 2, "--sample-tokens", 3, "--learning-rate", 0.05]
    out = tmp_path / "out"
    ok("train", "--model", tiny, "--data", data_file, "--method", name, *ACTING[name], *settings, "--out", out)
    before, after = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[::3])
    assert before["heldout_loss"] != after["heldout_loss"] and np.isfinite(after["heldout_loss"])
    capsys.readouterr()
    apply, params = models.load(tiny, dtype="float32")
    bound, method = model.with_adapter(apply, params, str(out))
    batch = {"tokens": jnp.arange(6)[None], "positions": jnp.arange(6)[None]}
    batch = jpeft.prompted(batch | ({"tasks": jnp.array([1])} if method.num_prompts > 1 else {}), method)
    logits = jpeft.lift(apply)(bound, batch["tokens"], positions=batch["positions"])
    assert np.isfinite(logits).all()
    ok("generate", "--model", tiny, "--adapter", out, "--prompt", "3 + 1 =", "--max-tokens", 3)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rnk", 3], "--rank"),
        (["--rank", "three"], "invalid literal for int"),
        (["--method", "bitfat"], "there is no method 'bitfat'; did you mean bitfit"),
        (["--method", "lo"], "there is no method 'lo'; did you mean loftq or loha or lokr"),
        (["--method", "nf4+lorra"], "there is no method 'lorra'; did you mean lora"),
        (["--method", "qlora", "--set", "scalling=rslora"], "none of the methods has a field 'scalling'; did you mean"),
        (["--method", "qlora", "--set", "NF4.scaling=1"], "none of the methods has a field 'NF4.scaling'"),
        (["--set", "scalling=rslora"], "LoRA has no field 'scalling'; did you mean scaling"),
        (["--set", "scaling"], "--set expects name=value"),
        (["--set", "rank=abc", "--set", "scaling=[3]"], "LoRA.rank expects a int"),
        (["--rank", 4, "--set", "rank=3"], "rank is given twice"),
        (["--targets", "q_prj"], "did you mean 'q_proj'"),
        (["--rank", 1000], "1000"),
        (["--batch-size", 0], "batch_size must be above 0"),
        (["--sequence-length", 65], "beyond the model's context of 64"),
        (["--sequence-length", 3], "data.jsonl:1: the prompt has"),
        (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--model", "nowhere"], "nowhere"),
        (["--config", "nowhere.yaml"], "--config expects a YAML file"),
    ],
)
def test_mistakes_in_options(tiny, data_file, tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    base = {"--model": tiny, "--data": data_file, "--max-steps": 1, "--out": out}
    given = [x for name, value in base.items() if name not in arguments for x in (name, value)]
    assert said in refused(capsys, "train", *given, *arguments)
    assert not out.exists()


def test_a_config_file_supplies_fields_and_names_unknown_ones(tiny, data_file, tmp_path, capsys):
    settings = {
        "model": str(tiny),
        "data": str(data_file),
        "max-steps": 1,
        "samples": 0,
        "packing": False,
        "rank": 2,
        "out": str(tmp_path / "out"),
        "targets": ["q_proj"],
        "set": ["scaling=rslora"],
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    ok("train", "--config", path, "--rank", 1)
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (written["rank"], written["packing"], written["set"]) == (1, False, ["scaling=rslora"])
    path.write_text("rnak: 3\nmodle: x\n")
    said = refused(capsys, "train", "--config", path)
    assert "no option 'rnak'; did you mean rank" in said and "no option 'modle'; did you mean model" in said
    path.write_text("[1")
    assert "not valid YAML" in refused(capsys, "train", "--config", path)
    path.write_text("3")
    assert "expected a mapping" in refused(capsys, "train", "--config", path)


def test_what_lies_in_the_folder_is_kept(tiny, data_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    said = refused(capsys, "train", "--model", tiny, "--data", data_file, "--out", tmp_path / "out")
    assert "is not empty" in said and (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_broken_models_and_adapters(tiny, run_folder, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "model.safetensors" in refused(capsys, "generate", "--model", broken, "--prompt", "x")
    weights.unlink()
    assert "safetensors" in refused(capsys, "generate", "--model", broken, "--prompt", "x")
    (broken / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    assert "mamba" in refused(capsys, "inspect", "--model", broken)
    other = tmp_path / "other"
    import jax

    models.save(
        other, models.init(jax.random.key(0), CONFIG | {"intermediate_size": 32})[1], CONFIG | {"intermediate_size": 32}
    )
    shutil.copy(tiny / "tokenizer.json", other)
    said = refused(capsys, "generate", "--model", other, "--adapter", run_folder, "--prompt", "x")
    assert "belongs to another model" in said
    assert "expected an adapter folder" in refused(
        capsys, "generate", "--model", tiny, "--adapter", tmp_path, "--prompt", "x"
    )


def test_commands_are_named(capsys):
    assert "did you mean train?" in refused(capsys, "trian")
    ok("--help")
    assert all(name in capsys.readouterr().out for name in ("train",))
    ok("--version")
    assert capsys.readouterr().out.strip()


def test_help_lists_every_option(capsys):
    for command in ("train", "generate", "merge", "export", "inspect"):
        with pytest.raises(SystemExit) as stop:
            ok(command, "--help")
        assert stop.value.code == 0 and "--model" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch):
    from jpeft.cli import inspect

    def bug(*_):
        return np.zeros(3).reshape(2, 2)

    monkeypatch.setattr(inspect, "parse", bug)
    with pytest.raises(ValueError, match="cannot reshape"):
        main(["inspect"])
