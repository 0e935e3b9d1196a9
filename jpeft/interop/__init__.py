"""Bytes to trees and back: checkpoints and adapters in the formats that other programs read and write."""

import importlib
import pkgutil


def __getattr__(name: str):
    """Formats on first use."""
    if name in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
