"""QLoRA on CPU: the step against HF PEFT on bitsandbytes, and what compressing costs in held-out loss.

    python scripts/bench/qlora.py step               # one Llama folder in NF4, both libraries on it, steps in turn
    python scripts/bench/qlora.py accuracy           # `jpeft train` on the embedded task, LoRA and QLoRA, three seeds

`step` needs the extra `parity`. Expected numbers: docs/quantization.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin else, and take each other's core

import jax
import jax.numpy as jnp
import numpy as np
from lora import BATCH, CONFIG, LENGTH, VOCABULARY, cross_entropy, paired, sgd_step, show

import jpeft

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def row_step(options):
    """The same folder, which transformers and bitsandbytes wrote: fp32, NF4 with double quantization, LoRA r=16."""
    import peft
    import torch
    import transformers

    from jpeft import models

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH))
    keep = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")}
    four = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = (Path(folder) / name for name in ("dense", "packed"))
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**keep)).save_pretrained(dense)
        load = transformers.LlamaForCausalLM.from_pretrained
        torch_model = load(dense, quantization_config=four, dtype=torch.float32)
        torch_model.save_pretrained(packed)
        apply, params = models.load(packed, dtype="float32")
    torch_model = peft.get_peft_model(torch_model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS))
    optimizer = torch.optim.SGD([p for p in torch_model.parameters() if p.requires_grad], lr=1e-3)
    torch_model.train()
    ids = torch.tensor(tokens)

    def theirs():
        optimizer.zero_grad()
        loss = torch_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    x = jnp.asarray(tokens)
    method = jpeft.LoRA(rank=16, alpha=16)
    trainable, frozen = method.init(jax.random.key(0), params, jpeft.find_sites(apply, params, x))
    loss = lambda t, f, x: cross_entropy(jpeft.lift(apply)(method.bind(t, f), x), x)
    step = jax.jit(sgd_step(loss))
    first = float(step(trainable, frozen, x)[1]), theirs()
    assert abs(first[0] / first[1] - 1) < 1e-3, f"the two start at other losses: {first}"
    ours = lambda: jax.block_until_ready(step(trainable, frozen, x))
    a, b, ratio = paired(ours, theirs, rounds=options.rounds)
    show("QLoRA step against HF PEFT + bitsandbytes, CPU, width 512", ratio, 0.7, f"{a * 1e3:.0f} / {b * 1e3:.0f} ms")


def row_accuracy(options):
    """Held-out loss after `jpeft train` on the embedded model and task, all else equal."""
    ratios = []
    for seed in options.seeds:
        found = {}
        for method in ("lora", "qlora"):
            with tempfile.TemporaryDirectory() as folder:
                command = ["train", "--method", method, "--seed", str(seed), "--samples", "0", "--out", f"{folder}/run"]
                subprocess.run([sys.executable, "-m", "jpeft", *command], check=True, stdout=subprocess.DEVNULL)
                found[method] = json.loads(Path(folder, "run", "summary.json").read_text())
        after = {method: run["heldout_loss_after"] for method, run in found.items()}
        ratios.append(after["qlora"] / after["lora"])
        before = found["lora"]["heldout_loss_before"]
        print(
            f"seed {seed}: held-out loss {before:.4f} -> LoRA {after['lora']:.4f}, QLoRA {after['qlora']:.4f}",
            flush=True,
        )
    note = ", ".join(f"{r:.4f}" for r in ratios)
    show("held-out loss after training, QLoRA / LoRA, embedded model", statistics.median(ratios), 1.01, note)


ROWS = {n.removeprefix("row_"): fn for n, fn in list(globals().items()) if n.startswith("row_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for name in options.figures or ROWS:
        ROWS[name](options)
