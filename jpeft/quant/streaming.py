"""Compressing a model while it is read, so that the dense one is never there as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jpeft.core.sites import Sites
from jpeft.quant.packed import Quantizer

__all__ = ["compressing"]


def compressing(method, sites: Sites) -> Callable[[str, Any], Any] | None:
    """What the method's compression, its first part, makes of a leaf: `(path, leaf) -> leaf`, for `models.load(each=)`.

    `method.init` keeps what is compressed already, so it gives the same halves as on the dense tree. None where the
    method compresses nothing, or where another part of it must see the pretrained weights (`OBSERVES`).

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from jpeft.quant import compressing
        >>> apply, params = (lambda params, x: x @ params["kernel"]), {"kernel": jnp.ones((64, 3))}
        >>> each = compressing(jpeft.NF4(), jpeft.find_sites(apply, params, jnp.ones((2, 64))))
        >>> type(each("kernel", params["kernel"])).__name__
        'NormalFloat4'
        >>> compressing(jpeft.LoRA(), jpeft.find_sites(apply, params, jnp.ones((2, 64)))) is None
        True
    """
    first, *rest = getattr(method, "methods", (method,))
    if not isinstance(first, Quantizer) or any(m.OBSERVES for m in rest):
        return None
    chosen = first.chosen(sites)
    key = jax.random.key(0)  # compressing draws nothing
    return lambda path, leaf: first.wrap(key, leaf, chosen[path]) if path in chosen else leaf
