"""Prefixes: keys and values that an attention call's queries see besides its own. What the methods that train them have
in common.

    out = attention(Q, [P_K; K], [P_V; V])

P_K and P_V (*stack, num_tokens, kv_heads, head_dim) are each call's own. They are merged as a partial attention of
their own, so the call keeps its shapes, masks and cache. A reparametrised prefix is made by an MLP whose embedding
and first layer all calls share, with a last layer for each of them:

    H = tanh(E·W + b),  P_K = H·W_K + b_K,  P_V = H·W_V + b_V
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Tied, untied
from jpeft.core.sites import AttentionSite, Site
from jpeft.core.targets import Targets
from jpeft.core.tree import key_for_path, map_with_paths
from jpeft.core.weight import Weight, apply, dense, matrix_sizes, static, weight

__all__ = ["Prefix", "Reparametrized"]


class _AtCall(Weight):
    """The kernel of a call's queries, which it leaves as they are."""

    key: jax.Array | None
    dropout: float

    def apply(self, op, x):
        return apply(op, x, self.base)

    def dense(self):
        return dense(self.base)

    def why_not_merge(self):
        return (
            "a prefix is no change of the weights: the attention sees keys and values besides its own; keep the adapter"
        )

    def randomized(self, key):
        outer = super().randomized(key)
        lead = matrix_sizes(self.shape, self.labels)[0]
        return outer.replace(key=jax.random.split(key, lead) if lead else key) if self.dropout else outer


@weight
class Prefix(_AtCall):
    """`keys` and `values` (*stack, num_tokens, kv_heads, head_dim); `key` (*stack) or None, for dropout on both."""

    base: Any
    keys: Any
    values: Any
    key: Any = None
    axes: str = static()
    dropout: float = static(0.0)

    FIELDS = {"keys": "nkh", "values": "nkh", "key": ""}
    TRAINABLE = frozenset({"keys", "values"})
    SLICEABLE = "io"

    def notes(self, op, reached):
        return (*super().notes(op, reached), self.replace(base=None))

    def attend(self, call):
        """The call with the prefix among its keys; dropout draws for each row of the batch."""
        keys, values = self.keys, self.values
        if self.key is not None:
            kept = lambda x, key: jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x, 0)
            rows = lambda x: jnp.broadcast_to(x, (*call.query.shape[:-3], *x.shape)) / (1 - self.dropout)
            keys, values = (kept(rows(x), k) for x, k in zip((keys, values), jax.random.split(self.key), strict=True))
        return call.joined(keys, values)


@weight
class Reparametrized(_AtCall):
    """A prefix that an MLP makes, once for every call of the lifted function.

    Shapes: key_kernel, value_kernel (*stack, hidden, kv_heads, head_dim), their biases (*stack, kv_heads, head_dim);
    shared embedding (num_tokens, width), kernel (width, hidden), bias (hidden).
    """

    base: Any
    key_kernel: Any
    key_bias: Any
    value_kernel: Any
    value_bias: Any
    embedding: Any = None
    kernel: Any = None
    bias: Any = None
    key: Any = None
    axes: str = static()
    dropout: float = static(0.0)

    FIELDS = {
        "key_kernel": "rkh",
        "key_bias": "kh",
        "value_kernel": "rkh",
        "value_bias": "kh",
        "embedding": "nd",
        "kernel": "dr",
        "bias": "r",
        "key": "",
    }
    TRAINABLE = frozenset(FIELDS) - {"key"}
    UNSTACKED = frozenset({"embedding", "kernel", "bias"})
    SLICEABLE = "io"

    def tied(self):
        return {name: f"prefix_{name}" for name in ("embedding", "kernel", "bias")}

    def fitted(self):
        return self.plain(super().fitted().base)

    def plain(self, base, *, made: bool = True) -> Prefix:
        """The prefix as it is now on `base`; without arrays where it is not to be `made`."""
        keys = values = None
        if made:
            hidden = jnp.tanh(self.embedding @ self.kernel + self.bias)
            last = lambda kernel, bias: jnp.einsum("nr,...rkh->...nkh", hidden, kernel) + bias[..., None, :, :]
            keys, values = last(self.key_kernel, self.key_bias), last(self.value_kernel, self.value_bias)
        return Prefix(base, keys, values, self.key, axes=self.axes, dropout=self.dropout)


@dataclass(frozen=True)
class _Prefixing(Method):
    """What the methods with prefixes have in common.

    Fields:
        num_tokens: keys and values of the prefix, in each call.
        reparametrize: whether an MLP makes it while it trains.
        encoder_hidden_size: of the MLP's hidden layer.
        embedding_size: of the MLP's embedding; by default all heads' keys together, of the call that has most.
        dropout: rate on the prefix, for each row of a batch apart, on only while `bind` is given a key.
        init_prefix: `"normal"` (N(0, 1); the MLP as torch starts one), or `"zero"` (of the MLP the last layer).
        targets: attention calls, by the paths of the kernels that make their queries.
    """

    num_tokens: int = 20
    reparametrize: bool = True
    encoder_hidden_size: int = 512
    embedding_size: int | None = None
    dropout: float = 0.0
    init_prefix: Literal["normal", "zero"] = "normal"
    targets: Targets = field(default="attention-calls", kw_only=True)

    KINDS = ("attention",)
    NO_OP_AT_START = False  # even keys and values of zero take their part of the softmax

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_tokens", "encoder_hidden_size", "embedding_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"expected a whole {name} >= 1, got {name}={value!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got dropout={self.dropout}")
        if self.init_prefix not in ("normal", "zero"):
            raise ValueError(f"expected init_prefix in ('normal', 'zero'), got {self.init_prefix!r}")

    @property
    def position_shift(self) -> int:
        return self.num_tokens

    def shared(self, key, params, chosen):
        if not self.reparametrize:
            return {}
        calls = cast("list[AttentionSite]", list(chosen.values()))
        width = self.embedding_size or max(call.kv_heads * call.head_dim for call in calls)
        dtype = jnp.result_type(jnp.float32, *(call.dtype for call in calls))
        key_of = lambda name: key_for_path(key, f"prefix_{name}")
        hidden = self.encoder_hidden_size
        return {
            "prefix_embedding": jax.random.normal(key_of("embedding"), (self.num_tokens, width), dtype),
            "prefix_kernel": _linear(key_of("kernel"), (width, hidden), width, dtype),
            "prefix_bias": _linear(key_of("bias"), (hidden,), width, dtype),
        }

    def wrap(self, key, leaf, site: Site) -> Weight:
        call = cast(AttentionSite, site)
        lead, axes = matrix_sizes(site.shape, site.axes)[0], site.axes.lstrip("s")
        sizes = (call.kv_heads, call.head_dim), (call.kv_heads, call.value_dim)
        dtype, zero = jnp.promote_types(leaf.dtype, jnp.float32), self.init_prefix == "zero"
        if not self.reparametrize:
            draw = lambda key, size: jax.random.normal(key, (*lead, self.num_tokens, *size), dtype)
            keys, values = (draw(k, size) for k, size in zip(jax.random.split(key), sizes, strict=True))
            prefix = Prefix(leaf, keys, values, axes=axes, dropout=self.dropout)
            return prefix.replace(keys=jnp.zeros_like(keys), values=jnp.zeros_like(values)) if zero else prefix
        hidden = self.encoder_hidden_size
        shapes = [shape for size in sizes for shape in ((*lead, hidden, *size), (*lead, *size))]
        arrays = [_linear(k, s, hidden, dtype) for k, s in zip(jax.random.split(key, 4), shapes, strict=True)]
        arrays = [jnp.zeros_like(x) for x in arrays] if zero else arrays
        return Reparametrized(leaf, *arrays, axes=axes, dropout=self.dropout)

    def after_training(self, trainable, frozen):
        """The same prefix without the MLP."""
        if not self.reparametrize:
            return self, trainable, frozen
        made = lambda _, w: w.plain(w.base) if isinstance(w, Reparametrized) else w
        rest = lambda _, w: w.plain(w.base, made=False) if isinstance(w, Reparametrized) else w
        method = dataclasses.replace(self, reparametrize=False)
        frozen = frozen.tree if isinstance(frozen, Tied) else frozen
        return method, map_with_paths(made, untied(trainable)), map_with_paths(rest, frozen)

    def exported(self, trainable, frozen):
        return self.after_training(trainable, frozen)[:2]


def _linear(key, shape, inputs: int, dtype) -> jax.Array:
    """A matrix or bias of a layer with so many inputs, as torch starts it."""
    return jax.random.uniform(key, shape, dtype, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))


def fields_of(method: _Prefixing) -> dict[str, Any]:
    """The values of the fields that all methods with prefixes have."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(_Prefixing)}
