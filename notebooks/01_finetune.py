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
# # From a pretrained tree to a merged model
#
# A PEFT method in jpeft is a pure transform of a parameter tree. It splits the tree into a *trainable* and a *frozen*
# half; binding the halves gives a tree in which some leaves are structured weights; and `lift` runs the **unmodified**
# model on that tree. Everything else is the JAX that you already write: `grad`, `jit`, optax.
#
# We take a small pretrained Llama that comes with the package (2.4 million parameters, trained on docstrings of the
# Python standard library) and teach it a task it has not seen: from a function's signature to its one-line summary.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tokenizers import Tokenizer

import jpeft
from jpeft import assets, models

started = time.time()
print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## A pretrained tree
# `models.load` reads a Hugging Face folder: `params` is a plain dictionary of arrays, `apply(params, tokens)` a pure
# function. Your own Flax model comes through `jpeft.from_linen(module)` or `jpeft.from_nnx(model)`.

# %%
apply, params = models.load(assets.model_path(), param_dtype="float32")
tokenizer = Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
END = tokenizer.token_to_id("<|endoftext|>")

# %% [markdown]
# ## What can be adapted
# `find_sites` traces the function once, abstractly, and reports every use of every parameter: which axes are contracted
# (`i`), which are outputs (`o`), which are stacks of scanned layers (`s`). No name is guessed.

# %%
sites = jpeft.find_sites(apply, params, jnp.zeros((1, 64), jnp.int32))
print(sites)

# %% [markdown]
# ## The task
# Signatures and summaries of standard-library functions, split by module: no module is in both halves. The loss counts
# the summary's tokens only.


# %%
def encode(examples, length=64):
    """Token rows [n, length] and a mask of the completion's tokens."""
    tokens, mask = np.zeros((len(examples), length), np.int32), np.zeros((len(examples), length), bool)
    for row, example in enumerate(examples):
        prompt = tokenizer.encode(example["prompt"]).ids
        full = (prompt + tokenizer.encode(example["completion"]).ids + [END])[:length]
        tokens[row, : len(full)] = full
        mask[row, len(prompt) : len(full)] = True
    return jnp.asarray(tokens), jnp.asarray(mask)


train = encode(assets.summaries("train"))
heldout = encode(assets.summaries("validation")[:128])
print(assets.summaries("train")[7])

# %% [markdown]
# ## The loop
# Ten lines. `method.init` splits, `method.bind` joins, `jpeft.lift(apply)` runs the model that knows nothing of LoRA.

# %%
method = jpeft.LoRA(rank=16, alpha=32, targets="all-linear")
trainable, frozen = method.init(jax.random.key(0), params, sites)
print(jpeft.count(method.bind(trainable, frozen)))


def loss(trainable, frozen, tokens, mask):
    logits = jpeft.lift(apply)(method.bind(trainable, frozen), tokens)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(each * mask[:, 1:]) / jnp.sum(mask[:, 1:])


optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 10, 120))


@jax.jit
def step(trainable, state, tokens, mask):
    value, grads = jax.value_and_grad(loss)(trainable, frozen, tokens, mask)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value


evaluate = jax.jit(loss)
before = float(evaluate(trainable, frozen, *heldout))
untrained = trainable

# %%
state, losses, rng = optimizer.init(trainable), [], np.random.default_rng(0)
for _ in range(120):
    rows = rng.integers(0, len(train[0]), 16)
    trainable, state, value = step(trainable, state, train[0][rows], train[1][rows])
    losses.append(float(value))
after = float(evaluate(trainable, frozen, *heldout))
print(f"held-out loss {before:.2f} -> {after:.2f}")
assert after < before - 0.3

# %%
plt.figure(figsize=(6, 3))
plt.plot(losses, label="training batch")
plt.axhline(before, color="gray", linestyle="--", label="held out, before")
plt.axhline(after, color="black", label="held out, after")
plt.xlabel("step")
plt.ylabel("loss per summary token")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Merge
# `merge` gives a dense tree of the original structure: the model runs at its original speed, and the logits are those
# of the lifted model to rounding.

# %%
merged = jpeft.merge(method.bind(trainable, frozen))
assert jax.tree.structure(merged) == jax.tree.structure(params)
lifted_logits = jpeft.lift(apply)(method.bind(trainable, frozen), heldout[0][:4])
print("largest difference:", float(jnp.abs(apply(merged, heldout[0][:4]) - lifted_logits).max()))

# %% [markdown]
# ## Before and after


# %%
@jax.jit
def next_token(params, tokens, position):
    return jnp.argmax(apply(params, tokens)[0, position])


def complete(params, prompt, length=64):
    ids = tokenizer.encode(prompt).ids
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    for position in range(len(ids), length):
        row[0, position] = token = int(next_token(params, row, position - 1))
        if token == END:
            break
    return tokenizer.decode(row[0, len(ids) : position].tolist()).strip()


for example in assets.summaries("validation")[10:40:10]:
    print(example["prompt"].splitlines()[0])
    print("  written by people:", example["completion"])
    print("  before:           ", complete(params, example["prompt"])[:90].replace("\n", " "))
    print("  after:            ", complete(merged, example["prompt"])[:90].replace("\n", " "))

print(f"{time.time() - started:.0f} s in all")
