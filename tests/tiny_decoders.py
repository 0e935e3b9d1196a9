"""One tiny config of every family, each with the features that set the family apart; random trees for them."""

import jax
import jax.numpy as jnp

from jpeft import models

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama2": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama-linear-biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama3": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5, "rope_theta": 1000.0},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "attention_bias": True},
}
FAMILIES = {name: BASE | config for name, config in FAMILIES.items()}


def random_model(config, **options):
    """`(apply, params)` in which no bias is zero and no scale one."""
    apply, params = models.init(jax.random.key(1), config, **options)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.2 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return apply, jax.tree.map(jnp.add, params, jax.tree.unflatten(treedef, noise))


def tokens(rows=2, length=12):
    return jax.random.randint(jax.random.key(3), (rows, length), 0, BASE["vocab_size"])
