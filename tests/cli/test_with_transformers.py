"""The main job on a folder that transformers wrote: trained, merged, and read back by transformers."""

import json

import numpy as np
import pytest
from tiny_llama import CONFIG, write_tokenizer

from jpeft import models
from jpeft.cli import main


@pytest.mark.parity
def test_train_and_merge_give_transformers_the_same_logits(tmp_path, data_file):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base, out, merged = (tmp_path / name for name in ("base", "out", "merged"))
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")})
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    write_tokenizer(base)
    main(
        [
            "train",
            "--model",
            str(base),
            "--data",
            str(data_file),
            "--max-steps",
            "2",
            "--rank",
            "2",
            "--samples",
            "0",
            "--learning-rate",
            "0.1",
            "--out",
            str(out),
        ]
    )
    main(["merge", "--model", str(base), "--adapter", str(out), "--out", str(merged)])
    tokens = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        read = transformers.LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32)
        theirs = read(torch.tensor(tokens)).logits.numpy()
        before = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)(torch.tensor(tokens)).logits
    apply, params = models.load(merged, dtype="float32")
    np.testing.assert_allclose(apply(params, tokens), theirs, atol=1e-4)
    assert np.abs(theirs - before.numpy()).max() > 1e-3
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
