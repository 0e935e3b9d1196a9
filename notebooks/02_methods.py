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
# # One model, every method
#
# Every method of jpeft is one file: a structured weight and a frozen dataclass with two pure functions, `init` and
# `bind`. Nothing else in the library knows its name. So this notebook does not name them either: it asks for the list,
# trains each for a few steps on the same small model, and plots what each buys for its parameters. Then we write a
# method of our own in thirty lines and let the library's laws test it.

# %%
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tokenizers import Tokenizer

import jpeft
from jpeft import assets, models

jax.config.update("jax_disable_most_optimizations", True)  # many short runs: compiling is what takes the time
started = time.time()
print(f"{len(jpeft.methods())} methods:", ", ".join(jpeft.methods()))

# %% [markdown]
# ## The model and the task
# The small Llama that comes with the package, and its task: from a function's signature to its one-line summary.

# %%
LENGTH, ROWS, STEPS = 32, 8, 20
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


train, heldout = encode(assets.summaries("train")), encode(assets.summaries("validation")[:32])


def loss_of(params, batch, fn=apply):
    logits = fn(params, batch["tokens"], positions=batch.get("positions"))
    learned = batch["weights"][:, 1:]
    targets = jnp.where(learned > 0, batch["tokens"][:, 1:], 0)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    return jnp.sum(each * learned) / jnp.maximum(jnp.sum(learned), 1)


rows_of = lambda part, rows: {"tokens": part[0][rows], "weights": part[1][rows], "tasks": np.zeros(ROWS, np.int32)}
parts = [rows_of(heldout, np.s_[n : n + ROWS]) for n in range(0, len(heldout[0]), ROWS)]
before = float(np.mean([jax.jit(loss_of)(params, part) for part in parts]))
print(f"held-out loss of the pretrained model: {before:.3f}")

# %% [markdown]
# ## Training any method
# The same lines for all of them. Some methods start from data (`CALIBRATION` says what they look at); some come with an
# optimizer transform or a penalty of their own; some need virtual tokens in the batch, or positions behind a prefix,
# which is what `prompted` is for. A loop that asks the method for these serves them all. The learning rates are rough:
# what the plot can show is where each method lives, not who wins.

# %%
RATES = {
    "FullFineTuning": 1e-3,
    "LastLayers": 1e-3,
    "TopK": 3e-3,
    "FishMask": 3e-3,
    "TrainableTokens": 3e-3,
    "RandLoRA": 1e-3,
    "WaveFT": 1e-3,
    "CorDA": 1e-3,
    "PromptTuning": 1e-1,
    "MultitaskPromptTuning": 1e-1,
    "PTuningV2": 1e-1,
    "LLaMAAdapter": 1e-1,
}
CHANGES = {
    "FourierFT": {"start": "zeros"},
    "TrainableTokens": {"token_indices": tuple(range(4096))},
    "AdaLoRA": {"total_steps": STEPS, "tinit": 5, "tfinal": 10},
    "LLaMAAdapter": {"num_layers": 4},
}


def fine_tune(method, rate):
    """The trainable half after a few steps, the frozen half, and the held-out loss."""
    batches = [(train[0][n * ROWS : (n + 1) * ROWS],) for n in range(4)]
    plain = lambda params, tokens: loss_of(params, {"tokens": tokens, "weights": jnp.asarray(tokens > 0, jnp.float32)})
    calibration = jpeft.calibrate(apply, params, sites, batches, method=method, loss=plain) or None
    trainable, frozen = method.init(jax.random.key(0), params, sites, calibration)
    tx = method.optimizer(optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, 5, STEPS)))
    state = jax.jit(tx.init)(trainable)

    def loss(trainable, frozen, batch):
        return loss_of(method.bind(trainable, frozen), jpeft.prompted(batch, method), jpeft.lift(apply))

    @jax.jit
    def step(trainable, state, frozen, batch):
        penalized = lambda *args: loss(*args) + method.penalty(args[0])
        value, grads = jax.value_and_grad(penalized)(trainable, frozen, batch)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = rows_of(train, rng.integers(0, len(train[0]), ROWS))
        trainable, state, value = step(trainable, state, frozen, batch)
        assert np.isfinite(value)
    # The step's own loss on held-out rows, its update thrown away: nothing more to compile.
    after = [float(step(trainable, state, frozen, part)[2]) for part in parts]
    return trainable, frozen, float(np.mean(after)) - float(method.penalty(trainable))


# %%
results = {}
for name, kind in jpeft.methods().items():
    method = kind(**CHANGES.get(name, {}))
    try:
        trainable, frozen, after = fine_tune(method, RATES.get(name, 1e-2))
    except ValueError as refusal:  # this Llama has no biases, and some block sizes do not divide its widths
        print(f"{name:<20} does not fit this model: {str(refusal).splitlines()[0][:90]}")
        continue
    results[name] = sum(x.size for x in jax.tree.leaves(trainable)), after
    print(f"{name:<20} {results[name][0]:>10,} parameters   {before:.3f} -> {after:.3f}", flush=True)

# %%
assert sum(after < before for _, after in results.values()) > 0.8 * len(results)
plt.figure(figsize=(8, 5))
for name, (count, after) in results.items():
    plt.scatter(count, after, s=14, color="tab:blue")
    plt.annotate(name, (count, after), fontsize=7, xytext=(3, 3), textcoords="offset points")
plt.axhline(before, color="gray", linestyle="--", linewidth=1, label="pretrained")
plt.xscale("log")
plt.xlabel("trainable parameters")
plt.ylabel(f"held-out loss after {STEPS} steps")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## A method of your own, in thirty lines
# Scale every input and every output of a matrix: `W' = diag(u) W diag(v)`. A `Weight` says how it takes part in a
# product (`apply`) and what dense matrix it stands for (`dense`). `FIELDS` gives one letter per axis of each field: `i`
# for the merged inputs, `o` for the merged outputs. That is all the library needs to know for stacked layers, for
# `(d, heads, head_dim)` kernels, for a tied head, for sharding.

# %%
from jpeft.core.weight import Weight, dense, from_matrix, matrix_sizes, static, to_matrix, weight
from jpeft.core.weight import apply as use


@weight
class TwoScales(Weight):
    base: Any
    u: Any
    v: Any
    axes: str = static()

    FIELDS = {"u": "i", "v": "o"}
    TRAINABLE = frozenset({"u", "v"})
    SLICEABLE = "io"

    def apply(self, op, x):
        inside, outside = (self.v, self.u) if op.transposed else (self.u, self.v)
        times = lambda s: lambda h: h * op.spread(s).astype(h.dtype)
        return op.map_outputs(use(op, op.map_inputs(x, times(inside)), self.base), times(outside))

    def dense(self):
        matrix = to_matrix(dense(self.base), self.labels) * self.u[..., :, None] * self.v[..., None, :]
        return from_matrix(matrix, self.labels, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class DiagonalScaling(jpeft.Method):
    targets: Any = field(default="all-linear", kw_only=True)

    KINDS = ("dense",)

    def wrap(self, key, leaf, site):
        lead, n_in, n_out = matrix_sizes(site.shape, site.axes)
        ones = lambda n: jnp.ones((*lead, n), jnp.float32)
        return TwoScales(leaf, ones(n_in), ones(n_out), axes=site.axes.lstrip("s"))


# %%
trainable, frozen, after = fine_tune(DiagonalScaling(), 1e-2)
print(f"{sum(x.size for x in jax.tree.leaves(trainable)):,} parameters, held-out loss {before:.3f} -> {after:.3f}")
assert after < before

# %% [markdown]
# ## The laws
# Every method in the library passes one suite, `tests/test_contract.py`: it starts at the pretrained function, the
# lifted model equals the merged one, gradients are those through the merged weights, every base array is in exactly one
# half, transforms commute. The laws are functions of a kind of model and a method, so they test ours too: on Linen
# (scanned or not), NNX, and a plain function with fused kernels, convolutions and experts.

# %%
sys.path.insert(0, "../tests")
import test_contract

LAWS = [
    test_contract.test_it_starts_at_the_pretrained_function,
    test_contract.test_the_lifted_function_equals_the_function_of_the_merged_tree,
    test_contract.test_merging_gives_back_structure_shapes_dtypes_and_shardings,
    test_contract.test_every_base_array_is_in_exactly_one_half,
    test_contract.test_gradients_are_those_through_the_merged_weights,
]
for law in LAWS:
    for kind in test_contract.MODELS:
        law(kind, DiagonalScaling())
    print("holds on", ", ".join(test_contract.MODELS), "-", law.__name__.removeprefix("test_").replace("_", " "))

# %% [markdown]
# And a law is worth something only if it can fail. Here is the same method with a mistake: the dense form forgets `v`.


# %%
@weight
class Mistaken(TwoScales):
    axes: str = static()

    def dense(self):
        matrix = to_matrix(dense(self.base), self.labels) * self.u[..., :, None]
        return from_matrix(matrix, self.labels, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class MistakenScaling(DiagonalScaling):
    def wrap(self, key, leaf, site):
        right = super().wrap(key, leaf, site)
        return Mistaken(right.base, right.u, right.v, axes=right.axes)


try:
    test_contract.test_the_lifted_function_equals_the_function_of_the_merged_tree("nnx", MistakenScaling())
except AssertionError as caught:
    print("caught:", str(caught).strip().splitlines()[0])
else:
    raise SystemExit("the mistake went unseen")

# %% [markdown]
# To keep it, put the two classes into a file of `jpeft/methods/`: it appears in `jpeft.methods()`, in `jpeft train
# --method`, and in the suite, without being named anywhere.

# %%
print(f"{time.time() - started:.0f} s in all")
