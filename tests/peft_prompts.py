"""A tiny Llama in torch with one of PEFT's prompts, and the same model and prompt here."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import near

import jpeft

CONFIG = {
    "vocab_size": 41,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EMBEDDING = "embed_tokens/embedding"
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0], [31, 7, 8, 12, 0, 0]])
MASK = np.array([[1] * 6, [1] * 3 + [0] * 3, [1] * 4 + [0] * 2])


def tiny_llama(folder):
    """The torch model, saved in the folder too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    return model


def assert_same_as_peft_prompt(
    folder, method, config, theirs_of: Callable, ours_of: Callable, tasks=None, named: Callable = lambda w: {}
):
    """The same random trainables give the same logits, virtual tokens' included, and gradients, fp32 within 1e-5.

    `theirs_of(encoder)` are the trainables of PEFT's prompt encoder, `ours_of(weight)` ours in the same order and
    shapes; `named(weight)` is what PEFT's folder holds of it.
    """
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(folder), config).eval()
    apply, params = jpeft.models.load(folder)
    sites = jpeft.find_sites(apply, params, TOKENS)
    trainable, frozen = method.init(jax.random.key(0), params, sites)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: jnp.asarray(x + rng.normal(size=x.shape) / 3, x.dtype), trainable)
    weight_of = lambda half: half["embed_tokens"]["embedding"]

    theirs = theirs_of(model.prompt_encoder["default"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in theirs} == {id(p) for p in trained}, "all that PEFT trains, and nothing else"
    for parameter, value in zip(theirs, ours_of(weight_of(trainable)), strict=True):
        assert tuple(parameter.shape) == value.shape
        parameter.data = torch.from_numpy(np.array(value))

    batch = {"tokens": TOKENS, "mask": MASK} | ({} if tasks is None else {"tasks": tasks})
    batch = jpeft.prompted(batch, method)

    @jax.jit
    def run(trainable):
        def logits(trainable):
            bound = method.bind(trainable, frozen)
            return jpeft.lift(apply)(bound, batch["tokens"], segment_ids=batch["mask"])

        real = lambda logits: jnp.where(batch["mask"][..., None] == 1, logits, 0)
        return real(logits(trainable)), jax.grad(lambda t: jnp.sin(real(logits(t))).sum())(trainable)

    out, grads = run(trainable)
    extra = {} if tasks is None else {"task_ids": torch.from_numpy(tasks)}
    expected = model(torch.from_numpy(TOKENS), attention_mask=torch.from_numpy(MASK), **extra).logits
    expected = expected * torch.from_numpy(np.asarray(batch["mask"]))[..., None]
    torch.sin(expected).sum().backward()
    near(out, expected.detach().numpy())
    for parameter, grad in zip(theirs, ours_of(weight_of(grads)), strict=True):
        scale = max(1.0, float(np.abs(grad).max()))
        near(grad / scale, parameter.grad.numpy() / scale)
    kept_method, kept, _ = method.after_training(trainable, frozen)
    state = peft.get_peft_model_state_dict(model)
    ours = {name: np.asarray(x) for name, x in named(weight_of(kept)).items()}
    assert state.keys() == ours.keys(), kept_method
    for name, tensor in state.items():
        near(ours[name], tensor.detach().numpy())
