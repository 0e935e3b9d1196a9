"""Plain Flax models as pure functions of parameter trees, loaded from and saved to Hugging Face folders."""

from jpeft.models.apply import FAMILIES, abstract, init, init_cache, load, save
from jpeft.models.causal import Cache
from jpeft.models.config import DecoderConfig
from jpeft.models.family import Apply

__all__ = ["FAMILIES", "Apply", "Cache", "DecoderConfig", "abstract", "init", "init_cache", "load", "save"]
