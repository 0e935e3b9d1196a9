"""`jpeft inspect`: where a model can be adapted, what a method matches and how much of it would train."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jpeft.cli import model
from jpeft.cli.options import MethodOptions, build_method, parse

__all__ = ["InspectConfig", "run"]


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Show the sites of a model; no weights are read.

    Attributes:
        model: folder in Hugging Face format, or its config.json; the small embedded model when absent.
        method: also show what this method matches and trains.
        rank: the method's rank.
        alpha: the method's alpha.
        targets: what would be adapted.
        dropout: the method's dropout.
        set: any other field of the method, as name=value; may be repeated.
    """

    model: str | None = None
    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float | None = None
    set: tuple[str, ...] = ()


def run(arguments: Sequence[str]) -> None:
    """Print the tables."""
    config = parse(InspectConfig, arguments, "inspect")
    fields = ("rank", "alpha", "targets", "dropout", "set")
    given = [f"--{name}" for name in fields if getattr(config, name)]
    if config.method is None and given:
        raise ValueError(f"{', '.join(given)} are settings of a method; say which with --method")
    from jpeft import models

    apply, shapes = models.abstract(model.folder_of(config.model))
    sites = model.sites_of(apply, shapes)
    print(sites)
    if config.method is not None:
        method = build_method(MethodOptions(config.method, *(getattr(config, name) for name in fields)))
        print(f"\n{method}\n{model.matched(method, shapes, sites)[0]}")
