"""P-tuning: prompts from an encoder (Liu, Zheng, Du, Ding, Qian, Yang and Tang 2021, arXiv 2103.10385).

    P = head(LSTM(E)),  head(x) = relu(x·W₁ + b₁)·W₂ + b₂            encoder="lstm", the paper's, bidirectional
    P = relu(relu(E·W₁ + b₁)·W₂ + b₂)·W₃ + b₃                        encoder="mlp", HF PEFT's default

E (*stack, num_tokens, d), trained too, starts from N(0, 1); P (*stack, num_tokens, d) is the prompt. Matrices and
biases start from U(±1/√in), the LSTM's from U(±1/√hidden), as in torch. The tokens of the prompt may stand anywhere in
a template: `jpeft.prompted(batch, method, at=...)`. Of the authors' two codes, width d, the one for LAMA has an LSTM of
d/2 a direction and a head of d, the default here; the one for SuperGLUE d and d, which is `encoder_hidden_size=d,
head_hidden_size=d`. HF PEFT's LSTM has a head of 2 · encoder_hidden_size, ours where `head_hidden_size` is None.
The encoder is of use in training alone: `after_training` leaves a plain `PromptTuning` with the rows P.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.sites import Site
from jpeft.core.weight import Weight, matrix_sizes, static, weight
from jpeft.methods._prompts import Prompt, Prompted, _Prompting
from jpeft.methods.prompttuning import PromptTuning

__all__ = ["Encoded", "PTuning"]


@weight
class Encoded(Prompted):
    """A prompt that an encoder makes from `inputs`.

    Shapes, h = encoder_hidden_size, m the head's: inputs (*stack, num_tokens, d); of the LSTM, its two directions and
    its gates in torch's order (input, forget, cell, output): lower (*stack, 2, d, 4·h), upper (*stack, layers - 1, 2,
    2·h, 4·h), recurrent (*stack, layers, 2, h, 4·h), input_bias and recurrent_bias (*stack, layers, 2, 4·h); of what
    follows: first (*stack, d or 2·h, m), hidden (*stack, layers - 1, m, m), last (*stack, m, d), each with its bias.
    What an encoder does not have is None, as is key () while nothing is random.
    """

    base: Any
    inputs: Any
    lower: Any
    upper: Any
    recurrent: Any
    input_bias: Any
    recurrent_bias: Any
    first: Any
    first_bias: Any
    hidden: Any
    hidden_bias: Any
    last: Any
    last_bias: Any
    key: Any = None
    axes: str = static()
    dropout: float = static(default=0.0)

    FIELDS = {
        "inputs": "nd",
        "lower": "wdg",
        "upper": "lwcg",
        "recurrent": "lwhg",
        "input_bias": "lwg",
        "recurrent_bias": "lwg",
        "first": "cm",
        "first_bias": "m",
        "hidden": "lmp",
        "hidden_bias": "lm",
        "last": "md",
        "last_bias": "d",
        "key": "",
    }
    TRAINABLE = frozenset(FIELDS) - {"key"}

    def made(self):
        encode = functools.partial(_encode, dropout=self.dropout)
        for _ in range(self.inputs.ndim - 2):
            encode = jax.vmap(encode)
        return encode({name: getattr(self, name) for name in self.FIELDS if getattr(self, name) is not None})

    def randomized(self, key):
        outer = super().randomized(key)
        lead = self.inputs.shape[:-2]
        return outer.replace(key=jax.random.split(key, lead) if lead else key) if self.dropout else outer


def _encode(f: dict[str, Any], dropout: float):
    """The prompt (num_tokens, d) by the fields of an `Encoded` without stack axes."""
    x = f["inputs"] if "lower" not in f else _lstm(f, dropout)
    x = jax.nn.relu(x @ f["first"] + f["first_bias"])
    for kernel, bias in zip(f.get("hidden", ()), f.get("hidden_bias", ()), strict=True):
        x = jax.nn.relu(x @ kernel + bias)
    return x @ f["last"] + f["last_bias"]


def _lstm(f: dict[str, Any], dropout: float):
    """What the LSTM's uppermost layer puts out, (num_tokens, 2·h): forwards, then backwards."""
    from flax import linen as nn

    x, key = f["inputs"], f.get("key")
    layers, _, size, _ = f["recurrent"].shape
    for n in range(layers):
        if n and key is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(key, n), 1 - dropout, x.shape)
            x = jnp.where(keep, x / (1 - dropout), 0)
        kernels = f["upper"][n - 1] if n else f["lower"]
        ways = []
        for way in range(2):
            bias = f["input_bias"][n, way] + f["recurrent_bias"][n, way]
            gates = [jnp.split(w, 4, axis=-1) for w in (kernels[way], f["recurrent"][n, way], bias)]
            cell: dict[str, Any] = {}
            for gate, from_input, from_state, added in zip("ifgo", *gates, strict=True):
                cell |= {f"i{gate}": {"kernel": from_input}, f"h{gate}": {"kernel": from_state, "bias": added}}
            run = nn.RNN(nn.OptimizedLSTMCell(size), reverse=way == 1, keep_order=True)
            ways.append(run.apply({"params": {"cell": cell}}, x))
        x = jnp.concatenate(ways, -1)
    return x


@dataclass(frozen=True)
class PTuning(_Prompting):
    """Virtual tokens whose embeddings an encoder makes from trained ones. Not mergeable: they are tokens, not weights.

    Fields:
        num_tokens: virtual tokens of the prompt.
        encoder: `"lstm"`, bidirectional, or `"mlp"`.
        encoder_hidden_size: size of the LSTM in each direction, half of the embedding's by default; of the MLP's hidden
            layers, the embedding's by default.
        encoder_num_layers: layers of the LSTM, or hidden layers of the MLP.
        encoder_dropout: rate between the LSTM's layers, on only while `bind` is given a key.
        head_hidden_size: of the hidden layer that follows the LSTM; both directions' size by default.
        targets: the token embedding. By default the one whose rows are the outputs of the vocabulary head, else the one
            with the most rows: others look up positions or types.

    Raises:
        ValueError: from the constructor: a number below 1, an unknown encoder, a dropout outside [0, 1) or where there
            is nothing between two layers of an LSTM, a head for the MLP; from `init`: an odd embedding where its half
            is meant, targets that match several embeddings, a prompt that stands there already.

    Example:
        >>> import jpeft
        >>> jpeft.PTuning(num_tokens=6, encoder="mlp", encoder_hidden_size=128).prompt_length
        6
    """

    encoder: Literal["lstm", "mlp"] = "lstm"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    head_hidden_size: int | None = None

    SMALL = {"num_tokens": 3}

    def __post_init__(self):
        super().__post_init__()
        self._one_of("encoder", "lstm", "mlp")
        sizes = ("encoder_hidden_size", "head_hidden_size")
        self._whole("encoder_num_layers", *(name for name in sizes if getattr(self, name) is not None))
        if self.encoder == "mlp" and self.head_hidden_size is not None:
            raise ValueError(
                f"expected head_hidden_size for encoder='lstm' alone, got {self.head_hidden_size} for 'mlp'; "
                "its layers have encoder_hidden_size"
            )
        between = self.encoder == "lstm" and self.encoder_num_layers > 1
        if not 0 <= self.encoder_dropout < 1 or (self.encoder_dropout and not between):
            raise ValueError(
                f"expected 0 <= encoder_dropout < 1, and 0 but between two layers of an LSTM, got "
                f"{self.encoder_dropout} for encoder={self.encoder!r}, encoder_num_layers={self.encoder_num_layers}"
            )

    def check(self, site: Site) -> str | None:
        width = matrix_sizes(site.shape, site.axes)[2]
        if self.encoder == "lstm" and self.encoder_hidden_size is None and width % 2:
            return f"no half of its {width} features for each direction of the LSTM; write encoder_hidden_size=..."
        return None

    def wrap(self, key, leaf, site: Site) -> Encoded:
        lead, _, d = matrix_sizes(site.shape, site.axes)
        lstm, layers = self.encoder == "lstm", self.encoder_num_layers
        h = self.encoder_hidden_size or (d // 2 if lstm else d)
        wide, m, hidden = (2 * h, self.head_hidden_size or 2 * h, 0) if lstm else (d, h, layers - 1)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        of = lambda name: jax.random.fold_in(key, list(Encoded.FIELDS).index(name))

        def start(name, size, *shape):
            """U(±1/√size); None for an encoder without such layers."""
            bound = 0 if 0 in shape else size**-0.5
            return jax.random.uniform(of(name), (*lead, *shape), dtype, -bound, bound) if bound else None

        return Encoded(
            leaf,
            inputs=jax.random.normal(of("inputs"), (*lead, self.num_tokens, d), dtype),
            lower=start("lower", h, 2 * lstm, d, 4 * h),
            upper=start("upper", h, lstm * (layers - 1), 2, 2 * h, 4 * h),
            recurrent=start("recurrent", h, lstm * layers, 2, h, 4 * h),
            input_bias=start("input_bias", h, lstm * layers, 2, 4 * h),
            recurrent_bias=start("recurrent_bias", h, lstm * layers, 2, 4 * h),
            first=start("first", wide, wide, m),
            first_bias=start("first_bias", wide, m),
            hidden=start("hidden", m, hidden, m, m),
            hidden_bias=start("hidden_bias", m, hidden, m),
            last=start("last", m, m, d),
            last_bias=start("last_bias", m, d),
            axes=site.axes.lstrip("s"),
            dropout=self.encoder_dropout,
        )

    def exported(self, trainable, frozen):
        method, trainable, _ = self.after_training(trainable, frozen)
        return method, trainable

    def after_training(self, trainable, frozen):
        """A `PromptTuning` with the finished rows, without the encoder."""
        method = PromptTuning(self.num_tokens, targets=self.targets, modules_to_save=self.modules_to_save)
        return method, _finished(trainable), _finished(frozen)


def _finished(half):
    """One half with plain prompts: the trainable one has their rows, the frozen one what lies beneath."""
    rows = lambda w: None if w.inputs is None else w.made()
    plain = lambda w: Prompt(w.base, rows(w), axes=w.axes) if isinstance(w, Encoded) else w
    return jax.tree.map(plain, half, is_leaf=lambda x: isinstance(x, Weight))
