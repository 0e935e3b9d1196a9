"""Plain Flax models as pure functions of parameter trees, loaded from and saved to Hugging Face folders."""

from jpeft.models.apply import Apply, abstract, init, init_cache, load, save
from jpeft.models.config import DecoderConfig
from jpeft.models.decoder import Cache

__all__ = ["Apply", "Cache", "DecoderConfig", "abstract", "init", "init_cache", "load", "save"]
