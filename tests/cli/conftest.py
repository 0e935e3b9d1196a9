"""The tiny model and data of these tests."""

from tiny_llama import data_file, tiny  # noqa: F401
