"""HF PEFT's folders of prompts and prefixes: there and back, and the same in PEFT itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_folders import TOKENS, edit, started

import jpeft
from jpeft.interop import peft as folders

METHODS = {
    "PromptTuning": jpeft.PromptTuning(num_tokens=3),
    "PTuning": jpeft.PTuning(num_tokens=3, encoder_hidden_size=4),
    "MultitaskPromptTuning": jpeft.MultitaskPromptTuning(num_tokens=3, num_tasks=2, num_ranks=2),
    "PrefixTuning": jpeft.PrefixTuning(num_tokens=3, encoder_hidden_size=5),
    "PTuningV2": jpeft.PTuningV2(num_tokens=3),
    "LLaMAAdapter": jpeft.LLaMAAdapter(num_tokens=3, num_layers=1, gate="scalar", tanh=False),
}


def logits(apply, method, trainable, frozen):
    """Those of the tokens themselves."""
    batch = {"tokens": jnp.asarray(TOKENS)} | ({"tasks": jnp.array([1, 0])} if method.num_prompts > 1 else {})
    batch = jpeft.prompted(batch, method)
    more = {"positions": batch["positions"]} if "positions" in batch else {}
    run = jax.jit(lambda t, f: jpeft.lift(apply)(method.bind(t, f), batch["tokens"], **more))
    return np.asarray(run(trainable, frozen))[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize("tree", ["llama", "unrolled"])
@pytest.mark.parametrize("name", METHODS)
def test_round_trip_is_exact(name, tree, request, tmp_path):
    apply, params, sites = request.getfixturevalue(tree)
    method = METHODS[name]
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path, method, trainable, "base", frozen, sites=sites)
    again, trainable_again, frozen_again = folders.load(tmp_path, params, sites)
    plain, expected = method.exported(trainable, frozen)
    assert type(again) is type(plain) and again.num_tokens == plain.num_tokens
    for ours, theirs in zip(jax.tree.leaves(trainable_again), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if tree == "llama":
        wanted = logits(apply, method, trainable, frozen)
        np.testing.assert_allclose(logits(apply, again, trainable_again, frozen_again), wanted, atol=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_what_we_write_and_we_compute_what_it_writes(name, llama, base, tmp_path):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    apply, params, sites = llama
    method = METHODS[name]
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path / "ours", method, trainable, base, frozen, sites=sites)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    tasks = {"task_ids": torch.tensor([1, 0])} if method.num_prompts > 1 else {}
    mask = torch.ones(TOKENS.shape, dtype=torch.long)
    theirs = lambda: (
        model(torch.tensor(TOKENS), attention_mask=mask, **tasks).logits[:, -TOKENS.shape[1] :].detach().numpy()
    )
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()), rtol=1e-4)
    near(logits(apply, method, trainable, frozen), theirs())

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "prompt_encoder" in key or "adaption" in key:
                parameter += torch.randn_like(parameter) / 5
    model.save_pretrained(tmp_path / "theirs")
    near(logits(apply, *folders.load(tmp_path / "theirs", params, sites)), theirs())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PromptEncoderConfig", "PrefixTuningConfig"])
def test_what_peft_keeps_of_an_encoder_is_read(kind, llama, base, tmp_path):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    apply, params, sites = llama
    projected = {"prefix_projection": True} if kind == "PrefixTuningConfig" else {}
    config = getattr(peft, kind)(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM", **projected)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path)
    wanted = model(torch.tensor(TOKENS), attention_mask=torch.ones(TOKENS.shape, dtype=torch.long)).logits
    got = logits(apply, *folders.load(tmp_path, params, sites))
    np.testing.assert_allclose(got, wanted[:, -TOKENS.shape[1] :].detach().numpy(), atol=1e-4)


def test_what_does_not_fit_is_said_together(llama, tmp_path):
    _, params, sites = llama
    method = METHODS["PrefixTuning"]
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path, method, trainable, "base", frozen, sites=sites)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["token_dim"] == 12 and options["num_attention_heads"] == 1 and options["num_layers"] == 2
    edit(tmp_path, tensors=lambda t: t.update(prompt_embeddings=np.ones((3, 12)), more=np.ones(3)))
    with pytest.raises(ValueError, match=r"(?s)left over:\n\s*more \[3\]\n.*expected \[3, 48\], got \[3, 12\]"):
        folders.load(tmp_path, params, sites)
    edit(tmp_path, config={"num_transformer_submodules": 2})
    with pytest.raises(ValueError, match="num_transformer_submodules: 2"):
        folders.load(tmp_path, params, sites)


def test_peft_has_gates_of_its_own_kind(llama, tmp_path):
    _, params, sites = llama
    method = jpeft.LLaMAAdapter(num_tokens=3, num_layers=1)
    trainable, frozen = started(method, params, sites)
    with pytest.raises(ValueError, match="gate='scalar', tanh=False only, got gate='head', tanh=True"):
        folders.save(tmp_path, method, trainable, "base", frozen, sites=sites)


def test_the_order_of_apart_layers_needs_sites(unrolled, tmp_path):
    _, params, sites = unrolled
    method = METHODS["PTuningV2"]
    trainable, frozen = started(method, params, sites)
    with pytest.raises(ValueError, match="sites=sites"):
        folders.save(tmp_path, method, trainable, "base", frozen)
    assert not list(tmp_path.iterdir())
