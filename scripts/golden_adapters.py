"""Golden vectors of the `adapters` package (AdapterHub), which cannot live beside transformers 5.

    python -m venv env && env/bin/pip install torch==2.13.0 adapters==1.3.0      # brings transformers 4.57
    env/bin/python scripts/golden_adapters.py tests/golden/adapters

Writes `base/`, a tiny BERT as Hugging Face saves it, and one safetensors file a configuration: the adapter's tensors by
their own names, `tokens`, the `output` (the last hidden states), and `grad.NAME`, the gradients of sum(sin(output)).
"""

import sys
from pathlib import Path

import adapters
import torch
from adapters.composition import Fuse
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

CONFIGS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "houlsby_norms": adapters.DoubleSeqBnConfig(
        reduction_factor=4, ln_before=True, ln_after=True, non_linearity="gelu"
    ),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False),
    "parallel": adapters.ParBnConfig(reduction_factor=2),
    "compacter": adapters.CompacterConfig(reduction_factor=2),
}


def base() -> BertModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = BertConfig(vocab_size=20, max_position_embeddings=8, attn_implementation="eager", **sizes)
    model = BertModel(config).eval()
    shaken(model.parameters(), 0.2)
    return model


def shaken(parameters, size: float) -> None:
    """Every number away from its start, so that no zero and no one hides a mistake."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn_like(parameter)


def write(path: Path, model) -> None:
    model.eval()
    own = {n: p for n, p in model.named_parameters() if "adapter" in n or "shared_parameters" in n}
    for parameter in own.values():
        parameter.requires_grad_(True)
    shaken(own.values(), 0.3)
    tokens = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(1))
    output = model(tokens).last_hidden_state
    torch.sin(output).sum().backward()
    grads = {f"grad.{n}": p.grad for n, p in own.items() if p.grad is not None}
    found = {"tokens": tokens, "output": output.detach(), **{n: p.detach() for n, p in own.items()}, **grads}
    save_file({n: x.contiguous().clone() for n, x in found.items()}, path)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base().save_pretrained(folder / "base")
    for name, config in CONFIGS.items():
        model = base()
        adapters.init(model)
        model.add_adapter("a", config=config)
        model.set_active_adapters("a")
        write(folder / f"{name}.safetensors", model)
    model = base()
    adapters.init(model)
    for name in ("a", "b"):
        model.add_adapter(name, config=CONFIGS["pfeiffer"])
    model.add_adapter_fusion(["a", "b"])
    model.set_active_adapters(Fuse("a", "b"))
    write(folder / "fusion.safetensors", model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
