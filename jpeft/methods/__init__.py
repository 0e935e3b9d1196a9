"""Weights that adapt: one method per file, found by looking, not by a list."""

import importlib
import pkgutil

from jpeft.core.method import Method


def methods() -> dict[str, type[Method]]:
    """`{name: class}` of every method of the library, by name.

    Example:
        >>> import jpeft
        >>> "LoRA" in jpeft.methods()
        True
    """
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    found = {n: v for m in modules for n, v in vars(m).items() if _is_method(v) and v.__module__ == m.__name__}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _is_method(value) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and not value.__name__.startswith("_")


globals().update(methods())
__all__ = ["methods", *methods()]  # pyright: ignore[reportUnsupportedDunderAll]
