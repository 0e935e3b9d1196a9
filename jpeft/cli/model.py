"""What the commands share: the model of a folder, its tokenizer, its sites, its adapter."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "folder_of",
    "load",
    "load_language_model",
    "load_to_train",
    "sites_of",
    "with_adapter",
    "adapter_of",
    "complete",
    "matched",
]


def folder_of(model: str | None) -> Path:
    """The model folder, the embedded one when none is given."""
    from jpeft import assets

    return Path(model) if model else Path(assets.model_path())


def load(folder: Path, dtype: str = "auto", remat: str = "none", mesh: str | None = None, each=None) -> tuple[Any, Any]:
    """`(apply, params)` of a folder, computing in `dtype`; "auto" is float32 on a CPU and bfloat16 elsewhere.

    `remat` and `mesh` as `TrainConfig` has them; on a mesh each dense array is read straight into its shards. `each` as
    in `models.load`.
    """
    import jax

    from jpeft import models

    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options: dict[str, Any] = {"dtype": dtype, "remat": None if remat == "none" else remat}
    if mesh is None or _is_compressed(folder):
        return models.load(folder, **options, each=each)
    from jpeft.parallel import make_mesh, shard_params

    apply, shapes = models.abstract(folder, **options)
    shardings = shard_params(make_mesh(mesh), shapes, sites_of(apply, shapes))
    return models.load(folder, **options, shardings=shardings, each=each)


def load_to_train(folder: Path, method, dtype: str, remat: str, mesh: str | None) -> tuple[Any, Any, Any]:
    """`(apply, params, fingerprint)` for a method; what it compresses is compressed as it is read.

    `load` says the rest; the fingerprint is that of the folder's own parameters.

    Raises:
        ValueError: a model that does not go on with its text token by token.
    """
    import jax

    from jpeft import models
    from jpeft.core.tree import path_string
    from jpeft.quant import compressing
    from jpeft.train.adapter import fingerprint, fingerprint_of, sampled

    _check_goes_on(folder)
    apply, shapes = models.abstract(folder)
    compress = None if _is_compressed(folder) else compressing(method, sites_of(apply, shapes))
    if compress is None:
        apply, params = load(folder, dtype, remat, mesh)
        return apply, params, fingerprint(params)
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    samples: dict[str, Any] = {}
    with _bar("compressing", len(paths)) as advance:

        def each(path, leaf):
            samples[path] = sampled(leaf)
            found = jax.block_until_ready(compress(path, leaf))
            advance()
            return found

        apply, params = load(folder, dtype, remat, mesh, each)
    return apply, params, fingerprint_of({path: samples[path] for path in paths})


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """`advance()`, once for each of `total` arrays; a bar on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def load_language_model(folder: Path, dtype: str = "auto", remat: str = "none") -> tuple[Any, Any]:
    """As `load`.

    Raises:
        ValueError: a model that does not go on with its text token by token.
    """
    _check_goes_on(folder)
    return load(folder, dtype, remat)


def _check_goes_on(folder: Path) -> None:
    from jpeft import models

    apply, _ = models.abstract(folder)
    if apply.task != "CAUSAL_LM":
        raise ValueError(
            f"expected a decoder-only language model in {folder}, got {apply.config.model_type!r}: jpeft.models loads "
            "it, and a loop around jpeft.lift trains it"
        )


def _is_compressed(folder: Path) -> bool:
    from jpeft.models.apply import read_config

    return "quantization_config" in read_config(folder)


def sites_of(apply, params, length: int = 8):
    """The sites of the model, found on shapes."""
    import jpeft

    return jpeft.find_sites(apply, params, *apply.inputs(length))


def with_adapter(apply, params, adapter: str | None) -> tuple[Any, Any]:
    """`(tree, method)` to run: the base's and None, or with the adapter bound."""
    if adapter is None:
        return params, None
    method, trainable, frozen = adapter_of(apply, params, adapter)
    return method.bind(trainable, frozen), method


def adapter_of(apply, params, adapter: str) -> tuple[Any, Any, Any]:
    """`(method, trainable, frozen)` of a folder that `jpeft train` or HF PEFT wrote."""
    import jpeft
    from jpeft.interop import peft
    from jpeft.quant import quantizers
    from jpeft.train.adapter import load_adapter

    path, sites = Path(adapter), sites_of(apply, params)
    if (path / "adapter_config.json").is_file():
        return peft.load(path, params, sites)
    path = path / "adapter" if (path / "adapter" / "method.json").is_file() else path  # a run's folder will do
    return load_adapter(path, params, sites, {**jpeft.methods(), **quantizers()})


def complete(apply, bound, text, prompts: list[list[int]], method=None, tasks=None, **options) -> list[str]:
    """The texts that follow prompts of token ids; options as `generation.generate` has them.

    `method` is the one that the tree was bound with: its virtual tokens stand before every prompt, those of its task.
    """
    import numpy as np

    from jpeft import models
    from jpeft.train.generation import generate
    from jpeft.train.tokens import Example, with_prompt

    if method is not None:
        tasks = [0] * len(prompts) if tasks is None else tasks
        examples = [
            Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), task=task)
            for ids, task in zip(prompts, tasks, strict=True)
        ]
        prompts = [with_prompt(example, method).ids.tolist() for example in examples]
        options["first_position"] = method.position_shift
    context = apply.config.max_position_embeddings
    ids = generate(
        apply, bound, prompts, functools.partial(models.init_cache, apply), stops=text.stops, context=context, **options
    )
    return [text.decode(row) for row in ids]


def matched(method, params, sites, calibration=None) -> tuple[str, int, int]:
    """`(table, trainable, total)`: what the method matches and how many parameters it trains."""
    import jax

    import jpeft

    trainable, frozen = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites, calibration or None), params)
    count = jpeft.count(method.bind(trainable, frozen))
    return str(count), count.trainable, count.total
