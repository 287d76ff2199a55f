"""The notebooks are their text and share their model; the manual runs them."""

import re
import subprocess
import sys
from pathlib import Path

import jupytext
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


@pytest.mark.parametrize(
    ("there", "released", "asked"),
    [
        (True, True, []),
        (False, True, ["sumo-optax"]),
        (False, False, ["sumo-optax", "sumo-optax @ git+https://"]),
    ],
)
def test_each_installs_first(monkeypatch, there, released, asked):
    """From the index, and before there is a release, from the repository."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0 if released else 1)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: there or None)
    monkeypatch.setattr("subprocess.run", run)
    for name in NAMES:
        commands.clear()
        first = next(source for kind, source in cells(FOLDER / f"{name}.py") if kind == "code")
        exec(first, {})
        assert len(commands) == len(asked)
        for command, package in zip(commands, asked, strict=True):
            assert command[:4] == [sys.executable, "-m", "pip", "install"]
            assert command[-1].startswith(package)


def test_all_have_the_same_model():
    parts = [
        re.search(
            r"# ## A small transformer\n.*?(?=# %% \[markdown\]|# %%\nSTEPS)", text, re.DOTALL
        )
        for name in NAMES
        if "A small transformer" in (text := (FOLDER / f"{name}.py").read_text())
    ]
    assert len(parts) == 3 and len({part and part[0].strip() for part in parts}) == 1
