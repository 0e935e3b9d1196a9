"""Parameter-efficient fine-tuning as pure transforms of Flax parameter trees."""

import importlib
import pkgutil

from jpeft.core.attention import attention
from jpeft.core.calibrate import calibrate
from jpeft.core.chain import chain
from jpeft.core.count import count
from jpeft.core.doors import from_linen, from_nnx
from jpeft.core.find import find_sites
from jpeft.core.lift import DensifyError, lift
from jpeft.core.method import Method, labels, merge, trainable_mask
from jpeft.core.prompts import VIRTUAL, prompted
from jpeft.core.sites import Site, Sites
from jpeft.core.tree import combine, partition
from jpeft.core.weight import Weight
from jpeft.methods import *  # noqa: F403
from jpeft.methods import methods
from jpeft.methods._allocation import add_orthogonal_regularization, rank_allocator
from jpeft.methods._dimension_search import intrinsic_dimension
from jpeft.methods.lora import lora_plus
from jpeft.parallel.offload import offload
from jpeft.quant import FP4, NF4, Int8

__version__ = "0.1.0"


def __getattr__(name: str):
    """Subpackages on first use: `import jpeft` alone loads neither the models nor the trainer."""
    if name in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
