"""Tiny random decoders, made once a session."""

import functools

import pytest
from tiny_decoders import FAMILIES, random_model


@functools.cache
def _model(family):
    return random_model(FAMILIES[family])


@pytest.fixture(scope="session", params=FAMILIES)
def decoder(request):
    """`(apply, params)` of each family in turn."""
    return _model(request.param)


@pytest.fixture(scope="session")
def qwen3():
    return _model("qwen3")
