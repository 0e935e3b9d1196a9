"""Small models of every kind that the laws are tested on, made once a session."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jpeft

VOCABULARY, WIDTH, HEADS, FEED_FORWARD, LAYERS = 37, 24, 2, 40, 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        attention = nn.MultiHeadDotProductAttention(HEADS, attention_fn=jpeft.attention, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x))
        h = nn.gelu(nn.Dense(FEED_FORWARD, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


class LinenModel(nn.Module):
    scanned: bool
    axis: int = 0

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        if self.scanned:
            stack = nn.scan(
                nn.remat(Block),
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for n in range(LAYERS):
                x, _ = Block(name=f"layer_{n}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, attention_fn=jpeft.attention, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, FEED_FORWARD, rngs=rngs)
        self.down = nnx.Linear(FEED_FORWARD, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.silu(self.up(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.vmap(NNXBlock)(rngs.split(LAYERS))
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.head(run(self.embed(tokens), self.layers))


def plain_function(params, tokens):
    """A function of a dict: fused projections, grouped heads, a convolution, experts, `[out, in]` storage, a loop."""
    x = params["embed"][tokens]
    window = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )
    x = x + jnp.tanh(window)
    for n in range(LAYERS):
        q, k, v = jnp.einsum("btd,cdkh->cbtkh", x, params["fused"][n])
        mixed = jpeft.attention(q, k, v, scale=1.0)
        x = x + jnp.einsum("btkh,khd->btd", mixed, params["out"][n])
    q, k, v = (x @ params[name] for name in ("query", "key", "value"))
    heads = lambda y: y.reshape(*y.shape[:-1], -1, WIDTH)
    mixed = jpeft.attention(heads(q), heads(k), heads(v), is_causal=True)
    x = x + mixed.reshape(*x.shape[:-1], -1) @ params["back"]
    rows = x.reshape(2, -1, WIDTH)  # half of the tokens to each expert
    rows = rows + jnp.einsum(
        "ebf,efd->ebd", jnp.tanh(jnp.einsum("ebd,edf->ebf", rows, params["gate"])), params["expert"]
    )
    return rows.reshape(x.shape) @ params["torch_head"].T * params["scale"] + params["bias"]


def _plain_params(key):
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "conv": (3, WIDTH // 2, WIDTH),
        "fused": (LAYERS, 3, WIDTH, HEADS, 12),
        "out": (LAYERS, HEADS, 12, WIDTH),
        "query": (WIDTH, HEADS * WIDTH),
        "key": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "back": (HEADS * WIDTH, WIDTH),
        "gate": (2, WIDTH, FEED_FORWARD),
        "expert": (2, FEED_FORWARD, WIDTH),
        "torch_head": (19, WIDTH),
        "scale": (19,),
        "bias": (19,),
    }
    return {n: 0.2 * jax.random.normal(jax.random.fold_in(key, k), s) for k, (n, s) in enumerate(shapes.items())}


@dataclass(frozen=True)
class Model:
    """A model as the library sees one."""

    apply: Any
    params: Any
    inputs: tuple
    sites: jpeft.Sites


@functools.cache
def make_model(kind: str) -> Model:
    """The model of a kind; its vectors (biases, scales) are made random so that nothing hides behind a zero."""
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (2, 7), 0, VOCABULARY)
    if kind.startswith("linen"):
        module = LinenModel(scanned=kind != "linen-unrolled", axis=1 if kind == "linen-scanned-axis-1" else 0)
        params = jax.jit(module.init)(key, tokens)["params"]
        apply, _ = jpeft.from_linen(module)
    elif kind == "nnx":
        apply, params = jpeft.from_nnx(nnx.jit(lambda: NNXModel(nnx.Rngs(0)))())
    else:
        apply, params = plain_function, _plain_params(key)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + np.asarray(0.1 * noise.normal(size=x.shape), x.dtype), params)
    return Model(apply, params, (tokens,), jpeft.find_sites(apply, params, tokens))


MODELS = ("linen-scanned", "linen-scanned-axis-1", "linen-unrolled", "nnx", "plain")
