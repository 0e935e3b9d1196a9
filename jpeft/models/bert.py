"""BERT (Devlin et al. 2019, arXiv:1810.04805), RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-R: encoders.

A parameter's path is its Hugging Face module name without `bert` or `roberta`:
`encoder/layer/attention/self/query/kernel` is `(layers, in, out)`.

A config's architecture says what is made of it. A `...ForSequenceClassification` has its head. A `...Model`, a
`BertForPreTraining` or none at all is the encoder with its pooler; a `...ForMaskedLM` the encoder without it. The heads
that guess masked words or next sentences are neither read from a folder nor written to one.

Dropout regularises training and is no part of the function: the rates in a config (0.1 in all the public ones) are
neither honoured nor refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jpeft.core.attention import attention
from jpeft.interop.huggingface import Tensor
from jpeft.models.family import Apply, Config, absent, check_tokens, common_fields, common_problems, refuse
from jpeft.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, scan_layers, stack

__all__ = ["Bert", "BertApply", "BertConfig", "RobertaApply"]


def _encoder_tensors(prefix: str) -> tuple[Tensor, ...]:
    """The names of an encoder and its pooler."""
    embeddings, layer, ours = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{}}", "encoder/layer"
    dense = (
        ("attention/self/query", "attention.self.query"),
        ("attention/self/key", "attention.self.key"),
        ("attention/self/value", "attention.self.value"),
        ("attention/output/dense", "attention.output.dense"),
        ("intermediate/dense", "intermediate.dense"),
        ("output/dense", "output.dense"),
    )
    norms = (("attention/output/LayerNorm", "attention.output.LayerNorm"), ("output/LayerNorm", "output.LayerNorm"))
    return (
        Tensor("embeddings/word_embeddings/embedding", f"{embeddings}.word_embeddings.weight"),
        Tensor("embeddings/position_embeddings/embedding", f"{embeddings}.position_embeddings.weight"),
        Tensor("embeddings/token_type_embeddings/embedding", f"{embeddings}.token_type_embeddings.weight"),
        Tensor("embeddings/LayerNorm/scale", f"{embeddings}.LayerNorm.weight"),
        Tensor("embeddings/LayerNorm/bias", f"{embeddings}.LayerNorm.bias"),
        *(Tensor(f"{ours}/{path}/kernel", f"{layer}.{name}.weight", transpose=True) for path, name in dense),
        *(Tensor(f"{ours}/{path}/bias", f"{layer}.{name}.bias") for path, name in dense),
        *(Tensor(f"{ours}/{path}/scale", f"{layer}.{name}.weight") for path, name in norms),
        *(Tensor(f"{ours}/{path}/bias", f"{layer}.{name}.bias") for path, name in norms),
        Tensor("pooler/dense/kernel", f"{prefix}.pooler.dense.weight", transpose=True),
        Tensor("pooler/dense/bias", f"{prefix}.pooler.dense.bias"),
    )


BERT_TENSORS = (
    *_encoder_tensors("bert"),
    Tensor("classifier/kernel", "classifier.weight", transpose=True),
    Tensor("classifier/bias", "classifier.bias"),
)
ROBERTA_TENSORS = (
    *_encoder_tensors("roberta"),
    Tensor("classifier/dense/kernel", "classifier.dense.weight", transpose=True),
    Tensor("classifier/dense/bias", "classifier.dense.bias"),
    Tensor("classifier/out_proj/kernel", "classifier.out_proj.weight", transpose=True),
    Tensor("classifier/out_proj/bias", "classifier.out_proj.bias"),
)
# Folders of the encoder alone have no prefix; BERT's oldest have the names of its first implementation.
BERT_RENAMED = (
    (r"^(?=(embeddings|encoder|pooler)\.)", "bert."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
ROBERTA_RENAMED = ((r"^(?=(embeddings|encoder|pooler)\.)", "roberta."),)
# The heads of pretraining, and a buffer that older checkpoints carry.
HF_IGNORED = (r"^cls\.", r"^lm_head\.", r"\.embeddings\.position_ids$")
HF_IGNORED_WITHOUT_POOLER = (r"\.pooler\.",)

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class BertConfig(Config):
    """What an encoder of the BERT shape is made of.

    `padding_position` is the position of padding tokens, those equal to it, from which RoBERTa counts on; None (BERT):
    positions count all tokens from 0. `num_labels` is that of the classification head, None without one;
    `pools` says whether there is a pooler, which then stands before the head. Without one the head has its own layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    padding_position: int | None = None
    pools: bool = True
    num_labels: int | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def _problems(given: dict, architectures: Mapping[str, Any]) -> list[str]:
    """One line for everything that the model would have to ignore or guess."""
    found: list[str] = []
    say = lambda what, came: found.append(f"expected {what}, got {came}")
    if given["hidden_size"] % given["num_attention_heads"]:
        say(f"num_attention_heads that divides hidden_size={given['hidden_size']}", given["num_attention_heads"])
    if (act := given.get("hidden_act") or "gelu") not in ACTIVATIONS:
        say(f"hidden_act to be one of {list(ACTIVATIONS)}", repr(act))
    if (kind := given.get("position_embedding_type") or "absolute") != "absolute":
        say("position_embedding_type 'absolute'", repr(kind))
    for key in ("is_decoder", "add_cross_attention"):
        if given.get(key):
            say(f"{key} False", given[key])
    if given.get("pruned_heads"):
        say("no pruned_heads", given["pruned_heads"])
    names = given.get("architectures") or []
    if len(names) > 1 or set(names) - set(architectures):
        say(f"architectures to be one of {list(architectures)}", names)
    return found


class Embeddings(nnx.Module):
    """`LayerNorm(word + position + token type)`."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        d = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, d, config, rngs)
        self.position_embeddings = Embedding(config.max_position_embeddings, d, config, rngs)
        self.token_type_embeddings = Embedding(config.type_vocab_size, d, config, rngs)
        self.LayerNorm = LayerNorm(d, config.layer_norm_eps, config)

    def __call__(self, tokens: Array, token_type_ids: Array, positions: Array) -> Array:
        words, types = self.word_embeddings(tokens), self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(words + types + self.position_embeddings(positions))


class SelfAttention(nnx.Module):
    """Every token of a segment sees all of them."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        linear = lambda: Linear(config.hidden_size, config.hidden_size, config, rngs, bias=True)
        self.query, self.key, self.value = linear(), linear(), linear()
        self.head_dim = config.head_dim

    def __call__(self, x: Array, mask: Array) -> Array:
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        out = attention(heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), mask=mask)
        return out.reshape(x.shape)


class Output(nnx.Module):
    """`LayerNorm(dense(y) + x)`, the end of a sublayer that made y of x."""

    def __init__(self, features_in: int, config: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(features_in, config.hidden_size, config, rngs, bias=True)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, config)

    def __call__(self, y: Array, x: Array) -> Array:
        return self.LayerNorm(self.dense(y) + x)


class Attention(nnx.Module):
    """Self-attention with its output, residual and norm."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.self = SelfAttention(config, rngs)
        self.output = Output(config.hidden_size, config, rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        return self.output(self.self(x, mask), x)


class Dense(nnx.Module):
    """`act(dense(x))`: the inner half of a feed-forward layer, or a pooler."""

    def __init__(self, features_out: int, act, config: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, features_out, config, rngs, bias=True)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return self.act(self.dense(x))


class Layer(nnx.Module):
    """`h = norm(x + attention(x)); norm(h + mlp(h))`."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.intermediate = Dense(config.intermediate_size, ACTIVATIONS[config.hidden_act], config, rngs)
        self.output = Output(config.intermediate_size, config, rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        h = self.attention(x, mask)
        return self.output(self.intermediate(h), h)


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.layer = stack(lambda rngs: Layer(config, rngs), config.num_hidden_layers, rngs)
        self.remat = config.remat

    def __call__(self, x: Array, mask: Array) -> Array:
        step = lambda layer, x, _: (layer(x, mask), None)
        return scan_layers(self.layer, step, x, remat=self.remat)[0]


class ClassificationHead(nnx.Module):
    """RoBERTa's: `out_proj(tanh(dense(x)))`."""

    def __init__(self, num_labels: int, config: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.hidden_size, config, rngs, bias=True)
        self.out_proj = Linear(config.hidden_size, num_labels, config, rngs, bias=True)

    def __call__(self, x: Array) -> Array:
        return self.out_proj(jnp.tanh(self.dense(x)))


class Bert(nnx.Module):
    """Tokens to hidden states, and hidden states to the pooled vector or the logits of labels."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)
        if config.pools:
            self.pooler = Dense(config.hidden_size, jnp.tanh, config, rngs)
        if (labels := config.num_labels) is not None:
            linear = lambda: Linear(config.hidden_size, labels, config, rngs, bias=True)
            self.classifier = linear() if config.pools else ClassificationHead(labels, config, rngs)
        self.config = config

    def hidden(self, tokens: Array, token_type_ids=None, segment_ids=None, positions=None) -> Array:
        """`(batch, length, features)`."""
        segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids.astype(jnp.int32)
        types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
        positions = _positions(tokens, segments, self.config.padding_position) if positions is None else positions
        x = self.embeddings(tokens, types, positions)
        # What padding sees matters to nobody; in transformers, too, it sees every token.
        ours, theirs = segments[:, :, None], segments[:, None, :]
        mask = ((ours == theirs) | (ours == 0)) & (theirs != 0)
        return self.encoder(x.astype(self.config.dtype or x.dtype), mask[:, None])

    def pooled(self, hidden: Array) -> Array:
        """`(batch, length, features) -> (batch, features)`, from the first token."""
        return self.pooler(hidden[:, 0])

    def logits(self, hidden: Array) -> Array:
        """`(batch, length, features) -> (batch, labels)` in float32, from the first token."""
        first = self.pooled(hidden) if self.config.pools else hidden[:, 0]
        return self.classifier(first).astype(jnp.float32)


def _positions(tokens: Array, segments: Array, padding_position: int | None) -> Array:
    """Each token's position; every segment of a row but the first starts again.

    A mask (of one segment) moves no position: BERT counts what is masked too. RoBERTa counts all but padding tokens,
    from `padding_position + 1` on, wherever the mask is.
    """
    places = jnp.arange(tokens.shape[1])
    last = jax.lax.cummax(jnp.where(segments != 0, places, -1), axis=1)  # of a place, the last one in any segment
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1)
    begins = (segments != 0) & (before >= 0) & (segments != previous)

    counted = jnp.ones_like(tokens) if padding_position is None else (tokens != padding_position).astype(tokens.dtype)
    count = jnp.cumsum(counted, axis=1)
    in_segment = count - jax.lax.cummax(jnp.where(begins, count - counted, 0), axis=1)
    return in_segment - 1 if padding_position is None else in_segment * counted + padding_position


@dataclass(frozen=True)
class BertApply(Apply):
    """The pure function of an encoder: `apply(params, tokens)`. It compares and hashes by its config.

    It gives logits `(batch, labels)` in float32 where the model has a head for labels, read from each row's first
    token, and else the hidden states `(batch, length, features)`. Tokens are `(batch, length)` integers.
    `segment_ids (batch, length)` says which tokens see each other, 0 is padding: an attention mask of ones and zeros
    is such. Where a position or a token type has no row in its table the result is NaN.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="bert", vocab_size=32, hidden_size=16, intermediate_size=24,
    ...               num_hidden_layers=2, num_attention_heads=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config, num_labels=3)
    >>> tokens, mask = jnp.array([[1, 2, 3], [1, 4, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]])
    >>> apply(params, tokens, segment_ids=mask).shape, apply.hidden(params, tokens, segment_ids=mask).shape
    ((2, 3), (2, 3, 16))
    """

    config: BertConfig

    MODULE = Bert
    TENSORS = BERT_TENSORS
    RENAMED = BERT_RENAMED
    HEAD = (r"^classifier/", r"^pooler/")
    NAMES: ClassVar[dict[str, str]] = {"bert": "Bert"}  # Hugging Face's classes by model_type
    MODEL_TYPES = tuple(NAMES)
    HEAD_POOLS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, Any]] = {"type_vocab_size": 2, "max_position_embeddings": 512}

    @property
    def task(self) -> str:
        """HF PEFT's word for a classifier of sequences, or for an encoder."""
        return "FEATURE_EXTRACTION" if self.config.num_labels is None else "SEQ_CLS"

    def __call__(self, params, tokens, token_type_ids=None, *, segment_ids=None, positions=None) -> Array:
        """Logits of labels, or hidden states where the model has no head for labels.

        Raises:
            ValueError: where the inputs do not fit together.
        """
        hidden = self.hidden(params, tokens, token_type_ids, segment_ids=segment_ids, positions=positions)
        return hidden if self.config.num_labels is None else self.run("logits", params, hidden)

    def hidden(self, params, tokens, token_type_ids=None, *, segment_ids=None, positions=None) -> Array:
        """The final hidden states `(batch, length, features)`."""
        check_tokens(tokens, token_type_ids=token_type_ids, segment_ids=segment_ids, positions=positions)
        return self.run("hidden", params, tokens, token_type_ids, segment_ids, positions)

    def pooled(self, params, hidden) -> Array:
        """The pooler on hidden states: `(batch, length, features) -> (batch, features)`.

        Raises:
            ValueError: the model has no pooler.
        """
        if not self.config.pools:
            raise ValueError("expected a model with a pooler; this one's config is of an architecture without one")
        return self.run("pooled", params, hidden)

    @classmethod
    def architectures(cls, model_type: str) -> dict[str, tuple[bool, bool]]:
        """Hugging Face's names of the models that can be made here, and whether each has a pooler and labels."""
        name = cls.NAMES[model_type]
        return {
            f"{name}Model": (True, False),
            f"{name}ForPreTraining": (True, False),
            f"{name}ForMaskedLM": (False, False),
            f"{name}ForSequenceClassification": (cls.HEAD_POOLS, True),
        }

    @classmethod
    def describe(cls, given: dict[str, Any], num_labels: int | None) -> dict[str, Any]:
        """The config, or that of a classifier of so many labels; the labels' names stay where there are as many.

        Raises:
            ValueError: less than one label.
        """
        if num_labels is None:
            return given
        if num_labels < 1:
            raise ValueError(f"expected at least one label, got {num_labels=}")
        kept = {key: value for key, value in given.items() if key not in ("num_labels", "id2label", "label2id")}
        names = given.get("id2label")
        names = names if names and len(names) == num_labels else {str(k): f"LABEL_{k}" for k in range(num_labels)}
        labels = {"id2label": names, "label2id": {name: int(k) for k, name in names.items()}}
        known = set(given.get("architectures") or ()) <= set(cls.architectures(given["model_type"]))
        name = f"{cls.NAMES[given['model_type']]}ForSequenceClassification"
        return kept | labels | ({"architectures": [name]} if known else {})

    @classmethod
    def parse(cls, given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> BertApply:
        """The apply function that a Hugging Face config describes.

        Raises:
            ValueError: everything about the config that the model would have to ignore (but dropout), all together.
        """
        architectures = cls.architectures(given["model_type"])
        problems = absent(given, REQUIRED) or _problems(given, architectures) + common_problems(given, remat)
        refuse("the encoder", problems)
        get = lambda key, default: default if given.get(key) is None else given[key]
        pools, has_labels = architectures[get("architectures", [])[0]] if given.get("architectures") else (True, False)
        num_labels = len(given.get("id2label") or ()) or get("num_labels", 2)
        config = BertConfig(
            **{key: given[key] for key in REQUIRED},
            **{key: get(key, default) for key, default in cls.DEFAULTS.items()},
            hidden_act=get("hidden_act", "gelu"),
            layer_norm_eps=float(get("layer_norm_eps", 1e-12)),
            padding_position=cls.padding_position(given),
            pools=pools,
            num_labels=num_labels if has_labels else None,
            **common_fields(given, dtype, param_dtype, remat),
        )
        return cls(config)

    @classmethod
    def padding_position(cls, given: dict[str, Any]) -> int | None:
        """See `BertConfig`."""
        return None

    @property
    def ignored(self) -> tuple[str, ...]:
        """The heads of pretraining, buffers, and the pooler where the architecture has none."""
        return HF_IGNORED + (() if self.config.pools else HF_IGNORED_WITHOUT_POOLER)


@dataclass(frozen=True)
class RobertaApply(BertApply):
    """The pure function of RoBERTa or XLM-R; all is as in `BertApply`.

    >>> import jax, jax.numpy as jnp, jpeft.models
    >>> config = dict(model_type="roberta", vocab_size=32, hidden_size=16, intermediate_size=24,
    ...               num_hidden_layers=2, num_attention_heads=2)
    >>> apply, params = jpeft.models.init(jax.random.key(0), config, num_labels=3)
    >>> apply(params, jnp.array([[0, 5, 2], [0, 2, 1]])).shape
    (2, 3)
    """

    TENSORS = ROBERTA_TENSORS
    RENAMED = ROBERTA_RENAMED
    NAMES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
    MODEL_TYPES = tuple(NAMES)
    HEAD_POOLS = False

    @classmethod
    def padding_position(cls, given: dict[str, Any]) -> int:
        """See `BertConfig`."""
        return 1 if given.get("pad_token_id") is None else given["pad_token_id"]
