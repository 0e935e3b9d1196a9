"""What holds for every test: eight virtual CPU devices, and little optimisation."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait by spinning: slow wherever cores are shared
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    # These compile a test in half the time; later jaxlibs do not know the flag.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import hypothesis
import jax
import pytest
from small_models import MODELS, Model, make_model

# Laws are about values, not speed.
jax.config.update("jax_disable_most_optimizations", True)

# The first example of a property compiles, which a deadline would call a failure.
hypothesis.settings.register_profile("jpeft", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("jpeft")


@pytest.fixture(params=MODELS)
def model(request) -> Model:
    return make_model(request.param)


def pytest_collection_modifyitems(items):
    """The laws of one method on one model next to each other, so that one worker makes what they share once."""
    together = lambda item: (
        item.callspec.id if item.path.name == "test_contract.py" and hasattr(item, "callspec") else ""
    )
    items.sort(key=lambda item: (str(item.path), together(item)))


_MAPPINGS = 30_000
_RUN = 0


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs in time: each maps memory, and Linux gives a process 65,530 mappings."""
    global _RUN
    _RUN += 1
    if _RUN % 50 == 0 and _mappings() > _MAPPINGS:
        jax.clear_caches()


def _mappings() -> int:
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
