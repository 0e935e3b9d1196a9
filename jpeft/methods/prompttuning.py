"""Prompt tuning: trained rows in front of the input (Lester, Al-Rfou and Constant 2021, arXiv 2104.08691).

    E' = [P; E(x)]

P (*stack, num_tokens, out). Every other parameter is frozen. The prompt is token ids from `jpeft.VIRTUAL` on, which
`jpeft.prompted` puts into a batch and the embedding resolves; at generation they are the first tokens of the text.
The paper starts from class labels where there are any (`init_prompt="text"`, `fit="sample"`), else from common tokens
(`"vocabulary"`); its `"random"` is U(±0.5), HF PEFT's, here `"normal"`, is N(0, 1). Of an encoder-decoder the paper
prompts the encoder alone; HF PEFT counts rows for the decoder too, which its forward does not use.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.core.export import Export
from jpeft.core.sites import Site
from jpeft.methods._prompts import SIZES, STARTS, Prompt, _StartingRows

__all__ = ["PromptTuning"]

_ENCODER = ("reparameterization_type", "hidden_size", "num_layers", "dropout")


@dataclass(frozen=True)
class PromptTuning(_StartingRows):
    """Virtual tokens whose embeddings train. Not mergeable: they are tokens, not weights.

    Fields:
        num_tokens: virtual tokens of the prompt.
        init_prompt: `"random"`, U(±0.5); `"normal"`, N(0, 1); `"vocabulary"`, rows of random tokens; `"text"`, the rows
            of `init_text_ids`.
        init_text_ids: for each virtual token a token id, or several whose rows are averaged:
            `init_text_ids=tokenizer.encode(text).ids`.
        fit: of a text of another length: `"exact"` refuses it, `"repeat"` repeats and cuts it as HF PEFT does,
            `"sample"` samples what lacks from the vocabulary.
        sample_from: only the first so many ids are sampled; where ids are sorted by frequency, the commonest.
        targets: the token embedding. By default the one whose rows are the outputs of the vocabulary head, else the one
            with the most rows: others look up positions or types.

    Raises:
        ValueError: from the constructor: a number below 1, an unknown init_prompt or fit, a text that does
            not fit the prompt or is not given as ids; from `init`: an id that the embedding does not have, targets that
            match several embeddings, a prompt that stands there already.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda params, tokens: params["embed"][tokens]
        >>> params, batch = {"embed": jnp.ones((9, 4))}, {"tokens": jnp.array([[5, 6, 7]])}
        >>> method = jpeft.PromptTuning(num_tokens=2, init_prompt="text", init_text_ids=(3, 8))
        >>> halves = method.init(jax.random.key(0), params, jpeft.find_sites(apply, params, batch["tokens"]))
        >>> jpeft.lift(apply)(method.bind(*halves), jpeft.prompted(batch, method)["tokens"]).shape
        (1, 5, 4)
    """

    SMALL = {"num_tokens": 3}
    EXPORT = Export(
        peft_type="PROMPT_TUNING",
        whole={"prompt_embeddings": ("rows",)},
        config={"num_virtual_tokens": "num_tokens"},
        fixed={"prompt_tuning_init": "RANDOM"},
        neutral=SIZES | STARTS | {f"encoder_{name}": () for name in _ENCODER},
        reads=("P_TUNING",),  # PEFT keeps the finished rows of an encoder
    )

    def wrap(self, key, leaf, site: Site) -> Prompt:
        return Prompt(leaf, self.starting_rows(key, leaf, site), axes=site.axes.lstrip("s"))
