"""`jpeft merge`: a model folder with the adapter in its weights, which loads wherever the base does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jpeft.cli import model
from jpeft.cli.options import parse

__all__ = ["MergeConfig", "run"]


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Merge an adapter into its base.

    Attributes:
        adapter: folder that `jpeft train` or HF PEFT wrote.
        out: folder to write, in Hugging Face format.
        model: folder of the base; the small embedded model when absent.
        overwrite: replace the folder when it exists.
    """

    adapter: str
    out: str
    model: str | None = None
    overwrite: bool = False


def run(arguments: Sequence[str]) -> None:
    """Write the merged model."""
    config = parse(MergeConfig, arguments, "merge")
    import jpeft

    if Path(config.out).exists() and not config.overwrite:
        raise ValueError(f"{config.out} exists; give another --out, or --overwrite to replace it")
    folder = model.folder_of(config.model)
    apply, params = model.load(folder)
    merged = jpeft.merge(model.with_adapter(apply, params, config.adapter)[0])
    jpeft.models.save(config.out, merged, folder, overwrite=config.overwrite)
    print(f"the merged model is in {config.out}")
