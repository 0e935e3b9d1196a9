"""Who may import whom, and what no file may do: the layers of the design."""

import ast
import re
import sys
from pathlib import Path

import pytest

import jpeft

ROOT = Path(jpeft.__file__).parent
FILES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
MAY_IMPORT = {  # layer -> layers of jpeft
    "core": {"core"},
    "kernels": {"kernels"},
    "quant": {"core", "kernels", "quant"},
    "methods": {"core", "methods"},
    "parallel": {"core", "parallel"},
    "interop": {"core", "quant", "methods", "interop"},
    "models": {"core", "interop", "models"},
    "train": {"core", "parallel", "train"},
    "assets": {"assets"},
}
MAY_USE = {  # layer -> packages besides the standard library
    "core": {"jax", "numpy"},
    "kernels": {"jax", "jaxlib", "numpy"},
    "quant": {"jax", "numpy"},
    "methods": {"jax", "numpy"},
    "models": {"jax", "numpy", "flax"},
}


def layer(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def imported(path: Path, tree) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["jpeft", *path.parts[:-1]][: len(path.parts) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module or ""]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def for_type_checkers(tree) -> set[int]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def within_functions(tree) -> set[int]:
    functions = (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda)))
    return {id(inner) for function in functions for inner in ast.walk(function)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_layer_imports_only_the_layers_below_it(path):
    here = layer(path)
    if here not in MAY_IMPORT:
        assert here in ("", "cli"), f"{here} is a new layer: say what it may import"
        return
    for name in imported(path, FILES[path]):
        first, _, rest = name.partition(".")
        if first == "jpeft":
            assert rest.split(".")[0] in MAY_IMPORT[here], f"{path} imports {name}"
        elif here in MAY_USE and first not in sys.stdlib_module_names:
            assert first in MAY_USE[here] | lazily(path), f"{path} imports {name}"


def lazily(path: Path) -> set[str]:
    """Packages that a file may import inside its functions alone: the doors Flax; a method its optimizer's Optax, and
    Flax for the layers of a network that makes what it trains."""
    return {"flax"} if path == Path("core/doors.py") else {"optax", "flax"} if layer(path) == "methods" else set()


@pytest.mark.parametrize("path", [p for p in FILES if lazily(p)], ids=str)
def test_what_may_be_imported_lazily_is(path):
    tree = FILES[path]
    inside = within_functions(tree) | for_type_checkers(tree)
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and id(n) not in inside]
    assert not any(package in ast.unparse(n) for n in imports for package in lazily(path))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_reaches_into_jax_or_is_left_undone(path):
    text = (ROOT / path).read_text()
    assert "jax._src" not in text and "NotImplementedError" not in text
    assert not re.search(r"\bTODO\b(?!.*(until|when|once))", text)


def words(tree) -> set[str]:
    """Every identifier, and every word of a string that is no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, documented) and n.body and isinstance(n.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= set(re.findall(r"\w+", node.value))
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                found |= set(value.split("."))
    return found


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) in ("core", "parallel", "kernels")], ids=str)
def test_shared_code_names_no_method(path):
    methods = jpeft.methods()
    named = words(FILES[path]) & {form for name in methods for form in (name, name.lower())}
    assert not named, f"{path} names {', '.join(sorted(named))}; what it must know is data on the method's own class"


def test_words_are_found_in_code_and_not_in_docstrings():
    tree = ast.parse('"""LoRA"""\nimport a.lora\ndef f(IA3):\n    """OFT"""\n    return x.NF4 + "lora_A is/bitfit"')
    assert {"lora", "IA3", "NF4", "lora_A", "bitfit"} <= words(tree)
    assert not {"LoRA", "OFT"} & words(tree)
