"""Adapters of HF PEFT on models that are no Llamas: fused kernels, and classifiers that train as they are."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.interop import peft as ours

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # their warnings, not ours

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
CASES = {  # Hugging Face's class, its config, PEFT's options
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=61, n_positions=32, n_embd=32, n_layer=3, n_head=4), "CAUSAL_LM"),
    "bert": ("BertForSequenceClassification", SIZES | dict(num_labels=3), "SEQ_CLS"),
    "roberta": ("RobertaForSequenceClassification", SIZES | dict(num_labels=3), "SEQ_CLS"),
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "value"], "roberta": ["query", "intermediate.dense"]}
TOKENS = jnp.arange(24).reshape(2, 12) % 50 + 5


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(TOKENS))).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_goes_from_peft_to_here_and_back(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    kind, config, task = CASES[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    base = cls(cls.config_class(**config))
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", task_type=task)
    tuned = peft.get_peft_model(base, lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.3)
    tuned.save_pretrained(tmp_path / "theirs")

    apply, params = models.load(tmp_path / "base")
    sites = jpeft.find_sites(apply, params, TOKENS)
    method, trainable, frozen = ours.load(tmp_path / "theirs", params, sites)
    logits = jpeft.lift(apply)(method.bind(trainable, frozen), TOKENS)
    assert np.abs(logits - apply(params, TOKENS)).max() > 0.1
    np.testing.assert_allclose(logits, torch_logits(tuned), rtol=0, atol=1e-5)

    options = dict(sites=sites, names=apply.names, task_type=apply.task)
    ours.save(tmp_path / "ours", method, trainable, tmp_path / "base", frozen, **options)
    again = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again), logits, rtol=0, atol=1e-5)
