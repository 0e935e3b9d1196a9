"""Published names that are a method with some of its fields set, or several methods one after the other."""

from __future__ import annotations

from typing import Any

__all__ = ["RECIPES"]

RECIPES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "rsLoRA": (("LoRA", {"scaling": "rslora"}),),  # Kalajdzievski 2023, arXiv 2312.03732
    "LoRA-FA": (("LoRA", {"freeze_a": True}),),  # Zhang et al. 2023, arXiv 2308.03303
    "QLoRA": (("NF4", {}), ("LoRA", {})),  # Dettmers et al. 2023, arXiv 2305.14314
    "QDoRA": (("NF4", {}), ("DoRA", {})),
}
