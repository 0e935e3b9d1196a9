"""HF PEFT's adapter folders, read and written: `adapter_config.json` and `adapter_model.safetensors`.

A stack of layers is one tensor a layer there, a kernel (in, out) is (out, in), `layers/attn/query/kernel` is
`base_model.model.model.layers.0.attn.query`. What the tensors of a method are called and how they lie is its `EXPORT`.
A fused kernel (queries, keys and values in one) is one module there too.
"""

from jpeft.interop.peft.reading import load
from jpeft.interop.peft.writing import save

__all__ = ["load", "save"]
