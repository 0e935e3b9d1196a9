"""`jpeft plan` from options to table and JSON; the chips are this machine's virtual devices."""

import json

import jax
import pytest

from jpeft.cli import main
from jpeft.parallel.topology import Slice

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
PINNED = {"fits", "hbm_per_chip_gib", "hbm_limit_gib", "breakdown_gib", "gathered_bytes_by_dtype"} | {
    "flops_per_token",
    "advice",
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(Slice, "devices", lambda self: jax.devices()[: self.size])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *map(str, arguments)])
    shown = "".join(capsys.readouterr())
    assert stop.value.code == 2
    assert "Traceback" not in shown
    return shown


def test_a_plan_that_fits(config, on_cpu, capsys, tmp_path):
    file = tmp_path / "plan.json"
    options = ("--topology", "v5e-8", "--batch", "8", "--seq", "16", "--rank", "4", "--json", str(file))
    main(["plan", "--model", str(config), *options])
    report = json.loads(file.read_text())
    assert report.keys() >= PINNED
    assert report["fits"]
    assert report["mesh"] == "fsdp=8"
    assert report["hbm_limit_gib"] == 15.75
    assert report["advice"] == []
    shown = capsys.readouterr()
    assert "It fits, with 100% of the memory to spare." in shown.out
    assert "all-gather" in shown.out
    assert "compiling for v5e-8" in shown.err


def test_a_plan_that_does_not_fit_says_what_was_tried(config, on_cpu, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Slice, "hbm_gib", property(lambda self: 1e-3))
    file = tmp_path / "plan.json"
    options = ("--topology", "v5e-4", "--batch", "8", "--seq", "2048", "--rank", "4", "--remat", "none")
    main(["plan", "--model", str(config), *options, "--json", str(file)])
    report = json.loads(file.read_text())
    assert not report["fits"]
    tried = [tuple(advice["change"].items()) for advice in report["advice"]]
    assert (("remat", "full"),) in tried
    assert (("accumulation", 2),) in tried
    assert (("mesh", "fsdp=2,tensor=2"),) in tried
    priced = {t: a["hbm_per_chip_gib"] for t, a in zip(tried, report["advice"], strict=True) if "hbm_per_chip_gib" in a}
    assert priced[("remat", "full"),] < report["hbm_per_chip_gib"]
    assert priced[("accumulation", 2),] < report["hbm_per_chip_gib"]
    assert "It does not fit" in capsys.readouterr().out


def test_the_smallest_slice_that_fits_is_found(config, on_cpu, tmp_path, monkeypatch, capsys):
    file = tmp_path / "plan.json"
    options = ("--topology", "v5e-8", "--batch", "8", "--seq", "512", "--rank", "4", "--search", "--json", str(file))
    main(["plan", "--model", str(config), *options])
    alone = json.loads(file.read_text())
    assert alone["topology"] == "v5e-1"
    monkeypatch.setattr(Slice, "hbm_gib", property(lambda self: 0.6 * alone["hbm_per_chip_gib"]))
    main(["plan", "--model", str(config), *options])
    assert json.loads(file.read_text())["topology"] == "v5e-4"
    capsys.readouterr()


def test_mistakes_are_one_screen(config, capsys):
    shown = refused(capsys, "--model", config, "--topology", "v5e-5", "--batch", 8)
    assert "NAME-CHIPS" in shown
    assert "v5p-{1,4,8" in shown
    assert "at least 1, got 0" in refused(capsys, "--model", config, "--topology", "v5e-4", "--batch", 0)
    assert "context of 4096" in refused(capsys, "--model", config, "--topology", "v5e-4", "--batch", 4, "--seq", 5000)
    shown = refused(capsys, "--model", "meta-llama/Llama-3.1-8B", "--topology", "v5e-4", "--batch", 4)
    assert "config.json" in shown


def test_a_mesh_is_checked_before_anything_compiles(config, on_cpu, capsys):
    options = ("--model", config, "--topology", "v5e-8", "--batch", 8)
    assert "which has 4; write for example 'fsdp=8'" in refused(capsys, *options, "--mesh", "fsdp=4")
    assert "tensor may be 1, 2" in refused(capsys, *options, "--mesh", "fsdp=2,tensor=4")
    assert "a batch of 16 rows" in refused(capsys, *options[:-1], 12, "--mesh", "fsdp=8")
