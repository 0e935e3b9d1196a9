"""`jpeft export`: an adapter folder that HF PEFT loads, and whatever reads its folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jpeft.cli import model
from jpeft.cli.options import parse

__all__ = ["ExportConfig", "run"]


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write an adapter as HF PEFT does.

    Attributes:
        adapter: folder that `jpeft train` wrote.
        out: folder to write.
        model: folder of the base; the small embedded model when absent.
        base: the base's name, as the folder's readers know it; the model's folder when absent.
        overwrite: replace the folder when it exists.
    """

    adapter: str
    out: str
    model: str | None = None
    base: str | None = None
    overwrite: bool = False


def run(arguments: Sequence[str]) -> None:
    """Write the folder."""
    config = parse(ExportConfig, arguments, "export")
    from jpeft.interop import peft

    folder = model.folder_of(config.model)
    apply, params = model.load(folder)
    method, trainable, frozen = model.adapter_of(apply, params, config.adapter)
    sites, base = model.sites_of(apply, params), config.base or folder
    torch = dict(names=apply.names, task_type=apply.task)
    peft.save(config.out, method, trainable, base, frozen, sites=sites, overwrite=config.overwrite, **torch)
    print(f"the adapter is in {config.out}")
