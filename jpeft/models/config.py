"""What a decoder of the Llama shape is made of, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jpeft.models.family import Config, absent, common_fields, common_problems, refuse

__all__ = ["FAMILIES", "DecoderConfig", "Rope", "parse_config"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched to longer contexts."""

    theta: float = 10_000.0
    kind: str = "default"  # "default", "linear" or "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # the last three are read by "llama3" only
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class DecoderConfig(Config):
    """A decoder-only transformer of the Llama shape; `windows` has each layer's sliding window, None for none."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False


# What a family's config.json leaves unsaid, and what it takes from which key.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"qkv_bias": True, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {"qk_norm": True, "head_dim": 128, "max_position_embeddings": 32_768, "sliding_window": 4096},
}
HONOURS = {  # keys that only some families know
    "attention_bias": ("llama", "qwen3"),
    "mlp_bias": ("llama",),
    "use_sliding_window": ("qwen2", "qwen3"),
    "layer_types": ("qwen2", "qwen3"),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def parse_config(given: dict[str, Any], *, dtype: Any, param_dtype: Any, remat: str | None) -> DecoderConfig:
    """A `DecoderConfig` from what Hugging Face writes for Llama, Mistral, Qwen2 and Qwen3.

    Raises:
        ValueError: everything about the config that the decoder would not honour, all together.
    """
    family = given["model_type"]

    def get(key: str, default: Any = None) -> Any:
        return default if given.get(key) is None else given[key]

    refuse("the decoder", absent(given, REQUIRED) or _problems(given, family) + common_problems(given, remat))
    defaults = FAMILIES[family]
    heads, layers = given["num_attention_heads"], given["num_hidden_layers"]
    bias = bool(get("attention_bias", False))
    return DecoderConfig(
        **{key: int(given[key]) for key in REQUIRED},
        num_key_value_heads=int(get("num_key_value_heads", defaults.get("num_key_value_heads", heads))),
        head_dim=int(get("head_dim", defaults.get("head_dim", given["hidden_size"] // heads))),
        max_position_embeddings=int(get("max_position_embeddings", defaults.get("max_position_embeddings", 2048))),
        rms_norm_eps=float(get("rms_norm_eps", 1e-6)),
        rope=_rope(given),
        windows=_windows(given, family, layers),
        qkv_bias=defaults.get("qkv_bias", bias),
        output_bias=bias,
        mlp_bias=bool(get("mlp_bias", False)),
        qk_norm=defaults.get("qk_norm", False),
        tie_word_embeddings=bool(get("tie_word_embeddings", False)),
        **common_fields(given, dtype, param_dtype, remat),
    )


def _problems(given: dict, family: str) -> list[str]:
    """One line for everything that the decoder would have to ignore or guess."""
    found: list[str] = []
    say = lambda what, came: found.append(f"expected {what}, got {came}")
    heads = given["num_attention_heads"]
    kv_heads = given.get("num_key_value_heads") or FAMILIES[family].get("num_key_value_heads", heads)
    if heads % kv_heads:
        say(f"num_key_value_heads that divides num_attention_heads={heads}", kv_heads)
    if (given.get("hidden_act") or "silu") not in ("silu", "swish"):
        say("hidden_act 'silu'", repr(given["hidden_act"]))
    if given.get("attention_dropout"):
        say("attention_dropout 0.0", given["attention_dropout"])
    for key, families in HONOURS.items():
        if given.get(key) and family not in families:
            say(f"{key} only with model_type {' or '.join(families)}", f"{given[key]} with {family!r}")
    unknown = set(given.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        say("layer_types of 'full_attention' and 'sliding_attention'", sorted(unknown))
    if given.get("layer_types") and len(given["layer_types"]) != given["num_hidden_layers"]:
        say(f"{given['num_hidden_layers']} layer_types", len(given["layer_types"]))
    causal = [name for name in given.get("architectures") or () if not name.endswith("ForCausalLM")]
    if causal:
        say("a causal language model (architectures ending in ForCausalLM)", causal)
    rope = _rope_dict(given)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or any(isinstance(v, dict) for v in rope.values()):
        say("a rope type of 'default', 'linear' or 'llama3', one for all layers", rope)
    lacking = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if missing := [key for key in lacking.get(kind, ()) if rope.get(key) is None]:
        say(f"{missing} in a rope of type {kind!r}", rope)
    partial = rope.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        say("partial_rotary_factor 1.0", partial)
    return found


def _rope_dict(given: dict) -> dict:
    """`rope_parameters` of newer configs; `rope_theta` and `rope_scaling` of older ones."""
    old = {"rope_theta": given.get("rope_theta"), **(given.get("rope_scaling") or {})}
    new = given.get("rope_parameters") or {}
    return {key: value for key, value in (old | new).items() if value is not None}


def _rope(given: dict) -> Rope:
    rope = _rope_dict(given)
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    read = fields if kind == "llama3" else fields[:1] if kind == "linear" else ()
    return Rope(float(rope.get("rope_theta", 10_000.0)), kind, **{key: rope[key] for key in read})


def _windows(given: dict, family: str, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window: Mistral's is one for all, Qwen's by `layer_types` or from `max_window_layers` on."""
    if family == "llama":
        return (None,) * layers
    window = given.get("sliding_window", FAMILIES[family]["sliding_window"])
    if family == "mistral":
        return (window,) * layers
    if not given.get("use_sliding_window"):
        return (None,) * layers
    full = given.get("max_window_layers", 28)
    kinds = given.get("layer_types") or ["sliding_attention" if k >= full else "full_attention" for k in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
