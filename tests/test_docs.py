"""Every example runs: docstrings, and the Python of README.md and docs/*.md."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import jpeft

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(jpeft.__path__, "jpeft.") if not m.name.endswith("__main__"))
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]


def doctests(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in doctests(module):
        runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


def test_the_examples_are_found():
    assert {t.name for t in doctests(importlib.import_module("jpeft.core.lift"))} >= {"jpeft.core.lift.lift"}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {"__name__": page.stem}
    for block in blocks:
        line = page.read_text()[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


def test_the_readme_lists_every_method():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [name for name in listed if name in jpeft.methods()] == list(jpeft.methods()), "scripts/methods_table.py"
