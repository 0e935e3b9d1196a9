"""The public surface: listed here, documented, and cheap to import."""

import inspect
import subprocess
import sys
import types

import pytest

import jpeft
from jpeft.quant import quantizers

FUNCTIONS = {
    "add_orthogonal_regularization",
    "attention",
    "calibrate",
    "chain",
    "combine",
    "count",
    "find_sites",
    "from_linen",
    "from_nnx",
    "intrinsic_dimension",
    "labels",
    "lift",
    "lora_plus",
    "merge",
    "methods",
}
FUNCTIONS |= {"offload", "partition", "prompted", "rank_allocator", "trainable_mask"}
CLASSES = {"DensifyError", "Method", "Site", "Sites", "Weight"}
CONSTANTS = {"VIRTUAL"}
DOCUMENTED = {**jpeft.methods(), **quantizers()}
HEAVY = ("torch", "transformers", "grain", "rich", "tyro", "matplotlib", "orbax", "flax", "optax", "safetensors")


def public():
    return {n: v for n, v in vars(jpeft).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}


def test_the_public_surface_is_what_is_listed_here():
    assert set(public()) == FUNCTIONS | CLASSES | CONSTANTS | set(DOCUMENTED)
    assert isinstance(jpeft.__version__, str)


@pytest.mark.parametrize("name", sorted(FUNCTIONS | CLASSES))
def test_what_is_exported_is_documented(name):
    value = getattr(jpeft, name)
    assert inspect.getdoc(value)
    if name in FUNCTIONS:
        for parameter in inspect.signature(value).parameters.values():
            assert parameter.name in inspect.getsource(value)
    else:
        methods = [m for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")]
        assert all(m.__doc__ for m in methods if m.__name__ != "replace"), value


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_method_documents_every_field_and_shows_an_example(name):
    text = inspect.getdoc(DOCUMENTED[name])
    own = DOCUMENTED[name].__annotations__
    assert all(field in text for field in own), [field for field in own if field not in text]
    assert ">>>" in text
    assert "arXiv" in inspect.getsource(inspect.getmodule(DOCUMENTED[name])), "the paper is cited"


def test_importing_jpeft_imports_nothing_heavy():
    code = "import jax, sys; before = set(sys.modules); import jpeft; new = set(sys.modules) - before; "
    code += f"print(*sorted({{m.split('.')[0] for m in new}} & set({HEAVY!r})))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_subpackages_load_on_first_use():
    code = "import sys, jpeft; assert 'jpeft.models' not in sys.modules; print(jpeft.models.load.__name__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "load"
    with pytest.raises(AttributeError, match="nothing_like_it"):
        jpeft.nothing_like_it  # noqa: B018
