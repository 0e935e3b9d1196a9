"""The two doors from Flax: a module or a model as `(apply, params)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

__all__ = ["from_linen", "from_nnx"]


def from_linen(module, *inputs, key=None, **keywords) -> tuple[Callable, Any]:
    """A Linen module as `(apply, params)`, `apply(params, *inputs)` being `module.apply({"params": params}, ...)`.

    The params are those of a bound module (`module.bind(variables)`); of a fresh one they are made by `module.init`
    where inputs are given, else None: bring your own. Other collections of a bound module are constants.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> from flax import linen as nn
        >>> apply, params = jpeft.from_linen(nn.Dense(3), jnp.ones((2, 4)))
        >>> apply(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    bound = getattr(module, "scope", None) is not None
    module, variables = module.unbind() if bound else (module, {})
    if not bound and inputs:
        variables = module.init(jax.random.key(0) if key is None else key, *inputs, **keywords)
    variables = dict(variables)
    params = variables.pop("params", None)

    def apply(params, *inputs, **keywords):
        return module.apply({"params": params, **variables}, *inputs, **keywords)

    return apply, params


def from_nnx(model) -> tuple[Callable, Any]:
    """An NNX model as `(apply, params)`: params a pure dict of its `nnx.Param`s, the rest of its state constant.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> from flax import nnx
        >>> apply, params = jpeft.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> apply(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    from flax import nnx

    graphdef, state, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, *inputs, **keywords):
        filled = jax.tree.map(lambda x: x, state)  # a fresh copy of its structure
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graphdef, filled, rest)(*inputs, **keywords)

    return apply, nnx.to_pure_dict(state)
