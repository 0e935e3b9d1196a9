"""Tiny random decoders, made once a session."""

import functools

import pytest
from tiny_decoders import FAMILIES, random_model


@functools.cache
def _model(family):
    return random_model(FAMILIES[family])


@pytest.fixture(scope="session", params=["llama3", "mistral", "qwen2-window", "qwen3"])
def decoder(request):
    """`(apply, params)` of families that between them have every feature."""
    return _model(request.param)


@pytest.fixture(scope="session")
def qwen3():
    return _model("qwen3")
