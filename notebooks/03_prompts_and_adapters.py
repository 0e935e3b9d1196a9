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
# # Prompts, prefixes and adapters on an unmodified model
#
# Half of the field does not change weights: it puts small layers after a sublayer, trained rows before the input, or
# trained keys and values into attention. Other libraries rewrite the model for that. Here the model stays what it is: a
# pure function of a parameter tree. An adapter hangs on the sublayer's bias or kernel, a prompt on the embedding, and
# what acts on attention finds the model's calls of `jpeft.attention`.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from tokenizers import Tokenizer

import jpeft
from jpeft import assets, models
from jpeft.train.generation import generate

started = time.time()
LENGTH, ROWS, STEPS = 32, 8, 24
apply, params = models.load(assets.model_path(), param_dtype="float32")
tokenizer = Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
sites = jpeft.find_sites(apply, params, jnp.zeros((1, LENGTH), jnp.int32))
print(sites)

# %% [markdown]
# The row of kind `attention` is the model's call of `jpeft.attention`, listed at the kernel that makes its queries.
#
# ## Batches with virtual tokens
# A virtual token is an id from `jpeft.VIRTUAL` on. `jpeft.prompted` puts them into a batch: packed rows get a prompt in
# every segment, nothing is learned at a virtual token, positions count on. A prefix adds no token, only positions.

# %%
batch = {
    "tokens": jnp.array([[5, 6, 7, 8, 9, 0]]),
    "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]]),
    "positions": jnp.array([[0, 1, 2, 0, 1, 0]]),
    "weights": jnp.array([[0.0, 1, 1, 0, 1, 0]]),
}
print("virtual ids shown as -1, -2, ...")
for name, array in jpeft.prompted(batch, jpeft.PromptTuning(num_tokens=2)).items():
    print(f"{name:<12}", np.where(array >= jpeft.VIRTUAL, jpeft.VIRTUAL - array - 1, array)[0])
print("a prefix:   ", jpeft.prompted(batch, jpeft.PrefixTuning(num_tokens=2))["positions"][0])

# %% [markdown]
# ## The task, and one loop for all
# From a function's signature to its one-line summary, on the small Llama that comes with the package.


# %%
def encode(examples):
    tokens, weights = np.zeros((len(examples), LENGTH), np.int32), np.zeros((len(examples), LENGTH), np.float32)
    for row, example in enumerate(examples):
        prompt = tokenizer.encode(example["prompt"]).ids
        full = (prompt + tokenizer.encode(example["completion"]).ids)[:LENGTH]
        tokens[row, : len(full)] = full
        weights[row, len(prompt) : len(full)] = 1
    return tokens, weights


train, heldout = encode(assets.summaries("train")), encode(assets.summaries("validation")[:32])
rows_of = lambda part, rows: {"tokens": part[0][rows], "weights": part[1][rows]}


def loss_of(fn, params, batch):
    logits = fn(params, batch["tokens"], positions=batch.get("positions"))
    learned = batch["weights"][:, 1:]
    targets = jnp.where(learned > 0, batch["tokens"][:, 1:], 0)  # what is not learned may be virtual
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    return jnp.sum(each * learned) / jnp.maximum(jnp.sum(learned), 1)


def fine_tune(method, rate, steps=STEPS):
    """The two halves, the training losses, and the held-out loss before and after."""
    trainable, frozen = method.init(jax.random.key(0), params, sites)
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, 4, steps))
    state = tx.init(trainable)

    def loss(trainable, frozen, batch):
        return loss_of(jpeft.lift(apply), method.bind(trainable, frozen), jpeft.prompted(batch, method))

    evaluate = jax.jit(loss)

    @jax.jit
    def step(trainable, state, frozen, batch):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    held = lambda trainable: float(evaluate(trainable, frozen, rows_of(heldout, np.s_[:])))
    rng, losses, before = np.random.default_rng(0), [], held(trainable)
    for _ in range(steps):
        batch = rows_of(train, rng.integers(0, len(train[0]), ROWS))
        trainable, state, value = step(trainable, state, frozen, batch)
        losses.append(float(value))
    return trainable, frozen, losses, (before, held(trainable))


base_loss = float(jax.jit(lambda p: loss_of(apply, p, rows_of(heldout, np.s_[:])))(params))
print(f"held-out loss of the pretrained model: {base_loss:.3f}")

# %%
words = tuple(tokenizer.encode("Summarize what this function does:").ids)
ARMS = {
    "prompt, random": (jpeft.PromptTuning(num_tokens=len(words)), 1e-1),
    "prompt, from words": (
        jpeft.PromptTuning(num_tokens=len(words), init_prompt="text", init_text_ids=words),
        1e-1,
    ),
    "P-tuning, MLP": (jpeft.PTuning(num_tokens=len(words), encoder="mlp"), 1e-2),
    "prefix, through an MLP": (jpeft.PrefixTuning(num_tokens=8, encoder_hidden_size=64), 1e-2),
    "LLaMA-Adapter": (jpeft.LLaMAAdapter(num_tokens=8, num_layers=3), 3e-2),
    "Houlsby": (jpeft.Houlsby(bottleneck=16), 3e-3),
}
results = {}
for name, (method, rate) in ARMS.items():
    results[name] = (method, *fine_tune(method, rate))
    count = sum(x.size for x in jax.tree.leaves(results[name][1]))
    start, end = results[name][-1]
    print(f"{name:<24}{count:>9,} parameters   start {start:.3f}   after {STEPS} steps {end:.3f}", flush=True)

# %%
plt.figure(figsize=(8, 4))
for name, (_, _, _, losses, _) in results.items():
    plt.plot(losses, label=name)
plt.axhline(base_loss, color="gray", linestyle="--", linewidth=1, label="pretrained, held out")
plt.xlabel("step")
plt.ylabel("training loss")
plt.legend(fontsize=8)
plt.tight_layout()
plt.show()
assert all(end < base_loss for *_, (_, end) in results.values())

# %% [markdown]
# ## Stable from the first step
# LLaMA-Adapter's gate starts at zero, so its first step sees the pretrained function to the bit; a random prefix takes
# part of every softmax at once, and starts above the pretrained loss.

# %%
random_prefix, held = jpeft.PTuningV2(num_tokens=8), rows_of(heldout, np.s_[:])
bound = random_prefix.bind(*random_prefix.init(jax.random.key(0), params, sites))
prefix_start = float(loss_of(jpeft.lift(apply), bound, jpeft.prompted(held, random_prefix)))
adapter_start = results["LLaMA-Adapter"][-1][0]
print(f"pretrained {base_loss:.4f}   zero-initialised gate {adapter_start:.4f}   random prefix {prefix_start:.4f}")
assert abs(adapter_start - base_loss) < 1e-5 < prefix_start - base_loss

# %% [markdown]
# ## What made the prompt is thrown away
# P-tuning's encoder and prefix tuning's MLP exist while they train. `after_training` leaves what they make.

# %%
for name in ("P-tuning, MLP", "prefix, through an MLP"):
    method, trainable, frozen, _, (_, end) = results[name]
    kept, small, rest = method.after_training(trainable, frozen)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    bound = kept.bind(small, rest)
    again = float(loss_of(jpeft.lift(apply), bound, jpeft.prompted(held, kept)))
    print(f"{name:<24}{size(trainable):>9,} -> {size(small):>6,} parameters, loss {end:.4f} -> {again:.4f}")
    assert abs(end - again) < 1e-4

# %% [markdown]
# ## Generating with a cache
# Virtual tokens are simply the first tokens of the text, and a prefix is not in the cache at all: each call merges it
# anew by log-sum-exp. So generation with a cache is generation without one, token for token.

# %%
question = tokenizer.encode(assets.summaries("validation")[0]["prompt"]).ids
new_cache = lambda rows, length: models.init_cache(apply, rows, length)


def slowly(method, bound, ids, new):
    """Greedy, the whole text anew for each token."""
    for _ in range(new):
        batch = jpeft.prompted({"tokens": jnp.asarray([ids])}, method)
        logits = jpeft.lift(apply)(bound, batch["tokens"], positions=batch.get("positions"))
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[-new:]


for name in ("prompt, from words", "prefix, through an MLP", "LLaMA-Adapter"):
    method, trainable, frozen, *_ = results[name]
    bound = method.bind(trainable, frozen)
    prompt = [jpeft.VIRTUAL + j for j in range(method.prompt_length)] + question
    options = dict(new_tokens=4, stops=(), context=128, first_position=method.position_shift)
    (cached,) = generate(apply, bound, [prompt], new_cache, **options)
    assert cached == slowly(method, bound, question, 4)
    print(f"{name:<24}{tokenizer.decode(cached)!r}")

# %% [markdown]
# ## Chains, and a model of your own
# Everything composes: here a prefix over 4-bit weights. And a Linen model needs one argument, `attention_fn`.

# %%
both = jpeft.chain(jpeft.NF4(), jpeft.PrefixTuning(num_tokens=4, encoder_hidden_size=16))
trainable, frozen = both.init(jax.random.key(0), params, sites)
value, grads = jax.jit(
    jax.value_and_grad(
        lambda t, f: loss_of(jpeft.lift(apply), both.bind(t, f), jpeft.prompted(rows_of(heldout, np.s_[:ROWS]), both))
    )
)(trainable, frozen)
print(f"a prefix over NF4 weights: loss {value:.3f}, {len(jax.tree.leaves(grads))} gradients")


class Own(nn.Module):
    marked: bool

    @nn.compact
    def __call__(self, x):
        how = {"attention_fn": jpeft.attention} if self.marked else {}
        return x + nn.MultiHeadDotProductAttention(2, **how)(x)


x = jnp.ones((2, 5, 8))
for marked in (False, True):
    own, variables = jpeft.from_linen(Own(marked))[0], Own(marked).init(jax.random.key(0), x)["params"]
    own_sites = jpeft.find_sites(own, variables, x)
    try:
        halves = jpeft.PTuningV2(num_tokens=3).init(jax.random.key(0), variables, own_sites)
        print("marked:", jpeft.lift(own)(jpeft.PTuningV2(num_tokens=3).bind(*halves), x).shape)
    except ValueError as refusal:
        print(f"not marked: {refusal}\n")

# %%
print(f"{time.time() - started:.0f} s")
