"""What the manual says in words is what the records have. Its code is run by `make test-docs`."""

import json
from pathlib import Path

import convergence
import pytest

ROOT = Path(__file__).parents[1]


def test_best_rate_of_sumo_is_five_times_that_of_adamw():
    best = {row["entry"]: row["learning_rate"] for row in convergence.summarize()}
    assert best["sumo"] == pytest.approx(5 * best["adamw"])
    words = " ".join((ROOT / "docs/coming_from.md").read_text().split())
    assert "the best rate for SUMO is five times AdamW's best" in words


def test_subspaces_are_as_good_as_recorded():
    descent, svd = json.loads((ROOT / "benchmarks/results/subspace.json").read_text())["rows"]
    words = " ".join((ROOT / "docs/mathematics.md").read_text().split())
    assert f"was at most {descent['largest_orthogonality_error']:.2f}," in words
    assert f"captured {descent['mean_energy']:.2f} of the energy" in words
    assert f"every 200 steps captured {svd['mean_energy']:.2f}" in words


def test_every_page_is_in_the_contents():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    contents = set((ROOT / "docs/index.md").read_text().split())
    assert pages and pages <= contents
