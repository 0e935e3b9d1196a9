"""P-tuning: HF PEFT's encoders on a whole model, published counts, and what is left when training is over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_prompts import assert_same_as_peft_prompt

import jpeft

KEY = jax.random.key(0)


def mlp_tensors(encoder):
    return [encoder.embedding.weight, *(p for n in (0, 2, 4) for p in encoder.mlp_head[n].parameters())]


def lstm_tensors(encoder):
    lstm = encoder.lstm_head
    ways = [(n, way) for n in range(lstm.num_layers) for way in ("", "_reverse")]
    cells = [getattr(lstm, f"{kind}_l{n}{way}") for n, way in ways for kind in KINDS]
    return [encoder.embedding.weight, *cells, *(p for n in (0, 2) for p in encoder.mlp_head[n].parameters())]


KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def mlp_fields(w):
    return [w.inputs, w.first.T, w.first_bias, w.hidden[0].T, w.hidden_bias[0], w.last.T, w.last_bias]


def lstm_fields(w):
    cells = []
    for n in range(len(w.recurrent)):
        for way in range(2):
            kernel = w.upper[n - 1, way] if n else w.lower[way]
            cells += [kernel.T, w.recurrent[n, way].T, w.input_bias[n, way], w.recurrent_bias[n, way]]
    return [w.inputs, *cells, w.first.T, w.first_bias, w.last.T, w.last_bias]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("lstm", 2), ("lstm", 3), ("lstm", 1)])
def test_the_same_numbers_give_what_peft_gives(encoder, layers, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=7,
        encoder_num_layers=layers,
    )
    assert_same_as_peft_prompt(
        tmp_path,
        jpeft.PTuning(5, encoder=encoder, encoder_hidden_size=7, encoder_num_layers=layers),
        config,
        mlp_tensors if encoder == "mlp" else lstm_tensors,
        mlp_fields if encoder == "mlp" else lstm_fields,
        named=lambda w: {"prompt_embeddings": w.rows},
    )
