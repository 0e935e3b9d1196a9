"""From a Hugging Face config or folder to `(apply, params)`, and back to a folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import Array

from jpeft.core.weight import Weight
from jpeft.interop import huggingface, quantization_config
from jpeft.models.bert import BertApply, RobertaApply
from jpeft.models.decoder import DecoderApply
from jpeft.models.family import Apply
from jpeft.models.gpt2 import GPT2Apply
from jpeft.models.t5 import T5Apply

__all__ = ["FAMILIES", "abstract", "init", "init_cache", "load", "save"]

FAMILIES: tuple[type[Apply], ...] = (DecoderApply, GPT2Apply, BertApply, RobertaApply, T5Apply)


def read_config(source: dict | str | Path) -> dict[str, Any]:
    """The dictionary in a `config.json`, given as such, as its path, or as the path of the folder that holds it.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not a JSON object.
    """
    if isinstance(source, dict):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"expected a model folder with config.json, or that file, but there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(config).__name__}")
    return config


def _described(source: dict | str | Path, num_labels: int | None) -> tuple[type[Apply], dict[str, Any]]:
    """The family of a config, and the config with the head asked for."""
    given = read_config(source)
    families = {name: family for family in FAMILIES for name in family.MODEL_TYPES}
    name = given.get("model_type")
    if name not in families:
        near = difflib.get_close_matches(str(name), families, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected model_type to be one of {sorted(families)}, got {name!r}{hint}")
    return families[name], families[name].describe(given, num_labels)


def abstract(
    source, *, dtype=None, param_dtype=None, remat: str | None = None, num_labels: int | None = None
) -> tuple[Apply, dict]:
    """`(apply, shapes)` of the model that a config describes, at no cost: 70B parameters take milliseconds.

    Args:
        source: a Hugging Face config as a dictionary, its `config.json`, or the folder that holds it.
        dtype: to compute in; that of the parameters where None.
        param_dtype: of the shapes; the config's where None.
        remat: what the backward pass computes again: None (nothing), "full" (each layer), "dots" (all but the
            products with kernels), "offload" (each layer, whose input waits in the host's memory).
        num_labels: give the model a head that classifies sequences into so many labels, in place of the head that the
            config speaks of; None leaves the head to the config.

    Raises:
        ValueError: everything about the config that this model would have to ignore; labels for a family without such
            a head.
        FileNotFoundError: where there is no such file.
    """
    family, given = _described(source, num_labels)
    apply = family.parse(given, dtype=dtype, param_dtype=param_dtype, remat=remat)
    return apply, apply.shapes()


def init(
    key: Array, source, *, dtype=None, param_dtype=None, remat: str | None = None, num_labels: int | None = None
) -> tuple[Apply, dict]:
    """`(apply, params)` with random parameters, normal with the config's `initializer_range`; else as `abstract`."""
    apply, _ = abstract(source, dtype=dtype, param_dtype=param_dtype, remat=remat, num_labels=num_labels)
    return apply, apply.random(key)


def init_cache(apply: Apply, batch: int, max_length: int, dtype=None) -> Any:
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
    return apply.init_cache(batch, max_length, dtype)


def load(
    path: str | Path,
    *,
    dtype=None,
    param_dtype=None,
    remat: str | None = None,
    shardings=None,
    num_labels: int | None = None,
    key: Array | None = None,
    each: Callable[[str, Any], Any] | None = None,
) -> tuple[Apply, dict]:
    """`(apply, params)` of a Hugging Face folder: `config.json` and one or many safetensors files.

    Each leaf is read straight into its shards; the host holds the model once and one shard besides.

    Kernels that bitsandbytes compressed (NF4, FP4, LLM.int8) stay compressed: packed Weights stand in the tree, as
    `jpeft.NF4` would put them there. Call `jpeft.lift(apply)(params, tokens)`, adapt them by any method, or make them
    dense by `jpeft.merge(params)`. Products with 8-bit weights are in the activations' own dtype, outliers and all.

    Args:
        path: the folder.
        dtype: to compute in; where None that of the parameters, and for products with 4-bit weights the config's
            `bnb_4bit_compute_dtype`.
        param_dtype: of the dense parameters; each as stored where None.
        remat: as in `abstract`.
        shardings: one `jax.sharding.Sharding` for all leaves, or a tree of them shaped like the parameters (as
            `abstract` gives them); the first device where None.
        num_labels: as in `abstract`. What of the head the folder has for so many labels is read, the rest is drawn.
        key: to draw it from.
        each: `(path, leaf) -> what stands in the tree`, called as soon as a leaf is read, which is then let go: by
            `jpeft.quant.compressing` the dense model is never there as a whole.

    Raises:
        FileNotFoundError: where the folder, its config or one of its files is absent.
        ValueError: on a config that the model would not honour, a truncated file, or tensors that are missing, left
            over, of another shape, or compressed and contradicting what is said of them, all together; scales that are
            not finite; where a head is to be drawn and there is no key.
    """
    folder = huggingface.folder(path)
    apply, shapes = abstract(folder, dtype=dtype, param_dtype=param_dtype, remat=remat, num_labels=num_labels)
    quantization = read_config(folder).get("quantization_config")
    params = huggingface.read(
        folder,
        apply.TENSORS,
        shapes,
        ignored=apply.ignored,
        renamed=apply.RENAMED,
        optional=() if num_labels is None else apply.HEAD,
        dtype=param_dtype,
        shardings=shardings,
        quantization=quantization,
        compute_dtype=quantization_config.compute_dtype(quantization) if dtype is None else None,
        leaf_dtype=apply.config.param_dtype,
        each=each,
    )
    return apply, _with_drawn(apply, params, key, shardings)


def _with_drawn(apply: Apply, params: dict, key: Array | None, shardings) -> dict:
    """The parameters, with random arrays where the folder had none and a shape stands."""
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Weight))
    new = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if not new:
        return params
    if key is None:
        raise ValueError("the folder has no head for these labels: pass key=jax.random.key(seed), to draw one from")
    one = shardings is None or isinstance(shardings, jax.sharding.Sharding)
    places = [shardings] * len(leaves) if one else jax.tree.leaves(shardings)

    def draw(key):
        random = jax.tree.leaves(apply.random(key))
        return [random[k].astype(leaves[k].dtype) for k in new]

    for k, array in zip(new, jax.jit(draw, out_shardings=[places[k] for k in new])(key), strict=True):
        leaves[k] = array
    return jax.tree.unflatten(structure, leaves)


def save(
    path: str | Path,
    params,
    source: dict | str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    num_labels: int | None = None,
) -> None:
    """Write a folder that `transformers` loads: config, safetensors, and the source folder's tokenizer.

    The folder appears complete or not at all.

    Args:
        path: the folder to write.
        params: the dense parameters; merge adapters before.
        source: the folder that the model came from (its tokenizer files come along), or a config as a dictionary.
        overwrite: whether an existing folder may be replaced.
        max_shard_bytes: the largest file to write, one tensor at least.
        num_labels: as the model was made with.

    Raises:
        FileExistsError: where the folder exists and `overwrite` is false.
        ValueError: where params are not those that the config describes, all differences together.
    """
    apply, shapes = abstract(source, num_labels=num_labels)
    huggingface.write(
        path,
        apply.TENSORS,
        params,
        shapes,
        config=_described(source, num_labels)[1],
        tokenizer_from=None if isinstance(source, dict) else Path(source),
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )
