"""The notebooks are their text, share their model, and run from top to bottom."""

import os
import re
from pathlib import Path

import jupytext
import nbclient
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["first_steps", "why_exact", "on_a_mesh", "tuning"]


def cells(path):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_each_is_its_text():
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in NAMES:
        assert cells(FOLDER / f"{name}.ipynb") == cells(FOLDER / f"{name}.py"), (
            f"notebooks/{name}: make notebooks brings both in line"
        )


def test_each_installs_first_on_colab():
    for name in NAMES:
        first = next(source for kind, source in cells(FOLDER / f"{name}.py") if kind == "code")
        assert '"google.colab" in sys.modules' in first and '"sumo-optax"' in first


def test_all_have_the_same_model():
    parts = [
        re.search(
            r"# ## A small transformer\n.*?(?=# %% \[markdown\]|# %%\nSTEPS)", text, re.DOTALL
        )
        for name in NAMES
        if "A small transformer" in (text := (FOLDER / f"{name}.py").read_text())
    ]
    assert len(parts) == 3 and len({part and part[0].strip() for part in parts}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, monkeypatch):
    # Its own flags, not those of the tests.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    notebook = jupytext.read(FOLDER / f"{name}.ipynb")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(
        cwd=str(tmp_path), env=dict(os.environ)
    )
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not any(output.output_type == "error" for output in outputs)
