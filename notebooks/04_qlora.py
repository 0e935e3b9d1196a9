# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # QLoRA: four bits a weight
#
# LoRA trains little, but the frozen weights still fill the memory. QLoRA (Dettmers et al. 2023, arXiv 2305.14314)
# keeps them in four bits. Here that is one more Weight: `NF4` packs the leaf, `LoRA` stands on it, neither knows of the
# other, and the model knows of neither. This notebook looks at the format, counts its bits and its error, trains,
# merges, and at last moves the optimizer's state off the device.

# %%
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tokenizers import Tokenizer

import jpeft
from jpeft import assets, models
from jpeft.kernels.nf4 import reference
from jpeft.quant import requantize

started = time.time()
relative = lambda got, wanted: float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))

# %% [markdown]
# ## The codebook
# A block of 64 weights is divided by its largest magnitude, and each is rounded to the nearest of 16 values.
# NormalFloat spaces them like the quantiles of a normal distribution: close together where normal weights are many. FP4
# and int4 spend their codes elsewhere.

# %%
levels = {
    "NF4": np.sort(reference.CODEBOOKS["nf4"]),
    "FP4": np.unique(reference.CODEBOOKS["fp4"]),
    "int4": np.arange(-7, 8) / 7,
}
weights = jax.random.normal(jax.random.key(0), (4096, 256))
codes, scales = reference.quantize(weights, block_size=64)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=[3, 2])
for height, values in enumerate(reversed(levels.values())):
    left.plot(values, np.full(len(values), height), "|", markersize=18, markeredgewidth=2)
left.set_yticks(range(len(levels)), list(reversed(levels)))
left.set_ylim(-0.6, len(levels) - 0.4)
left.set_xlabel("value, of the block's largest magnitude")
right.bar(range(16), np.bincount(np.asarray(codes.astype(jnp.uint8)).ravel(), minlength=16) / codes.size)
right.axhline(1 / 16, color="black", linestyle="--", linewidth=1)
right.set_xticks(range(0, 16, 3))
right.set_xlabel("NF4 code")
right.set_ylabel("share of normal weights")
plt.tight_layout()
plt.show()

# %% [markdown]
# The ends are rare: hardly more than each block's largest magnitude is near -1 or 1. The codes are those of
# bitsandbytes, bit for bit, so its checkpoints load without being quantized again.
#
# ## What a bit buys
# The error of normal weights against the bits stored for each: the code, and its share of the block's float32 scale.


# %%
def rounded(matrix, values, block_size):
    """Each weight as the nearest of the values, times its block's largest magnitude."""
    blocks = matrix.reshape(-1, block_size, matrix.shape[1])
    scale = jnp.abs(blocks).max(1, keepdims=True)
    nearest = jnp.searchsorted(jnp.asarray((values[1:] + values[:-1]) / 2, jnp.float32), blocks / scale)
    return (jnp.asarray(values, jnp.float32)[nearest] * scale).reshape(matrix.shape)


def error(name, block_size):
    if name in ("NF4", "FP4"):
        options = {"block_size": block_size, "codebook": name.lower()}
        parts = reference.quantize(weights, **options)
        return relative(reference.dequantize(*parts, **options), weights)
    return relative(rounded(weights, levels.get(name, np.arange(-127, 128) / 127), block_size), weights)


BLOCKS = (32, 64, 128, 256, 1024, 4096)
errors = {name: [error(name, block) for block in BLOCKS] for name in ("NF4", "FP4", "int4", "int8")}
print("block".ljust(8), *(f"{block:>8}" for block in BLOCKS))
for name, row in errors.items():
    print(name.ljust(8), *(f"{value:8.4f}" for value in row))

# Published for NF4, and measured on four million weights for the others.
expected = {"NF4": (0.0873, 0.0920, 0.0956, 0.0987), "FP4": (None, 0.1220), "int4": (None, 0.1077)}
for name, row in expected.items():
    assert all(wanted is None or abs(got - wanted) < 1e-3 for got, wanted in zip(errors[name], row, strict=False)), name

# %%
plt.figure(figsize=(6, 3.2))
bits = [4 + 32 / block for block in BLOCKS]
for name in levels:
    plt.plot(bits, errors[name], "o-", label=name)
for x, y, block in zip(bits, errors["NF4"], BLOCKS, strict=True):
    if block <= 256:
        plt.annotate(str(block), (x, y), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
plt.xlim(3.95, 5.1)
plt.ylim(0, 0.17)
plt.xlabel("bits a weight, with float32 scales of blocks of 4096 to 32")
plt.ylabel("relative error")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# At four bits NF4 is best at every block size. Eight bits (int8 in the table) are an order of magnitude better, at
# twice the memory.
#
# ## Double quantization
# A float32 scale for every 64 weights is half a bit for each. The scales are quantized too, to 8 bits in groups of 256:
# 4.5 bits become 4.127, and the error stays.


# %%
def bits_of(tree):
    return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree))


def packed_by(method):
    params = {"kernel": weights}
    sites = jpeft.find_sites(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 4096)))
    trainable, frozen = method.init(jax.random.key(0), params, sites)
    return method.bind(trainable, frozen)["kernel"]


for method in (jpeft.NF4(double_quant=False), jpeft.NF4(), jpeft.FP4(), jpeft.Int8()):
    leaf = packed_by(method)
    name = f"{type(method).__name__}({'double_quant' if getattr(method, 'double_quant', False) else ''})"
    print(f"{name:<20} {bits_of(leaf) / weights.size:6.3f} bits, error {relative(leaf.dense(), weights):.4f}")
assert abs(bits_of(packed_by(jpeft.NF4())) / weights.size - 4.127) < 1e-3

# %% [markdown]
# ## Memory before and after
# Shapes are enough to count: `models.abstract` and `jax.eval_shape` describe Llama-3.1-8B without a byte of it. The
# embedding and the head stay in bfloat16: `all-linear` is every linear map but the vocabulary's.

# %%
llama = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
large, shapes = models.abstract(llama, param_dtype="bfloat16")
large_sites = jpeft.find_sites(large, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
GIB = 8 * 2**30
memory = {}
for name, method in {
    "full": jpeft.FullFineTuning(),
    "LoRA": jpeft.LoRA(rank=16),
    "QLoRA": jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=16)),
}.items():
    init = lambda params, method=method: method.init(jax.random.key(0), params, large_sites)
    trainable, frozen = jax.eval_shape(init, shapes)
    adam = 2 * sum(x.size for x in jax.tree.leaves(trainable)) * 32
    memory[name] = [bits_of(frozen) / GIB, 2 * bits_of(trainable) / GIB, adam / GIB]
    print(f"{name:<6} frozen {memory[name][0]:6.2f}   trained, with gradients {memory[name][1]:6.2f}", end="")
    print(f"   AdamW's state {memory[name][2]:6.2f}   GiB")

# %%
plt.figure(figsize=(7, 2.4))
below = np.zeros(len(memory))
for part, label in enumerate(("frozen", "trained, with gradients", "AdamW's state, float32")):
    sizes = np.array([row[part] for row in memory.values()])
    plt.barh(list(memory), sizes, left=below, label=label)
    below += sizes
for row, total in enumerate(below):
    plt.text(total + 1, row, f"{total:.1f} GiB", va="center")
plt.xlim(0, below.max() * 1.15)
plt.gca().invert_yaxis()
plt.xlabel("GiB for Llama-3.1-8B, without activations")
plt.legend(loc="lower right")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## A run
# The small Llama that comes with the package, and its task: from a function's signature to its one-line summary. The
# same loop and the same batches, once on the weights as they are and once on their four bits.

# %%
LENGTH, ROWS, STEPS = 48, 8, 60
apply, params = models.load(assets.model_path(), param_dtype="float32")
tokenizer = Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
sites = jpeft.find_sites(apply, params, jnp.zeros((1, LENGTH), jnp.int32))


def encode(examples):
    """Token rows and a mask of the completion's tokens."""
    tokens, mask = np.zeros((len(examples), LENGTH), np.int32), np.zeros((len(examples), LENGTH), np.float32)
    for row, example in enumerate(examples):
        prompt = tokenizer.encode(example["prompt"]).ids
        full = (prompt + tokenizer.encode(example["completion"]).ids)[:LENGTH]
        tokens[row, : len(full)] = full
        mask[row, len(prompt) : len(full)] = 1
    return tokens, mask


train, heldout = encode(assets.summaries("train")), encode(assets.summaries("validation")[:96])


def loss_of(params, tokens, mask):
    logits = jpeft.lift(apply)(params, tokens)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(each * mask[:, 1:]) / jnp.sum(mask[:, 1:])


evaluate = jax.jit(loss_of)


def fine_tune(method, optimizer, steps=STEPS):
    """The trained halves, the optimizer's state and the losses."""
    trainable, frozen = method.init(jax.random.key(0), params, sites)

    @jax.jit
    def step(trainable, state, frozen, tokens, mask):
        loss = lambda trainable: loss_of(method.bind(trainable, frozen), tokens, mask)
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses, rng = optimizer.init(trainable), [], np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(train[0]), ROWS)
        trainable, state, value = step(trainable, state, frozen, train[0][rows], train[1][rows])
        losses.append(float(value))
    return trainable, frozen, state, losses


adamw = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 8, STEPS))
lora = jpeft.LoRA(rank=16, alpha=32)
qlora = jpeft.chain(jpeft.NF4(), lora)
runs = {"LoRA": (lora, fine_tune(lora, adamw)), "QLoRA": (qlora, fine_tune(qlora, adamw))}
after = {name: float(evaluate(m.bind(*run[:2]), *heldout)) for name, (m, run) in runs.items()}
print(f"held-out loss before {float(evaluate(params, *heldout)):.3f}; after:", after)
assert abs(after["QLoRA"] / after["LoRA"] - 1) < 0.01

# %%
plt.figure(figsize=(6, 3))
for name, (_, run) in runs.items():
    line = plt.plot(run[3], alpha=0.8, label=f"{name}, training batch")[0]
    plt.axhline(after[name], color=line.get_color(), linestyle="--", linewidth=1, label=f"{name}, held out")
plt.xlabel("step")
plt.ylabel("loss per summary token")
plt.ylim(2, 5.2)
plt.legend(ncols=2, loc="upper right", fontsize=9)
plt.tight_layout()
plt.show()

# %% [markdown]
# The adapter learns around the rounding: after training the two differ by less than one per cent.
#
# ## Merging
# `merge` gives a dense tree of full precision. `requantize` packs the merged weights again, and says for each leaf what
# that costs. The update of an adapter is about as large as the rounding, so a part of it is lost.

# %%
trainable, frozen, *_ = runs["QLoRA"][1]
bound = qlora.bind(trainable, frozen)
dense = jpeft.merge(bound)
packed, lost = requantize(bound)
untrained = jpeft.merge(qlora.bind(*qlora.init(jax.random.key(0), params, sites)))
leaf = lambda tree, path: functools.reduce(lambda node, name: node[name], path.split("/"), tree)
print(f"{'leaf':<40} {'adapter':>10} {'rounding':>10}")
for path, value in lost.items():
    update = relative(leaf(dense, path), leaf(untrained, path))
    print(f"{path:<40} {update:10.3f} {value:10.3f}")
for name, tree in {"lifted": bound, "merged": dense, "merged and packed again": packed, "base": params}.items():
    print(f"{name:<25} {bits_of(tree) / 8 / 2**20:6.2f} MiB, held-out loss {float(evaluate(tree, *heldout)):.4f}")

# %% [markdown]
# ## The optimizer's state in the host's memory
# `jpeft.offload` is an optax transform around another: what is as large as the parameters lives in pinned host memory
# and passes through the device layer by layer. For a rank of 16 that is little; for a rank of 256, or for full
# fine-tuning, it is most of what trains. On a platform that has no such memory it says so.

# %%
offloaded = jpeft.offload(adamw)
few = 8
resident_run, offloaded_run = fine_tune(qlora, adamw, few), fine_tune(qlora, offloaded, few)
for path, x in jax.tree_util.tree_leaves_with_path(offloaded_run[2])[:4]:
    print(f"{str(x.shape):<14} {x.sharding.memory_kind:<12} {jax.tree_util.keystr(path)}")
largest = lambda a, b: float(jnp.abs(a - b).max())
apart = max(jax.tree.leaves(jax.tree.map(largest, resident_run[0], offloaded_run[0])))
print(f"after {few} steps the trained numbers differ by at most {apart:.1e}")
assert apart < 1e-5

# %% [markdown]
# The operations are those of the resident optimizer; a CPU may round a sum otherwise where XLA fuses it with a product.
# An optimizer that must see all of its state at once cannot pass in pieces, and is refused before anything runs.

# %%
try:
    jpeft.offload(optax.lamb(1e-3)).init(trainable)
except ValueError as error:
    print(str(error)[:400])

# %%
print(f"{time.time() - started:.0f} s in all")
