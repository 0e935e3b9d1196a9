"""P-tuning v2: prefixes that train as they are, for understanding (Liu, Ji, Fu, Tam, Du, Yang and Tang 2021, arXiv
2110.07602).

    out = attention(Q, [P_K; K], [P_V; V])

P_K and P_V (*stack, num_tokens, kv_heads, head_dim), as in prefix tuning, with dropout on them and, by default, without
its MLP, which helps some tasks only; rates are high (5e-3 to 1e-2). The authors train a linear head with it
(`modules_to_save`). HF PEFT has no method of that name; its `PREFIX_TUNING` is this one without dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.methods._prefix import _Prefixing, fields_of
from jpeft.methods.prefixtuning import PrefixTuning

__all__ = ["PTuningV2"]


@dataclass(frozen=True)
class PTuningV2(_Prefixing):
    """Trained keys and values in every attention call. Not mergeable; not the pretrained function at the start.

    Trainable parameters: num_tokens · kv_heads · (head_dim + value_dim) for each call. HF PEFT gets the `PrefixTuning`
    that it amounts to.

    Fields:
        num_tokens: keys and values of the prefix, in each call; the paper has 8 to 128, more for harder tasks.
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
        >>> import jpeft
        >>> jpeft.PTuningV2(num_tokens=20).reparametrize
        False
    """

    num_tokens: int = 20
    reparametrize: bool = False
    encoder_hidden_size: int = 512
    embedding_size: int | None = None
    dropout: float = 0.1

    SMALL = {"num_tokens": 3}

    def exported(self, trainable, frozen):
        plain, trainable = super().exported(trainable, frozen)
        return PrefixTuning(**fields_of(plain)), trainable
