"""What the README says is true: its code runs, and its figures are the recorded ones."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        scope = {}
        exec(block, scope)
        assert float(scope["loss"]) < 1.0, "twenty steps towards the identity on unit noise"


def test_figures_are_the_recorded_ones():
    rows = json.loads((ROOT / "benchmarks/results/convergence.json").read_text())["rows"]
    best = {}
    for row in rows:
        name = row["optimizer"]
        if name not in best or row["validation_loss"] < best[name]["validation_loss"]:
            best[name] = row
    for name, row in best.items():
        line = next(x for x in README.splitlines() if re.match(rf"\| {name}\b", x))
        for figure in (f"{row['validation_loss']:.4f}", f"{row['learning_rate']:g}"):
            assert f"| {figure} |" in line


def test_step_table_is_the_recorded_one():
    rows = json.loads((ROOT / "benchmarks/results/step_60m.json").read_text())["rows"]
    lines = README.splitlines()
    recorded = [
        f"| {r['optimizer']} | {r['over_adamw']:.2f} | {r['state_bytes'] / 2**20:.1f} |"
        for r in rows
    ]
    assert sum(line in lines for line in recorded) == 8
