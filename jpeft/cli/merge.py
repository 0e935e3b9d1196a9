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
        quantize: compress again what lies on compressed weights, as bitsandbytes writes it, and say what that loses;
            else all is written in full precision.
        overwrite: replace the folder when it exists.
    """

    adapter: str
    out: str
    model: str | None = None
    quantize: bool = False
    overwrite: bool = False


def run(arguments: Sequence[str]) -> None:
    """Write the merged model."""
    config = parse(MergeConfig, arguments, "merge")
    import jpeft

    if Path(config.out).exists() and not config.overwrite:
        raise ValueError(f"{config.out} exists; give another --out, or --overwrite to replace it")
    folder = model.folder_of(config.model)
    apply, params = model.load(folder)
    bound = model.with_adapter(apply, params, config.adapter)[0]
    merged = _requantized(bound) if config.quantize else jpeft.merge(bound)
    jpeft.models.save(config.out, merged, folder, overwrite=config.overwrite)
    print(f"the merged model is in {config.out}")


def _requantized(bound):
    """The merged tree, compressed again, after a table of what that loses."""
    from jpeft.core.tree import leaves_with_paths
    from jpeft.core.weight import Weight
    from jpeft.quant import requantize

    merged, errors = requantize(bound)
    if not any(isinstance(leaf, Weight) for _, leaf in leaves_with_paths(merged)):
        raise ValueError("--quantize compresses again what was compressed, and nothing here was; leave it out")
    width = max(map(len, errors), default=0)
    lines = [f"{path.ljust(width)}  {error:.4f}" for path, error in errors.items()]
    print("\n".join(["relative error of compressing again:", *lines]))
    return merged
