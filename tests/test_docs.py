"""What the manual says in words is what the records have. Its code is run by `make test-docs`."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_best_rate_of_sumo_is_six_times_that_of_adamw():
    rows = json.loads((ROOT / "benchmarks/results/convergence.json").read_text())["rows"]
    best = {}
    for name in ("adamw", "sumo"):
        runs = [row for row in rows if row["optimizer"] == name]
        best[name] = min(runs, key=lambda row: row["validation_loss"])["learning_rate"]
    assert best["sumo"] == 6 * best["adamw"]
    words = " ".join((ROOT / "docs/coming_from.md").read_text().split())
    assert "the best rate for SUMO is six times AdamW's best" in words


def test_every_page_is_in_the_contents():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    contents = set((ROOT / "docs/index.md").read_text().split())
    assert pages and pages <= contents
