"""Norm tuning: only the normalisation layers train (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jpeft.core.export import Export
from jpeft.core.method import Selective
from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets

__all__ = ["NormTuning"]


@dataclass(frozen=True)
class NormTuning(Selective):
    """Every scale vector trains, and the bias beside it (same parent in the tree) where there is one.

    Query and key norms count as norms here; HF PEFT's defaults miss them in some families.

    Raises:
        ValueError: from `init`: no scales where the targets look.

    Example:
        >>> import jpeft
        >>> jpeft.NormTuning().targets
        'norm'
    """

    targets: Targets = field(default="norm", kw_only=True)

    KINDS = ("scale",)
    EXPORT = Export(
        "LN_TUNING",
        {"scale": {"ln_tuning_layers.weight": ("base", "(io)")}, "bias": {"ln_tuning_layers.bias": ("base", "(io)")}},
    )

    def chosen(self, sites: Sites) -> dict[str, Site]:
        chosen = super().chosen(sites)
        parents = {path.rpartition("/")[0] for path in chosen}
        beside = {s.path: s for s in sites if s.kind == "bias" and s.path.rpartition("/")[0] in parents}
        return {**chosen, **beside}
