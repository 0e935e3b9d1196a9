"""What a family of models supplies: its configs, an NNX module, Hugging Face's names, a pure function of parameters.

Each family is one file with a subclass of `Apply` and one of `Config`; `jpeft.models.apply` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jpeft.interop import quantization_config
from jpeft.interop.huggingface import Tensor
from jpeft.models.layers import REMAT

__all__ = ["Apply", "Config", "absent", "check_tokens", "common_fields", "common_problems", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the configs of all families have; field names are Hugging Face's where it has the field.

    `dtype` is the compute dtype (None: that of the embedding), `remat` what the backward pass computes again (None:
    nothing; else a key of `layers.REMAT`).
    """

    model_type: str
    initializer_range: float = 0.02
    param_dtype: str = "float32"
    dtype: str | None = None
    remat: str | None = None


@dataclass(frozen=True)
class Apply(ABC):
    """The pure function of a model, `apply(params, tokens)`. It compares and hashes by its config.

    A family is a subclass that fills in the class variables and the abstract methods.
    """

    config: Any

    MODEL_TYPES: ClassVar[tuple[str, ...]]  # what its configs say they are
    MODULE: ClassVar[Callable[..., nnx.Module]]  # of `(config, rngs)`
    TENSORS: ClassVar[tuple[Tensor, ...]]  # Hugging Face's names
    RENAMED: ClassVar[tuple[tuple[str, str], ...]] = ()  # patterns of other names for them, and replacements
    HEAD: ClassVar[tuple[str, ...]] = ()  # patterns of the paths that are new with a new head for labels

    @abstractmethod
    def __call__(self, params, tokens, **inputs) -> Any:
        """The result of the model."""

    @abstractmethod
    def hidden(self, params, tokens, **inputs) -> Any:
        """The final hidden states `(batch, length, features)`."""

    @classmethod
    @abstractmethod
    def parse(cls, given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> Self:
        """The apply function that a Hugging Face config describes.

        Raises:
            ValueError: everything about the config that the model would have to ignore, all together.
        """

    @classmethod
    def describe(cls, given: dict[str, Any], num_labels: int | None) -> dict[str, Any]:
        """The Hugging Face config of the model that is made of a given one, with a head for so many labels.

        Raises:
            ValueError: a head on a family that has none.
        """
        if num_labels is not None:
            raise ValueError(f"expected num_labels=None for {given['model_type']!r}, which has no head for labels here")
        return given

    @property
    def task(self) -> str | None:
        """HF PEFT's word for what the model is for, None where it has none."""
        return None

    @property
    def names(self) -> dict[str, str]:
        """Hugging Face's name of each parameter; `{}` stands for the layer."""
        return {row.path: row.name for row in self.TENSORS}

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensor names that a folder may have and that are not read."""
        return ()

    def inputs(self, length: int = 8) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of what it is applied to besides the parameters, one row of `length` tokens: for `find_sites`."""
        return (jax.ShapeDtypeStruct((1, length), jnp.int32),)

    def init_cache(self, batch: int, max_length: int, dtype=None) -> Any:
        """An empty cache.

        Raises:
            ValueError: on a family that does not generate.
        """
        raise ValueError(f"expected a model that generates, got {self.config.model_type!r}, which keeps no cache")

    def shapes(self) -> dict:
        """The parameters as shapes."""
        return jax.tree.map(lambda shape: shape, _structure(self)[1])

    def random(self, key: Array) -> dict:
        """Random parameters; biases are zero and scales one."""
        return _random(self, key)

    def run(self, method: str, params, *inputs):
        """The result of one of the module's methods, jitted."""
        return _run(self, method, params, *inputs)


@lru_cache(maxsize=32)
def _structure(apply: Apply) -> tuple[Any, dict]:
    """The graph of the NNX module and the shapes of its parameters; nothing is computed."""
    graph, state = nnx.split(nnx.eval_shape(lambda: apply.MODULE(apply.config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


@partial(jax.jit, static_argnums=0)
def _random(apply, key):
    return nnx.to_pure_dict(nnx.split(apply.MODULE(apply.config, nnx.Rngs(key)), nnx.Param, ...)[1])


@partial(jax.jit, static_argnums=(0, 1))
def _run(apply, method, params, *inputs):
    return getattr(nnx.merge(_structure(apply)[0], params), method)(*inputs)


def common_fields(given: Mapping[str, Any], dtype: Any, param_dtype: Any, remat: str | None) -> dict[str, Any]:
    """The fields of `Config`."""
    initializer_range = given.get("initializer_range")
    return dict(
        model_type=given["model_type"],
        initializer_range=0.02 if initializer_range is None else float(initializer_range),
        param_dtype=jnp.dtype(param_dtype or given.get("dtype") or given.get("torch_dtype") or "float32").name,
        dtype=None if dtype is None else jnp.dtype(dtype).name,
        remat=remat,
    )


def common_problems(given: Mapping[str, Any], remat: str | None) -> list[str]:
    """One line for everything that no family honours."""
    found = quantization_config.problems(given.get("quantization_config"))
    if remat is not None and remat not in REMAT:
        found.append(f"expected remat to be None or one of {list(REMAT)}, got {remat!r}")
    return found


def absent(given: Mapping[str, Any], required: Sequence[str]) -> list[str]:
    """One line for every required number that a config lacks."""
    return [f"expected {key}, which is absent" for key in required if not isinstance(given.get(key), int)]


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise a ValueError of all problems, if there are any."""
    if problems:
        raise ValueError(f"{what} cannot honour this config:\n  " + "\n  ".join(problems))


def check_tokens(tokens, **beside) -> None:
    """Raise a ValueError unless tokens are `(batch, length)` integers, and each array given beside them is as large."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"expected tokens as integers (batch, length), got {tokens.dtype}{list(tokens.shape)}")
    for name, array in beside.items():
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"expected {name} of the tokens' shape {tokens.shape}, got {array.shape}")
