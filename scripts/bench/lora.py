"""LoRA through `lift`, measured against hand-written LoRA, full fine-tuning, HF PEFT and Qwix. Ratios within one run.

    python scripts/bench/lora.py            # all rows; rows whose package is missing say so
    python scripts/bench/lora.py flops memory

Needs the extra `parity` for the HF PEFT row and `pip install qwix` for the Qwix row. Expected numbers:
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft

WIDTH, FEED_FORWARD, HEADS, VOCABULARY, BATCH, LENGTH = 512, 1408, 8, 2048, 4, 120
PROJECTIONS = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
PROJECTIONS |= {"gate": (WIDTH, FEED_FORWARD), "up": (WIDTH, FEED_FORWARD), "down": (FEED_FORWARD, WIDTH)}


def project(x, p):
    """A projection; by hand with LoRA where the parameters hold factors."""
    y = x @ p["kernel"]
    return y + (x @ p["a"]) @ p["b"] if "a" in p else y


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def block(x, p):
    heads = lambda y: y.reshape(*x.shape[:2], HEADS, -1)
    h = norm(x)
    q, k, v = (heads(project(h, p[n])) for n in "qkv")
    x = x + project(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape), p["o"])
    h = norm(x)
    return x + project(jax.nn.silu(project(h, p["gate"])) * project(h, p["up"]), p["down"])


def unrolled(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = block(x, p)
    return norm(x) @ params["head"]


def scanned(params, tokens):
    x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), params["embed"][tokens], params["layers"])
    return norm(x) @ params["head"]


def make_params(layers: int, stacked: bool = False):
    key = jax.random.key(0)
    normal = lambda n, shape: 0.02 * jax.random.normal(jax.random.fold_in(key, n), shape)
    make = lambda lead: {n: {"kernel": normal(k, lead + s)} for k, (n, s) in enumerate(PROJECTIONS.items())}
    return {
        "embed": normal(100, (VOCABULARY, WIDTH)),
        "layers": make((layers,)) if stacked else [make(()) for _ in range(layers)],
        "head": normal(101, (WIDTH, VOCABULARY)),
    }


def cross_entropy(logits, tokens):
    log = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log, tokens[:, 1:, None], -1))


def sgd_step(loss):
    def step(trainable, frozen, tokens):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, tokens)
        return jax.tree.map(lambda x, g: x - 1e-3 * g, trainable, grads), value

    return step


def adam_step(loss):
    """The step that people train with: clipped AdamW, its state donated."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def step(state, frozen, tokens):
        trainable, moments = state
        value, grads = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, moments = tx.update(grads, moments, trainable)
        return (optax.apply_updates(trainable, updates), moments), value

    return lambda trainable: (trainable, tx.init(trainable)), step


def losses(rank: int, batch: int = BATCH, layers: int = 4):
    """`{name: (loss, trainable, frozen)}` of the lifted, the hand-written and the full way, on the same numbers."""
    params = make_params(layers)
    tokens = jax.random.randint(jax.random.key(1), (batch, LENGTH), 0, VOCABULARY)
    sites = jpeft.find_sites(unrolled, params, tokens)
    method = jpeft.LoRA(rank=rank, alpha=rank)
    trainable, frozen = method.init(jax.random.key(2), params, sites)
    lifted = lambda t, f, x: cross_entropy(jpeft.lift(unrolled)(method.bind(t, f), x), x)
    factors = [{n: {"a": w["kernel"].a, "b": w["kernel"].b} for n, w in p.items()} for p in trainable["layers"]]

    def by_hand(factors, params, x):
        both = [{n: {**p[n], **f[n]} for n in p} for p, f in zip(params["layers"], factors, strict=True)]
        return cross_entropy(unrolled({**params, "layers": both}, x), x)

    full = lambda p, _, x: cross_entropy(unrolled(p, x), x)
    made = {"lifted": (lifted, trainable, frozen), "hand": (by_hand, factors, params), "full": (full, params, None)}
    return made, tokens


def steps(rank: int):
    """`{name: (compiled step, trainable, frozen)}` and the batch."""
    made, tokens = losses(rank)
    return {
        n: (jax.jit(sgd_step(loss)).lower(t, f, tokens).compile(), t, f) for n, (loss, t, f) in made.items()
    }, tokens


def flops(compiled) -> float:
    return compiled.cost_analysis()["flops"]


def paired(first: Callable, second: Callable, rounds: int = 15) -> tuple[float, float, float]:
    """Median seconds of each and of the ratio, the two in turn."""
    for fn in (first, second):
        fn()
        fn()
    times = []
    for _ in range(rounds):
        row = []
        for fn in (first, second):
            start = time.perf_counter()
            fn()
            row.append(time.perf_counter() - start)
        times.append(row)
    median = lambda values: statistics.median(values)
    return median(t[0] for t in times), median(t[1] for t in times), median(t[0] / t[1] for t in times)


def show(figure: str, value: float, target: float, note: str = "") -> None:
    verdict = "reached" if value <= target else "NOT REACHED"
    print(f"{figure:<64} {value:8.3f}   <= {target:<5} {verdict:<12} {note}", flush=True)


def row_flops():
    made, _ = steps(rank=16)
    lifted, hand = flops(made["lifted"][0]), flops(made["hand"][0])
    show("XLA FLOPs, lifted LoRA step / hand-written", lifted / hand, 1.01, f"{lifted:.3e} / {hand:.3e}")
    made, _ = steps(rank=8)
    lora, full = flops(made["lifted"][0]), flops(made["full"][0])
    show("XLA FLOPs, LoRA r=8 step / full step, no remat", lora / full, 0.70, f"{lora:.3e} / {full:.3e}")


def row_memory():
    for batch, target in ((1, 0.6), (BATCH, float("inf"))):
        made, tokens = losses(rank=8, batch=batch)
        compiled = {}
        for name, (loss, trainable, frozen) in made.items():
            start, step = adam_step(loss)
            compiled[name] = jax.jit(step, donate_argnums=0).lower(start(trainable), frozen, tokens).compile()
        temp = {n: c.memory_analysis().temp_size_in_bytes / 2**20 for n, c in compiled.items()}
        note = f"{temp['lifted']:.1f} / {temp['full']:.1f} MiB; by hand {temp['hand']:.1f}"
        show(
            f"temporary bytes, LoRA r=8 step / full step, {batch * LENGTH} tokens",
            temp["lifted"] / temp["full"],
            target,
            note,
        )
    text = compiled["lifted"].as_text()
    shapes = {f"{a},{b}" for a, b in PROJECTIONS.values()} | {f"{b},{a}" for a, b in PROJECTIONS.values()}
    dense = [s for s in shapes if re.search(rf"= f32\[{s}\]\S* (dot|add|subtract|multiply)\(", text)]
    show("dense updates in the lifted step's HLO", len(dense), 0, ", ".join(dense))


def row_wall():
    made, tokens = steps(rank=16)
    run = lambda name: lambda: jax.block_until_ready(made[name][0](*made[name][1:], tokens))
    a, b, ratio = paired(run("lifted"), run("hand"))
    show("wall time, lifted LoRA step / hand-written", ratio, 1.05, f"{a * 1e3:.0f} / {b * 1e3:.0f} ms")


def row_lowering():
    found = {}
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    for layers in (4, 32):
        params = jax.eval_shape(lambda layers=layers: make_params(layers, stacked=True))
        sites = jpeft.find_sites(scanned, params, tokens)
        method = jpeft.LoRA(rank=8)
        halves = jax.eval_shape(lambda k, p, m=method, s=sites: m.init(k, p, s), jax.random.key(0), params)

        def lifted(method=method, halves=halves):
            jax.clear_caches()
            loss = lambda t, f, x: cross_entropy(jpeft.lift(lambda p, x: scanned(p, x))(method.bind(t, f), x), x)
            jax.jit(sgd_step(loss)).lower(*halves, tokens)

        def plain(params=params):
            jax.clear_caches()
            loss = lambda p, _, x: cross_entropy(scanned(p, x), x)
            jax.jit(sgd_step(loss)).lower(params, None, tokens)

        a, b, ratio = paired(lifted, plain, rounds=5)
        found[layers] = a
        show(f"lowering time, lifted / plain, {layers} scanned layers", ratio, 2.0, f"{a:.2f} / {b:.2f} s")
    show("lowering time of the lifted step, 32 layers / 4 layers", found[32] / found[4], 1.2)


CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=WIDTH,
    intermediate_size=FEED_FORWARD,
    num_hidden_layers=4,
    num_attention_heads=HEADS,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=LENGTH,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    hidden_act="silu",
    rope_theta=10000.0,
)


# The second Llama of the comparison with HF PEFT: the shape of the model that comes with the package, without its
# tied head, which PEFT leaves alone too.
EMBEDDED = CONFIG | dict(
    hidden_size=192, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2, vocab_size=4096
)


def row_peft():
    if not all(importlib.util.find_spec(p) for p in ("torch", "transformers", "peft")):
        print("step time against HF PEFT: torch, transformers and peft are not installed (the extra `parity`)")
        return
    for name, config in (("width 512", CONFIG), ("width 192, as embedded", EMBEDDED)):
        against_peft(name, config)


def against_peft(name: str, config: dict):
    import peft
    import torch
    import transformers

    from jpeft import models

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH))
    keep = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    torch_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keep))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch_model = peft.get_peft_model(torch_model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=names))
    optimizer = torch.optim.SGD([p for p in torch_model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.tensor(tokens)

    def theirs():
        optimizer.zero_grad()
        torch_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    apply, shapes = models.abstract(config)
    params = jax.tree.map(lambda s: 0.02 * jax.random.normal(jax.random.key(0), s.shape, jnp.float32), shapes)
    x = jnp.asarray(tokens)
    method = jpeft.LoRA(rank=16, alpha=16)
    trainable, frozen = method.init(jax.random.key(0), params, jpeft.find_sites(apply, params, x))
    loss = lambda t, f, x: cross_entropy(jpeft.lift(apply)(method.bind(t, f), x), x)
    step = jax.jit(sgd_step(loss)).lower(trainable, frozen, x).compile()
    a, b, ratio = paired(lambda: jax.block_until_ready(step(trainable, frozen, x)), theirs, rounds=9)
    show(f"step time against HF PEFT (torch CPU), {name}", ratio, 0.7, f"{a * 1e3:.0f} / {b * 1e3:.0f} ms")


def row_qwix():
    if not importlib.util.find_spec("qwix"):
        print("step time against Qwix: qwix is not installed (pip install qwix)")
        return
    import qwix
    from flax import linen as nn

    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
            heads = lambda y: y.reshape(*x.shape[:2], HEADS, -1)
            h = norm(x)
            q, k, v = (heads(dense(WIDTH, n)(h)) for n in "qkv")
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
            x = x + dense(WIDTH, "o")(mixed)
            h = norm(x)
            inner = jax.nn.silu(dense(FEED_FORWARD, "gate")(h)) * dense(FEED_FORWARD, "up")(h)
            return x + dense(WIDTH, "down")(inner)

    class LinenModel(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
            for n in range(4):
                x = LinenBlock(name=f"layer_{n}")(x)
            return nn.Dense(VOCABULARY, use_bias=False, name="head")(norm(x))

    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCABULARY)
    apply, params = jpeft.from_linen(LinenModel(), tokens)
    method = jpeft.LoRA(rank=16, alpha=16)
    trainable, frozen = method.init(jax.random.key(0), params, jpeft.find_sites(apply, params, tokens))
    ours_loss = lambda t, f, x: cross_entropy(jpeft.lift(apply)(method.bind(t, f), x), x)
    ours = jax.jit(sgd_step(ours_loss)).lower(trainable, frozen, tokens).compile()

    rule = qwix.LoraRule(module_path=".*layer_.*", rank=16, alpha=16)
    adapted = qwix.apply_lora_to_model(LinenModel(), qwix.LoraProvider([rule]))
    theirs_params = adapted.init(jax.random.key(0), tokens)["params"]
    is_lora = lambda path: any("lora" in str(getattr(k, "key", "")) for k in path)
    pick = lambda want: jax.tree_util.tree_map_with_path(lambda p, x: x if is_lora(p) == want else None, theirs_params)
    lora, rest = pick(True), pick(False)
    join = lambda a, b: jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
    theirs_loss = lambda t, f, x: cross_entropy(adapted.apply({"params": join(t, f)}, x), x)
    theirs = jax.jit(sgd_step(theirs_loss)).lower(lora, rest, tokens).compile()
    a, b, ratio = paired(
        lambda: jax.block_until_ready(ours(trainable, frozen, tokens)),
        lambda: jax.block_until_ready(theirs(lora, rest, tokens)),
    )
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (trainable, lora)]
    note = f"{a * 1e3:.0f} / {b * 1e3:.0f} ms; trainable {sizes[0]:,} / {sizes[1]:,}"
    show("step time against Qwix LoRA on the same Flax model", ratio, 1.0, note)


def row_import():
    code = "import time; import jax; s = time.perf_counter(); import jpeft; print(time.perf_counter() - s)"
    runs = [float(subprocess.check_output([sys.executable, "-W", "ignore", "-c", code])) for _ in range(5)]
    show("`import jpeft` beyond `import jax`, seconds (median of 5)", statistics.median(runs), 0.3)


ROWS = {n.removeprefix("row_"): fn for n, fn in list(globals().items()) if n.startswith("row_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help=f"of {', '.join(ROWS)}; all by default")
    chosen = parser.parse_args().rows or list(ROWS)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {len(jax.devices())} device(s)")
    for name in chosen:
        ROWS[name]()
