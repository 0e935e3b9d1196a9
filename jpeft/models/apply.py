"""From a Hugging Face config or folder to `(apply, params)`, and back to a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jpeft.interop import huggingface
from jpeft.models import decoder
from jpeft.models.config import DecoderConfig, parse_config, read_config

__all__ = ["Apply", "abstract", "init", "init_cache", "load", "save"]


@dataclass(frozen=True)
class Apply:
    """The pure function of a decoder: `apply(params, tokens) -> logits`. It compares and hashes by its config.

    Tokens are `(batch, length)` integers and logits `(batch, length, vocabulary)` in float32. Packed batches give
    `segment_ids (batch, length)`: a token sees the earlier ones of its own segment, 0 is padding. `positions` default
    to the places within segments. With a `cache` (see `init_cache`) a call appends its tokens and returns `(logits,
    cache)`; each row is then one sequence and `segment_ids` only marks padding, on either side.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24,
    ...               num_hidden_layers=2, num_attention_heads=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config)
    >>> apply(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 32)
    """

    config: DecoderConfig

    def __call__(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        """Logits, or `(logits, cache)` where a cache is given.

        Raises:
            ValueError: where tokens, segment_ids, positions and cache do not fit together.
        """
        result = self.hidden(params, tokens, positions=positions, segment_ids=segment_ids, cache=cache)
        if cache is None:
            return self.logits_from_hidden(params, result)
        return self.logits_from_hidden(params, result[0]), result[1]

    def hidden(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        """The final hidden states `(batch, length, features)`, normalised; `(hidden, cache)` where a cache is given."""
        _check_inputs(tokens, positions, segment_ids, cache)
        hidden, cache_after = _hidden(self.config, params, tokens, positions, segment_ids, cache)
        return hidden if cache is None else (hidden, cache_after)

    def logits_from_hidden(self, params, hidden) -> Array:
        """The vocabulary head on hidden states `(..., features)`, so that a loss can go through them in chunks."""
        return _logits(self.config, params, hidden)


@partial(jax.jit, static_argnums=0)
def _hidden(config, params, tokens, positions, segment_ids, cache):
    return nnx.merge(_structure(config)[0], params).hidden(tokens, positions, segment_ids, cache)


@partial(jax.jit, static_argnums=0)
def _logits(config, params, hidden):
    return nnx.merge(_structure(config)[0], params).logits(hidden)


@lru_cache(maxsize=32)
def _structure(config: DecoderConfig) -> tuple[Any, dict]:
    """The graph of the NNX model and the shapes of its parameters; nothing is computed."""
    graph, state = nnx.split(nnx.eval_shape(lambda: decoder.Decoder(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def _check_inputs(tokens, positions, segment_ids, cache):
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"expected tokens as integers (batch, length), got {tokens.dtype}{list(tokens.shape)}")
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"expected {name} of the tokens' shape {tokens.shape}, got {array.shape}")
    if cache is not None and (
        cache.segment_ids.shape[0] != len(tokens) or cache.segment_ids.shape[1] < tokens.shape[1]
    ):
        rows, slots = cache.segment_ids.shape
        raise ValueError(
            f"expected a cache for {tokens.shape[0]} rows of {tokens.shape[1]} tokens or more, got one for {rows} rows "
            f"of {slots}; make it with init_cache(apply, batch, max_length)"
        )


def abstract(source, *, dtype=None, param_dtype=None, remat: str | None = None) -> tuple[Apply, dict]:
    """`(apply, shapes)` of the model that a config describes, at no cost: 70B parameters take milliseconds.

    Args:
        source: a Hugging Face config as a dictionary, its `config.json`, or the folder that holds it.
        dtype: to compute in; that of the parameters where None.
        param_dtype: of the shapes; the config's where None.
        remat: what the backward pass computes again: None (nothing), "full" (each layer), "dots" (all but the
            products with kernels).

    Raises:
        ValueError: everything about the config that this model would have to ignore.
        FileNotFoundError: where there is no such file.
    """
    apply = Apply(parse_config(source, dtype=dtype, param_dtype=param_dtype, remat=remat))
    return apply, jax.tree.map(lambda shape: shape, _structure(apply.config)[1])


def init(key: Array, source, *, dtype=None, param_dtype=None, remat: str | None = None) -> tuple[Apply, dict]:
    """`(apply, params)` with random parameters, normal with the config's `initializer_range`; else as `abstract`."""
    apply, _ = abstract(source, dtype=dtype, param_dtype=param_dtype, remat=remat)
    return apply, _random(apply.config, key)


@partial(jax.jit, static_argnums=0)
def _random(config, key):
    return nnx.to_pure_dict(nnx.split(decoder.Decoder(config, nnx.Rngs(key)), nnx.Param, ...)[1])


def init_cache(apply: Apply, batch: int, max_length: int, dtype=None) -> decoder.Cache:
    """An empty cache for `batch` rows of at most `max_length` tokens, padding counted.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24,
    ...               num_hidden_layers=2, num_attention_heads=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config)
    >>> cache = jpeft.models.init_cache(apply, batch=1, max_length=8)
    >>> logits, cache = apply(params, jnp.array([[1, 2, 3]]), cache=cache)
    >>> logits, cache = apply(params, logits[:, -1:].argmax(-1), cache=cache)
    >>> logits.shape, int(cache.index)
    ((1, 1, 32), 4)
    """
    return decoder.Cache.empty(apply.config, batch, max_length, dtype)


def _ignored(config: DecoderConfig) -> tuple[str, ...]:
    return decoder.HF_IGNORED + (decoder.HF_IGNORED_IF_TIED if config.tie_word_embeddings else ())


def load(
    path: str | Path, *, dtype=None, param_dtype=None, remat: str | None = None, shardings=None
) -> tuple[Apply, dict]:
    """`(apply, params)` of a Hugging Face folder: `config.json` and one or many safetensors files.

    Each leaf is read straight into its shards; the host holds the model once and one shard besides.

    Args:
        path: the folder.
        dtype: to compute in; that of the parameters where None.
        param_dtype: of the parameters; each as stored where None.
        remat: as in `abstract`.
        shardings: one `jax.sharding.Sharding` for all leaves, or a tree of them shaped like the parameters (as
            `abstract` gives them); the first device where None.

    Raises:
        FileNotFoundError: where the folder, its config or one of its files is absent.
        ValueError: on a config that the model would not honour, a truncated file, or tensors that are missing, left
            over or of another shape, all together.
    """
    apply, shapes = abstract(huggingface.folder(path), dtype=dtype, param_dtype=param_dtype, remat=remat)
    params = huggingface.read(
        path,
        decoder.HF_TENSORS,
        shapes,
        ignored=_ignored(apply.config),
        dtype=param_dtype,
        shardings=shardings,
    )
    return apply, params


def save(
    path: str | Path, params, source: dict | str | Path, *, overwrite: bool = False, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a folder that `transformers` loads: config, safetensors, and the source folder's tokenizer.

    The folder appears complete or not at all.

    Args:
        path: the folder to write.
        params: the dense parameters; merge adapters before.
        source: the folder that the model came from (its tokenizer files come along), or a config as a dictionary.
        overwrite: whether an existing folder may be replaced.
        max_shard_bytes: the largest file to write, one tensor at least.

    Raises:
        FileExistsError: where the folder exists and `overwrite` is false.
        ValueError: where params are not those that the config describes, all differences together.
    """
    apply, shapes = abstract(source)
    huggingface.write(
        path,
        decoder.HF_TENSORS,
        params,
        shapes,
        config=read_config(source),
        tokenizer_from=None if isinstance(source, dict) else Path(source),
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )
