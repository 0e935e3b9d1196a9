"""QLoRA: the step against HF PEFT on bitsandbytes, on CPU and GPU, and what compressing costs in held-out loss.

    python scripts/bench/qlora.py step               # one Llama folder in NF4, both libraries on it, steps in turn
    python scripts/bench/qlora.py accuracy           # `jpeft train` on the embedded task, LoRA and QLoRA, three seeds
    python scripts/bench/qlora.py tokens --shapes 1B 8B   # on a GPU: tokens a second and memory, both libraries

`step` and `tokens` need the extra `parity`, `tokens` JAX, torch and bitsandbytes for the GPU. Expected numbers:
docs/quantization.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


SHAPES = {  # layers, width, feed-forward, heads, key heads, vocabulary: as Llama 3.2 and 3.1
    "1B": (16, 2048, 8192, 32, 8, 128256),
    "8B": (32, 4096, 14336, 32, 8, 128256),
    "tiny": (2, 128, 256, 4, 2, 512),  # to try the command without a GPU
}


def shape_config(name: str) -> dict:
    layers, width, feed_forward, heads, kv_heads, vocabulary = SHAPES[name]
    return dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def row_tokens(options):
    """Training steps of random models in NF4, bfloat16, LoRA r=16 on all linear layers, AdamW, layers recomputed."""
    for shape in options.shapes:
        found = {}
        for side in ("jpeft", "peft"):  # each in a process of its own, for all of the memory
            command = [sys.executable, __file__, f"_{side}", "--shapes", shape, "--rows", str(options.rows)]
            command += ["--length", str(options.length), "--rounds", str(options.rounds)]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side] = json.loads(ran.stdout.splitlines()[-1])
            print(f"{shape} {side}: {found[side]}", flush=True)
        ours, theirs = found["jpeft"], found["peft"]
        where = f"{shape}, {options.rows} rows of {options.length}, on {ours['device']}"
        speed, gib = (ours[k] / theirs[k] if theirs[k] else float("nan") for k in ("tokens_per_second", "peak_gib"))
        show(f"QLoRA tokens a second, HF PEFT + bitsandbytes / jpeft, {where}", 1 / speed, 0.5, "")
        show(f"peak memory, jpeft / HF PEFT + bitsandbytes, {where}", gib, 0.8, "")


def side_jpeft(options) -> dict:
    """The step of `jpeft train`, compressed leaf by leaf; the memory is what the compiled step needs at its peak."""
    from jpeft import models
    from jpeft.core.tree import map_with_paths
    from jpeft.parallel.program import memory
    from jpeft.quant import compressing
    from jpeft.train.optimizer import adamw
    from jpeft.train.step import init_state, make_step

    config = {"model_type": "llama", **shape_config(options.shapes[0])}
    apply, shapes = models.abstract(config, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    sites = jpeft.find_sites(apply, shapes, *apply.inputs(8))
    method = jpeft.chain(jpeft.NF4(double_quant=True), jpeft.LoRA(rank=16, alpha=16))
    compress = jax.jit(compressing(method, sites), static_argnums=0)
    draw = lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    params = map_with_paths(lambda path, x: compress(path, draw(x)), shapes)
    trainable, frozen = method.init(jax.random.key(1), params, sites)
    del params
    tx = adamw(1e-4, 1000)
    state = init_state(trainable, tx)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (options.rows, options.length)).astype(np.int32)
    places = np.broadcast_to(np.arange(options.length, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": ones.astype(np.float32)}
    batch = jax.device_put({**batch, "positions": places, "segment_ids": ones})
    key = jax.random.key(2)
    step = make_step(apply, method, tx).lower(state, frozen, batch, key).compile()

    def run():
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        assert np.isfinite(float(metrics["loss"]))

    device = jax.devices()[0].device_kind
    return {"device": device, "tokens_per_second": per_second(run, options), "peak_gib": memory(step).peak / 2**30}


def side_peft(options) -> dict:
    """HF PEFT as its users run it: gradient checkpointing, torch's own attention, AdamW."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    config = transformers.LlamaConfig(**shape_config(options.shapes[0]), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                four = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                four.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                setattr(parent, name, four)
    model = model.to(device)
    model.is_loaded_in_4bit = True
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, config.vocab_size, (options.rows, options.length), device=device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def run():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert np.isfinite(loss.item())

    rate = per_second(run, options)
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"device": torch.cuda.get_device_name() if cuda else "cpu", "tokens_per_second": rate, "peak_gib": gib}


def per_second(run, options) -> float:
    """Tokens a second by the median of the steps after the first two."""
    seconds = []
    for _ in range(options.rounds + 2):
        begun = time.perf_counter()
        run()  # it waits for the loss
        seconds.append(time.perf_counter() - begun)
    return options.rows * options.length / statistics.median(seconds[2:])


SIDES = {"_jpeft": side_jpeft, "_peft": side_peft}
ROWS = {n.removeprefix("row_"): fn for n, fn in list(globals().items()) if n.startswith("row_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(ROWS)}; step and accuracy by default")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1B", "8B"], help="of `tokens`")
    parser.add_argument("--rows", type=int, default=1, help="of `tokens`")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row, of `tokens`")
    options = parser.parse_args()
    for name in options.figures or ("step", "accuracy"):
        if name in SIDES:
            print(json.dumps(SIDES[name](options)))
        else:
            ROWS[name](options)
