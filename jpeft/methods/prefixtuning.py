"""Prefix tuning: trained keys and values before every layer's own (Li and Liang 2021, arXiv 2101.00190).

    out = attention(Q, [P_K; K], [P_V; V])

P_K and P_V (*stack, num_tokens, kv_heads, head_dim). While they train an MLP makes them, H = tanh(E·W + b),
P_K = H·W_K + b_K: the paper found training them directly unstable. E (num_tokens, embedding_size) and the first layer
are one for the model, W_K and W_V (*stack, hidden, kv_heads, head_dim) each call's own; `after_training` leaves the
plain prefix. HF PEFT has the MLP as an option that is off (`prefix_projection`), the paper always: here it is on.

The keys are used as they are: where a model turns keys by their positions, trained ones have none. The tokens'
positions begin behind the prefix, as they do for the authors and HF PEFT (`jpeft.prompted`, `position_shift`), for whom
it lies in the cache. A bias that the model adds to its scores (T5's) says nothing of the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.core.export import Export
from jpeft.methods._prefix import _Prefixing

__all__ = ["PrefixTuning"]

_NEUTRAL = ("token_dim", "num_layers", "num_attention_heads")
_NEUTRAL += ("encoder_hidden_size", "prefix_projection", "init_weights")


@dataclass(frozen=True)
class PrefixTuning(_Prefixing):
    """Trained keys and values in every attention call. Not mergeable; not the pretrained function at the start.

    Parameters in the end: num_tokens · kv_heads · (head_dim + value_dim) for each call; while the MLP is there, its own
    instead. Of an encoder-decoder the targets say which calls: the encoder's, the decoder's, those across.

    Fields:
        num_tokens: keys and values of the prefix, in each call.
        reparametrize: whether an MLP makes it while it trains.
        encoder_hidden_size: of the MLP's hidden layer.
        embedding_size: of the MLP's embedding; by default all heads' keys together, of the call that has most.
        dropout: rate on the prefix, for each row of a batch apart, on only while `bind` is given a key.
        init_prefix: `"normal"` (N(0, 1); the MLP as torch starts one), or `"zero"` (of the MLP the last layer).
        targets: attention calls, by the paths of the kernels that make their queries.

    Raises:
        ValueError: from the constructor: a size below 1, dropout outside [0, 1), an unknown init_prefix; from `init`: a
            model that calls no `jpeft.attention`.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> method = jpeft.PrefixTuning(num_tokens=20)
        >>> jpeft.prompted({"tokens": jnp.array([[5, 6, 7]])}, method)["positions"]
        Array([[20, 21, 22]], dtype=int32)
    """

    SMALL = {"num_tokens": 3, "encoder_hidden_size": 5}
    EXPORT = Export(
        peft_type="PREFIX_TUNING",
        whole={"prompt_embeddings": ("keys", "values")},
        config={"num_virtual_tokens": "num_tokens"},
        neutral={name: () for name in _NEUTRAL} | {"num_transformer_submodules": (1,)},
        required={"reparametrize": False},  # PEFT keeps what the MLP makes
    )
