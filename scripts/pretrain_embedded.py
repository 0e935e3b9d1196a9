"""Pretrain the model that `jpeft train` uses when it is given none, and write it into the package.

    JAX_PLATFORMS=cpu python scripts/pretrain_embedded.py --out jpeft/assets/docstring-llama

The text is the standard library's docstrings, the modules that validate left out, and the language reference that
`help()` shows. Measured on 2026-11-23 with Python 3.11.7 and JAX 0.10.2, in 46 minutes of two CPU cores that other work
shared:

    parameters                        2,361,024
    training, held-out tokens         606,449, 55,862
    steps of 2,048 tokens             2000
    training loss, last 50 steps      2.77 nats per token
    held-out loss at 400, 800, 1200   4.90, 4.42, 4.24
    held-out loss at the end          4.13, the same after rounding to bfloat16

It has learned the form of documentation, not its content. `def get(key, default=None):` continues with "Called when
the value is a string.", then "def get_key(key, value): Return a list of key-like object." Positions past the 256 tokens
of a training row are allowed by the config and untrained.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro

from jpeft import models
from jpeft.assets.docstrings import documents

END = "<|endoftext|>"  # ends every document; also the padding. There is no beginning-of-text token.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MODEL["max_position_embeddings"],
    "bos_token": None,
    "eos_token": END,
    "pad_token": END,
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    out: pathlib.Path
    """The folder to write."""
    steps: int = 2000
    rows: int = 8
    """Rows of a step."""
    length: int = 256
    """Tokens of a row."""
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    save_every: int = 400


def train_tokenizer(texts):
    """A byte-level BPE: every string has an encoding, and decoding gives it back."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"], special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts):
    """All documents as one sequence of tokens, each closed by END."""
    return np.concatenate([encoding.ids + [0] for encoding in tokenizer.encode_batch(texts)]).astype(np.int32)


def batches(tokens, recipe):
    """Rows of length + 1 tokens; each pass over the text cuts it at another offset and shuffles the rows."""
    random = np.random.default_rng(recipe.seed)
    while True:
        start = random.integers(recipe.length)
        rows = np.arange(start, len(tokens) - recipe.length - 1, recipe.length)
        rows = random.permutation(rows)
        for chosen in rows[: len(rows) // recipe.rows * recipe.rows].reshape(-1, recipe.rows):
            yield tokens[chosen[:, None] + np.arange(recipe.length + 1)]


def heldout_loss(loss, params, tokens, length):
    """Nats per token over the whole sequence, in rows of `length`."""
    count = (len(tokens) - 1) // length
    rows = tokens[: count * length + 1][np.arange(count)[:, None] * length + np.arange(length + 1)]
    return float(np.mean([loss(params, row[None]) for row in rows]))


def continuation(apply, tokenizer, params, prompt, count=60):
    """The most likely next tokens, one after another."""
    tokens = tokenizer.encode(prompt).ids
    forward = jax.jit(apply)
    for position in range(len(tokens), len(tokens) + count):
        row = np.zeros((1, 128), np.int32)  # causal: what stands after a position does not change it
        row[0, :position] = tokens
        tokens.append(int(jnp.argmax(forward(params, row)[0, position - 1])))
        if tokens[-1] == 0:
            break
    return tokenizer.decode(tokens)


def write(recipe, params, tokenizer):
    """The folder in Hugging Face format, weights in bfloat16."""
    models.save(recipe.out, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), MODEL, overwrite=True)
    tokenizer.save(str(recipe.out / "tokenizer.json"))
    (recipe.out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2) + "\n")


def make_optimizer(recipe, params):
    """AdamW on a warm-up and a cosine; the norms' scales do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup, recipe.steps, end_value=recipe.learning_rate / 20
    )
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=decayed),
    )


def main(recipe: Recipe):
    texts, heldout = documents("train"), documents("validation")
    tokenizer = train_tokenizer(texts)
    tokens, heldout_tokens = encode(tokenizer, texts), encode(tokenizer, heldout)
    apply, params = models.init(jax.random.key(recipe.seed), MODEL, param_dtype="float32")
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{total:,} parameters; {len(tokens):,} training and {len(heldout_tokens):,} held-out tokens", flush=True)

    def mean_loss(params, rows):
        logits = apply(params, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    optimizer = make_optimizer(recipe, params)

    @jax.jit
    def step(params, state, rows):
        value, gradients = jax.value_and_grad(mean_loss)(params, rows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    loss, state, begin, recent = jax.jit(mean_loss), optimizer.init(params), time.monotonic(), []
    for index, rows in zip(range(1, recipe.steps + 1), batches(tokens, recipe), strict=False):
        params, state, value = step(params, state, rows)
        recent.append(value)
        if index % 50 == 0:
            print(f"step {index} loss {np.mean(recent):.3f} {time.monotonic() - begin:.0f} s", flush=True)
            recent = []
        if index % recipe.save_every == 0 or index == recipe.steps:
            write(recipe, params, tokenizer)
            print(f"step {index} held-out {heldout_loss(loss, params, heldout_tokens, recipe.length):.3f}", flush=True)

    apply, params = models.load(recipe.out, param_dtype="float32")  # what others will read, rounded to bfloat16
    print(f"written: held-out {heldout_loss(loss, params, heldout_tokens, recipe.length):.3f} nats per token")
    print(continuation(apply, tokenizer, params, "def get(key, default=None):\n    "))


if __name__ == "__main__":
    main(tyro.cli(Recipe))
