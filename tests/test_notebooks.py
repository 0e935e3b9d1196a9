"""Every notebook runs from top to bottom, and its two paired forms say the same."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))
jupytext = pytest.importorskip("jupytext")


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_paired_forms_agree(source):
    cells = lambda path: [(c.cell_type, c.source) for c in jupytext.read(path).cells]
    assert cells(source) == cells(source.with_suffix(".ipynb"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")
def test_it_runs(source):
    nbclient = pytest.importorskip("nbclient")
    notebook = jupytext.read(source)
    nbclient.NotebookClient(notebook, timeout=1500, kernel_name="python3").execute(cwd=str(source.parent))
    assert any(cell.get("outputs") for cell in notebook.cells)
