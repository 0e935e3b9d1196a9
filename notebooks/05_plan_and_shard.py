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
# # Plan on a laptop, then run the sharded step
#
# Where every array of a fine-tuning step lies on a pod follows from the model, the method and the mesh, so it can be
# known before there is a pod. This notebook counts what 8B and 70B models put on each device, compiles the step of the
# 8B without a byte of its weights, and then runs the same step, on a small model, over eight devices.
#
# The eight devices are virtual: XLA splits the CPU, if it is told to before JAX is imported.

# %%
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# %%
import collections
import importlib.util
import re
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AbstractMesh
from tokenizers import Tokenizer

import jpeft
from jpeft import assets, models
from jpeft.parallel import make_mesh, shard
from jpeft.parallel.mesh import AXES
from jpeft.parallel.program import collectives, per_device
from jpeft.parallel.topology import parse_topology
from jpeft.train.optimizer import adamw
from jpeft.train.plan import plan
from jpeft.train.step import init_state, make_step, state_shardings

started = time.time()
GIB, MIB = 2**30, 2**20
print(f"jax {jax.__version__}, {len(jax.devices())} devices of kind {jax.devices()[0].device_kind}")

# %% [markdown]
# ## What lies on a device
# `models.abstract` describes a model by its config, `find_sites` reads which axis of a leaf is an input, an output or a
# stack of layers, and `shard` decides from these where each array lies. None of them needs an array, and the mesh may
# be abstract too: 256 devices cost nothing. `per_device` adds up the pieces.

# %%
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
METHODS = {"LoRA": jpeft.LoRA(rank=16), "QLoRA": jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=16))}
optimizer = adamw(1e-4, 1000)


def described(config):
    """A model of bfloat16 that computes each layer again in the backward pass, its shapes and its sites."""
    apply, shapes = models.abstract(config, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    return apply, shapes, jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))


def at_rest(model, method, devices):
    """Bytes of weights, adapters and AdamW's state on each of so many devices along `fsdp`."""
    _, shapes, sites = model
    mesh = AbstractMesh((1, devices, 1), AXES)
    layout = shard(mesh, method, shapes, sites, optimizer)
    trainable, frozen = jax.eval_shape(lambda params: method.init(jax.random.key(0), params, sites), shapes)
    state = jax.eval_shape(optimizer.init, trainable)
    placed = (frozen, layout.frozen), (trainable, layout.trainable), (state, layout.optimizer_state)
    return np.array([per_device(*pair) for pair in placed])


large = described(LLAMA_8B)
print(f"{'Llama-3.1-8B, GiB a device':<28}{'weights':>9}{'adapters':>10}{'optimizer':>11}")
for name, method in METHODS.items():
    for devices in (1, 4, 16, 64):
        weights, adapters, state = at_rest(large, method, devices) / GIB
        print(f"{f'{name}, fsdp={devices}':<28}{weights:9.3f}{adapters:10.4f}{state:11.4f}")

# %% [markdown]
# Pieces are as many as the devices, but for norms, biases and other small arrays: gathering these would cost more than
# it saves, so each device has all of them.
#
# 70B parameters are another matter: on what do they lie at all? The dashed lines are what a program may use of the HBM
# of one chip.

# %%
huge, DEVICES = described(LLAMA_70B), [2**k for k in range(9)]
LIMITS = {kind: parse_topology(f"{kind}-4").hbm_gib for kind in ("v5e", "v5p")}
resting = {name: [at_rest(huge, method, n).sum() / GIB for n in DEVICES] for name, method in METHODS.items()}

plt.figure(figsize=(7, 3.8))
labels = {"LoRA": "LoRA on bfloat16", "QLoRA": "QLoRA, NF4"}
for name, sizes in resting.items():
    plt.loglog(DEVICES, sizes, "o-", base=2, label=labels[name])
for kind, limit in LIMITS.items():
    plt.axhline(limit, color="black", linestyle="--", linewidth=1)
    plt.text(DEVICES[-1], limit * 1.08, f"{kind}: {limit} GiB", ha="right", va="bottom", fontsize=9)
plt.xticks(DEVICES, DEVICES)
plt.yticks(heights := [0.25, 1, 4, 16, 64], heights)
plt.ylim(0.12, 260)
plt.xlabel("devices along fsdp")
plt.ylabel("GiB a device, at rest")
plt.title("Llama-3.1-70B: weights, adapters of rank 16, AdamW's state", fontsize=10)
plt.legend(loc="lower left")
plt.tight_layout()
plt.show()
for name, sizes in resting.items():
    for kind, limit in LIMITS.items():
        least = next(n for n, size in zip(DEVICES, sizes, strict=True) if size < limit)
        print(f"{name:<6} lies on {least:>2} {kind} and more")

# %% [markdown]
# That is what rests. A step also needs room for activations, for the layer that is gathered at the moment, for
# logits; how much, only a compiler knows.
#
# ## The step, compiled
# `plan` lowers and compiles the true training step for the devices of a mesh, reads the compiler's own account of its
# memory, and counts its collectives, those in loops as often as they turn. Here for the eight virtual devices, and for
# four v5e chips where libtpu is installed (`pip install "jpeft[tpu]"`; it needs no TPU).

# %%
targets = {"eight CPU devices": (make_mesh("fsdp=8"), float("inf"))}
if importlib.util.find_spec("libtpu"):
    v5e = parse_topology("v5e-4")
    targets["v5e-4"] = make_mesh("fsdp=4", devices=v5e.devices()), v5e.hbm_gib

plans = {}
for place, (mesh, limit) in targets.items():
    for name, method in METHODS.items():
        found = plans[place, name] = plan(*large, method, optimizer, mesh, mesh.size, 2048, limit)
        print(f"\n{name} of 8B on {place}, {mesh.size} rows of 2,048 tokens: compiled in {found.seconds:.0f} s")
        print("  GiB a device:", ", ".join(f"{part} {gib:.2f}" for part, gib in found.parts_gib.items() if gib > 0.01))
        for each in found.exchanges:
            print(f"  {each.kind:<20}{each.dtype:<6}{each.count:>5} times{each.bytes / MIB:>12,.1f} MiB a device")

# %% [markdown]
# What `LoRA` gathers and `QLoRA` does not are the adapted weights, once forward and once backward; in their place
# `QLoRA` gathers codes and scales.

# %%
lora, qlora = (plans["eight CPU devices", name].gathered_bytes for name in METHODS)
dense = sum(lora.values()) - qlora["f32"]
packed = sum(size for dtype, size in qlora.items() if dtype != "f32")
print(
    f"gathered of the adapted weights: {packed / GIB:.1f} GiB packed, {dense / GIB:.1f} GiB dense: {packed / dense:.3f}"
)
assert packed < 0.27 * dense

# %% [markdown]
# The CPU has neither 4-bit nor bfloat16 exchanges: its compiler widens the one to bytes, the other to float32, which
# doubles all of them but the 8-bit scales. It also has no kernel that multiplies packed weights, so its temporaries say
# little about a TPU's.
#
# For a TPU the command line does all of the above. This was recorded on 2026-11-24, on two CPU cores, with jax 0.10.2
# and libtpu 0.0.42.1:
#
# ```text
# $ jpeft plan --model config.json --method qlora --rank 16 --topology v5e-4 --batch 4 --seq 2048
# ...
# v5e-4, mesh fsdp=4: 4 rows of 2048 tokens, remat full
#
# HBM of a device, GiB
#   weights        1.328
#   adapters       0.039
#   optimizer      0.078
#   batch          0.000
#   temporaries    2.112
#   program        0.048
#   peak           3.605
#   limit         15.750
#
# exchanges of a step      dtype   count        MiB a device
#   all-gather             bf16      898           2,164.0
#   all-gather             f32       192               2.6
#   all-gather             u4        448           6,656.0
#   all-gather             u8        448             208.0
#   all-reduce             f32       227              84.0
#   all-reduce             s32         1               0.0
#   reduce-scatter         f32       224              19.0
#
# 45.90 GFLOP a token; compiled in 99 s
# It fits, with 77% of the memory to spare.
# ```
#
# Its first rows agree with our first table at `fsdp=4`. The codes travel as `u4` and the scales as `u8`, 6,864
# MiB together. bfloat16 weights would be 26,624 MiB, half of the float32 that the CPU gathered for LoRA: 0.258. The
# `bf16` that is left is the embedding, the head and the adapters.
#
# ## Where one layer lies
# One layer's query and output projections of the 8B, on two meshes of our eight devices. Each square is an array, its
# first axis downwards; numbers are the devices that hold a piece.


# %%
def pieces(shape, sharding):
    """`{(rows, columns): devices}` of an array's last two axes."""
    found = collections.defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        spans = [cut.indices(n)[:2] for cut, n in zip(index[-2:], shape[-2:], strict=True)]
        found[tuple(spans)].append(device.id)
    return found


def span(ids):
    ids = sorted(ids)
    together = len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1))
    return f"{ids[0]}–{ids[-1]}" if together else ", ".join(map(str, ids))


def projection(tree, name):
    return tree["layers"]["self_attn"][name]["kernel"]


def adam_moments(state):
    """AdamW's first moments, wherever in the optimizer's state they are."""
    return next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")).mu


def named_arrays(name, frozen, trainable, state):
    """The arrays that belong to one adapted projection, of a layout or of a run."""
    base, adapter = projection(frozen[0], name), projection(trainable[1], name)
    moments = projection(adam_moments(state)[1], name)
    return {"codes": base.base, "scales": base.scales, "A": adapter.a, "B": adapter.b, "Adam's m of A": moments.a}


_, shapes, sites = large
method = METHODS["QLoRA"]
trainable, frozen = jax.eval_shape(lambda params: method.init(jax.random.key(0), params, sites), shapes)
state = jax.eval_shape(optimizer.init, trainable)
figure, rows = plt.subplots(3, 5, figsize=(10, 6.4))
shown = [("q_proj", "fsdp=8"), ("q_proj", "data=2,fsdp=2,tensor=2"), ("o_proj", "data=2,fsdp=2,tensor=2")]
for row, (name, mesh) in zip(rows, shown, strict=True):
    layout = shard(make_mesh(mesh), method, shapes, sites, optimizer)
    arrays = named_arrays(name, frozen, trainable, state)
    shardings = named_arrays(name, layout.frozen, layout.trainable, layout.optimizer_state)
    for axes, (label, array) in zip(row, arrays.items(), strict=True):
        height, width = array.shape[-2:]
        for ((top, bottom), (left, right)), ids in pieces(array.shape, shardings[label]).items():
            x, y, w, h = left / width, top / height, (right - left) / width, (bottom - top) / height
            axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=plt.cm.tab20(2 * min(ids) + 1), edgecolor="white"))
            axes.text(x + w / 2, y + h / 2, span(ids), ha="center", va="center", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
        axes.set_title(f"{label} {height}×{width}\n{array.dtype.name}", fontsize=8)
    row[0].set_ylabel("\n".join([name, *mesh.split(",")]), fontsize=9, rotation=0, ha="right", va="center")
plt.tight_layout()
plt.show()

# %% [markdown]
# Along `fsdp` everything is cut, and gathered by the layer that uses it. Along `tensor` the query projection is cut by
# its outputs, the heads, and the output projection by its inputs, which are these heads: between the two no activation
# needs to travel. `data` repeats: 0 to 3 hold what 4 to 7 hold. An adapter's factor follows the side of the matrix that
# it stands on; scales follow the outputs only.
#
# ## A run
# The small Llama that comes with the package, and its task: from a function's signature to its one-line summary. The
# same batches, first on one device, then on meshes of eight. `jpeft train --mesh` does these lines.

# %%
LENGTH, ROWS, STEPS = 48, 8, 24
apply, params = models.load(assets.model_path(), param_dtype="float32", remat="full")
sites = jpeft.find_sites(apply, params, jnp.zeros((1, LENGTH), jnp.int32))
tokenizer = Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
tx = adamw(3e-3, STEPS)


def encoded(examples):
    """A batch as the step takes it: tokens, the next of each, and which of these are learned; an example a row."""
    tokens, learned = np.zeros((len(examples), LENGTH + 1), np.int32), np.zeros((len(examples), LENGTH), np.float32)
    for row, example in enumerate(examples):
        prompt = tokenizer.encode(example["prompt"]).ids
        full = (prompt + tokenizer.encode(example["completion"]).ids)[: LENGTH + 1]
        tokens[row, : len(full)] = full
        learned[row, len(prompt) - 1 : len(full) - 1] = 1
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), learned.shape)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": learned}
    return batch | {"positions": positions, "segment_ids": np.ones(learned.shape, np.int32)}


examples = np.random.default_rng(0).permutation(assets.summaries("train"))
batches = [encoded(examples[n * ROWS : (n + 1) * ROWS]) for n in range(STEPS)]


def fine_tune(mesh=None):
    """The state after training, the frozen half, the losses, and the step's program as it is lowered."""
    key = jax.random.key(0)
    trainable, frozen = method.init(key, params, sites)
    state, layout, here = init_state(trainable, tx), None, None
    if mesh is not None:
        layout = shard(make_mesh(mesh), method, params, sites, tx)
        state, frozen = jax.device_put((state, frozen), (state_shardings(layout), layout.frozen))
        here = layout.batch
    placed = [jax.device_put(batch, here) for batch in batches]
    step, losses = make_step(apply, method, tx, layout=layout), []
    lowered = step.lower(state, frozen, placed[0], key)
    for batch in placed:
        state, metrics = step(state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
    return state, frozen, np.array(losses), lowered


MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2")
alone, *sharded = (fine_tune(mesh) for mesh in (None, *MESHES))
print(f"one device: loss {alone[2][0]:.4f} -> {alone[2][-1]:.4f}")
for mesh, run in zip(MESHES, sharded, strict=True):
    apart = np.abs(run[2] - alone[2]).max()
    print(f"{mesh}: the losses of {STEPS} steps differ by at most {apart:.1e}")
    assert apart < 1e-4

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
steps = np.arange(1, STEPS + 1)
left.plot(steps, alone[2], color="black", linewidth=3, alpha=0.3, label="one device")
for mesh, run in zip(MESHES, sharded, strict=True):
    line = left.plot(steps, run[2], "--" if mesh == MESHES[0] else ":", label=mesh)[0]
    right.plot(steps, 1e6 * np.abs(run[2] - alone[2]), ".-", color=line.get_color())
left.set(xlabel="step", ylabel="loss per summary token")
left.legend(fontsize=8)
right.set(xlabel="step", ylabel="difference, millionths")
plt.tight_layout()
plt.show()

# %% [markdown]
# The sums are the same, in another order: float32 rounding is all that the losses differ by.
#
# The arrays of the run lie as the layout says, on real buffers. In this small model a layer's scales and adapters are
# too small to be cut over `fsdp`.

# %%
print(f"{'q_proj on ' + MESHES[1]:<36}{'whole':<16}{'on a device':<16}pieces")
state, frozen, *_ = sharded[1]
for label, array in named_arrays("q_proj", frozen, state.trainable, state.optimizer_state).items():
    local = array.addressable_shards[0].data.shape
    count = len(pieces(array.shape, array.sharding))
    print(f"{label:<16}{array.dtype.name:<20}{array.shape!s:<16}{local!s:<16}{count}")

# %% [markdown]
# And the program: what the step asks to be gathered, and what this CPU's compiler makes of it.

# %%
for mesh, (*_, lowered) in zip(MESHES, sharded, strict=True):
    asked = collections.Counter(re.findall(r"all_gather.*-> tensor<(?:\d+x)*(\w+)>", lowered.as_text()))
    print(f"\n{mesh}: all_gathers written in the step, by dtype: {dict(asked)}")
    for each in collectives(lowered.compile().as_text()):
        print(f"  {each.kind:<20}{each.dtype:<6}{each.count:>5} times{each.bytes / MIB:>9.2f} MiB a device")
    assert asked["ui4"]

# %% [markdown]
# Codes are asked for as `ui4`. Of a matrix on the second mesh a device needs a half, and half of the codes is what it
# gathers. What `tensor` costs instead are sums over activations, which grow with the tokens and not with the weights:
# it is for more devices than rows.

# %% [markdown]
# ## On a pod
# The step above knows nothing of virtual devices: on a slice of TPUs only the mesh is another. From the shell it is
# `jpeft train --model ... --method qlora --mesh fsdp=8,tensor=2`; how a run is planned, started on the hosts of a pod
# and resumed is in [docs/pods.md](../docs/pods.md).

# %%
print(f"{time.time() - started:.0f} s in all")
