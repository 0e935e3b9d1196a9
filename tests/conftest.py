"""What holds for every test: eight virtual CPU devices, and little optimisation."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest
from small_models import MODELS, Model, make_model

# Laws are about values, not speed: little optimisation, and compiled programs kept between runs.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(params=MODELS)
def model(request) -> Model:
    return make_model(request.param)
