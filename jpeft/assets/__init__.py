"""What `jpeft train` runs on when it is given nothing: a small pretrained model and a task built at run time."""

import pathlib

from .docstrings import summaries as summaries

__all__ = ["model_path", "summaries"]


def model_path() -> pathlib.Path:
    """The embedded model's folder, in Hugging Face format; `scripts/pretrain_embedded.py` trained it."""
    return pathlib.Path(__file__).parent / "docstring-llama"
