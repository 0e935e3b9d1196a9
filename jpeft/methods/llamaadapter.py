"""LLaMA-Adapter: prompts in the top layers, behind a gate that starts at zero (Zhang et al. 2023, arXiv 2303.16199).

    out' = out + g · softmax(Q·K_Pᵀ / √d)·V_P,        K_P = k_proj(P), V_P = v_proj(P), g = tanh(gate)

The prompt P (*stack, num_tokens, in) of a layer goes through that layer's own key and value projections, as they stand
there (quantized, adapted, their biases included), and through nothing after them: its keys have no positions, and no
norm of keys (Qwen3's). Its softmax is its own, so that a gate of zero is the pretrained function to the bit. The
gate (*stack, heads), one for each head, starts at zero, P from N(0, 1). HF PEFT has one gate a layer and no tanh
(`gate="scalar", tanh=False`); arXiv's first version has no tanh either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from jpeft.core.biases import with_biases
from jpeft.core.export import Export
from jpeft.core.layout import taken
from jpeft.core.method import Method
from jpeft.core.ops import Add, Dot
from jpeft.core.sites import AttentionSite, Site, Sites
from jpeft.core.targets import Targets
from jpeft.core.weight import Unfrozen, Weight, apply, dense, matrix_sizes, static, weight
from jpeft.methods._layers import LAYER, check_pattern, last_layers, place

__all__ = ["LLaMAAdapter"]

_ALONE = "a prompt goes through the key and value projections as they stand; put its method last in the chain"


@weight
class Passage(Weight):
    """A kernel that makes keys or values, or its bias: it tells the attention call how to send other rows that way."""

    base: Any
    axes: str = static()
    path: str = static("")

    SLICEABLE = "io"

    def apply(self, op, x):
        return apply(op, x, self.base)

    def dense(self):
        return dense(self.base)

    def why_not_wrap(self):
        return _ALONE

    def notes(self, op, reached):
        reached = super().notes(op, reached)
        if isinstance(op, Add):
            bias = self.dense().reshape(-1)
            return tuple(dataclasses.replace(n, bias=bias) if isinstance(n, Projection) else n for n in reached)
        return (*reached, Projection(self.base, op=op, path=self.path)) if isinstance(op, Dot) else reached


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projection:
    """The note of a kernel on its way to the call: what makes keys or values of rows."""

    kernel: Any
    bias: Any = None
    op: Any = static()
    path: str = static()

    def rows(self, prompt) -> jax.Array:
        """`prompt` (n, in) projected, (n, out)."""
        y = apply(self.op, self.op.as_inputs(prompt.astype(self.op.dtype)), self.kernel)
        y = self.op.outputs(y).reshape(len(prompt), -1)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


@weight
class Prompted(Weight):
    """The kernel of a call's queries, with a prompt in the last layers of its stack; the call finds both projections.

    Shapes, of the last layers alone: prompt (*stack, num_tokens, in of the keys), gate (*stack, heads or 1).
    """

    base: Any
    prompt: Any
    gate: Any
    axes: str = static()
    key_path: str = static("")
    value_path: str = static("")
    tanh: bool = static(True)

    FIELDS = {"prompt": "nd", "gate": "g"}
    TRAINABLE = frozenset({"prompt", "gate"})
    SLICEABLE = "io"

    def apply(self, op, x):
        return apply(op, x, self.base)

    def dense(self):
        return dense(self.base)

    def why_not_merge(self):
        return "a gated prompt is no change of the weights: it is a second attention beside the first; keep the adapter"

    def notes(self, op, reached):
        return (*super().notes(op, reached), self.replace(base=None))

    def attend(self, call):
        """The call's output plus the prompt's own, gated."""
        found = {note.path: note for note in call.notes if isinstance(note, Projection)}
        if missing := {self.key_path, self.value_path} - found.keys():
            raise ValueError(
                f"expected the keys and values of this attention call to come from {self.key_path} and "
                f"{self.value_path} in the same run, {', '.join(sorted(missing))} made none: a cache of "
                "cross-attention has them from an earlier run, or the leaf trains by modules_to_save; leave the call "
                "out of targets"
            )
        rows = lambda path: found[path].rows(self.prompt).reshape(len(self.prompt), call.kv_heads, -1)
        out, _ = call.apart(rows(self.key_path), rows(self.value_path))
        gate = jnp.tanh(self.gate) if self.tanh else self.gate
        return dataclasses.replace(call, out=call.out + gate[:, None] * out)

    @property
    def _below(self) -> int:
        """Layers of the stack that come before those with a prompt."""
        labels = self.labels
        return self.shape[labels.index("s")] - self.prompt.shape[0] if "s" in labels else 0

    def cuts(self):
        return (self._below, *super().cuts()) if self._below else super().cuts()

    def along(self, axis, fn, *, drop=False):
        below = self._below
        if self.labels[axis] != "s" or not below:
            return super().along(axis, fn, drop=drop)
        layers = taken(fn, self.shape[axis])
        if layers is not None and layers.max() < below:
            return Unfrozen(self.base, axes=self.axes).along(axis, fn, drop=drop)
        return self._padded().along(axis, fn, drop=drop)

    def _padded(self):
        """The same with a prompt in every layer, behind a gate of zero where there was none."""
        pad = lambda x: jnp.pad(x, [(self._below, 0), *[(0, 0)] * (x.ndim - 1)])
        return self.replace(prompt=pad(self.prompt), gate=pad(self.gate))


@dataclass(frozen=True)
class Fed(AttentionSite):
    """A call with the inputs of the kernels that make its keys and values, `width` of them."""

    width: int = 0


@dataclass(frozen=True)
class LLaMAAdapter(Method):
    """Gated prompts in the attention of the top layers. Not mergeable; exactly the pretrained function at the start.

    Trainable parameters: num_tokens · in + heads for each adapted layer. At first only the gates have a gradient. A
    chain has it last where another method adapts keys or values.

    Fields:
        num_tokens: of a layer's prompt.
        num_layers: how many layers have one, from the top; of several stacks that many of each. A call that is in no
            stack of layers has one too.
        gate: `"head"`, one for each head, or `"scalar"`, one for a layer, as HF PEFT has it.
        tanh: whether the gate acts through tanh; HF PEFT's does not.
        layer_pattern: a regex whose first group is the layer's number in a path, where layers are leaves of their own.
        targets: attention calls, by the paths of the kernels that make their queries.

    Raises:
        ValueError: from the constructor: num_tokens or num_layers below 1, an unknown gate, a pattern without a group;
            from `init`: fewer layers than num_layers, layers stacked in more than one way, keys or values that no
            kernel of their own makes, no last layer among the targets, a model that calls no `jpeft.attention`; from a
            run: keys that a cache of cross-attention brings.

    Example:
        >>> import jpeft
        >>> jpeft.LLaMAAdapter(num_layers=16).num_tokens
        10
    """

    num_tokens: int = 10
    num_layers: int = 30
    gate: Literal["head", "scalar"] = "head"
    tanh: bool = True
    layer_pattern: str = LAYER
    targets: Targets = field(default="attention-calls", kw_only=True)

    KINDS = ("attention",)
    SMALL = {"num_tokens": 3, "num_layers": 2, "targets": "query"}
    EXPORT = Export(
        peft_type="ADAPTION_PROMPT",
        tensors={"attention": {"adaption_gate": ("gate", "g"), "adaption_prompt": ("prompt", "1nd")}},
        config={"adapter_len": "num_tokens", "adapter_layers": "num_layers"},
        required={"gate": "scalar", "tanh": False},
        enclosing=True,
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_tokens", "num_layers"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"expected a whole {name} >= 1, got {name}={value!r}")
        if self.gate not in ("head", "scalar"):
            raise ValueError(f"expected gate in ('head', 'scalar'), got {self.gate!r}")
        check_pattern(self.layer_pattern)

    def check(self, site: Site) -> str | None:
        if site.axes.count("s") > 1:
            return f"its axes {site.axes!r} are stacked in more than one way, and the layers in no one order"
        if "s" in site.axes and (layers := site.shape[site.axes.index("s")]) < self.num_layers:
            return f"num_layers {self.num_layers} is above its {layers} layers; write num_layers={layers} or fewer"
        return None

    def chosen(self, sites: Sites) -> dict[str, Site]:
        """The calls, then the kernels that make their keys and values, then those kernels' biases."""
        last = last_layers((s for s in sites if s.kind == "attention"), self.num_layers, self.layer_pattern)
        calls = cast("dict[str, AttentionSite]", super().chosen(sites))
        kept = {path: site for path, site in calls.items() if last.get(place(site, self.layer_pattern), True)}
        if not kept:
            raise ValueError(
                f"none of {', '.join(list(calls)[:5])} is in the last {self.num_layers} layers of its stack"
            )
        kernels = {site.path: site for site in sites if site.kind == "dense" and "?" not in site.axes}
        problems = [f"{path}: {why}" for path, site in kept.items() if (why := _refusal(site, kept, kernels))]
        if problems:
            raise ValueError("LLaMAAdapter cannot adapt\n" + "\n".join(problems[:5]))
        passages = {path: kernels[path] for site in kept.values() for path in _passages(site)}
        width = lambda site: matrix_sizes(kernels[site.key].shape, kernels[site.key].axes)[1]
        return {path: Fed(**vars(site), width=width(site)) for path, site in kept.items()} | with_biases(
            passages, sites
        )

    def wrap(self, key, leaf, site: Site) -> Weight:
        axes = site.axes.lstrip("s")
        if not isinstance(site, Fed):
            return Passage(leaf, axes=axes, path=site.path)
        lead = (self.num_layers,) if "s" in site.axes else ()
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return Prompted(
            leaf,
            jax.random.normal(key, (*lead, self.num_tokens, site.width), dtype),
            jnp.zeros((*lead, site.heads if self.gate == "head" else 1), dtype),
            axes=axes,
            key_path=site.key,
            value_path=site.value,
            tanh=self.tanh,
        )


def _passages(call: AttentionSite) -> tuple[str, str]:
    """The paths of the kernels that make the keys and values of a call."""
    return call.key, call.value


def _refusal(call: AttentionSite, calls, kernels) -> str | None:
    """Why a prompt cannot go through the projections of a call."""
    passages = _passages(call)
    if not set(passages) <= kernels.keys():
        return "no one kernel makes its keys, or its values, for the prompt to go through"
    if fused := [path for path in passages if path in calls]:
        return (
            f"{fused[0]} makes queries as well as keys or values, and nothing tells which of its outputs are which; "
            "keep the three kernels apart, or leave the call out of targets"
        )
    key, value = (matrix_sizes(kernels[path].shape, kernels[path].axes) for path in passages)
    if key[:2] != value[:2]:
        return f"its keys are made of {key[1]} numbers and its values of {value[1]}; one prompt cannot go through both"
    for path, size in zip(passages, (call.head_dim, call.value_dim), strict=True):
        kernel = kernels[path]
        outputs = [n for n, letter in zip(kernel.shape, kernel.axes, strict=True) if letter == "o" and n != 1]
        if len(outputs) > 1 and outputs != [n for n in (call.kv_heads, size) if n != 1]:
            return f"{path} has outputs {outputs}; expected ({call.kv_heads}, {size}), the heads first"
    return None
