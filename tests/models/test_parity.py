"""Logits equal those of `transformers`, in both directions, for every family."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import FAMILIES, random_model, tokens

from jpeft import models

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # their warnings, not ours


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(tokens()))).logits.numpy()


def random_torch_model(transformers, family):
    import torch

    config = dict(FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager"
    ).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.3) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, 0, 0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_folder_of_transformers_gives_the_same_logits_here(transformers, family, max_shard_size, tmp_path):
    model = random_torch_model(transformers, family)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    apply, params = models.load(tmp_path)
    expected = torch_logits(model)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(apply(params, tokens()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_ours_gives_the_same_logits_there(transformers, family, tmp_path):
    apply, params = random_model(FAMILIES[family])
    models.save(tmp_path / "model", params, FAMILIES[family], max_shard_bytes=20_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(torch_logits(model), apply(params, tokens()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folders_are_read_to_the_bit(transformers, dtype, tmp_path):
    import torch

    model = random_torch_model(transformers, "qwen2").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    _, params = models.load(tmp_path)
    ours = params["layers"]["self_attn"]["k_proj"]["kernel"]
    theirs = torch.stack([layer.self_attn.k_proj.weight.T for layer in model.model.layers]).float()
    assert ours.dtype.name == dtype
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.detach().numpy())
