"""The curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

# Of `subspace_metrics`: what is drawn, and how.
SUBSPACE = {
    "captured": ("gradient energy foreseen", "linear"),
    "rotation": ("rotation of the basis", "linear"),
    "condition_number": ("condition of the worst moment", "log"),
    "effective_rank": ("effective rank, mean", "linear"),
}


def plot_losses(rows: Rows, title: str, unit: str, path: Path) -> None:
    """Draws training and validation loss over steps."""
    steps, losses = (np.array([row[name] for row in rows]) for name in ("step", "loss"))
    validated = [(x["step"], x["validation_loss"]) for x in rows if "validation_loss" in x]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", label="training, smoothed")
    axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(title=title, xlabel="step", ylabel=f"loss ({unit})")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_subspace(rows: Rows, title: str, path: Path) -> None:
    """Draws how the subspaces did over steps."""
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    panels = zip(figure.subplots(2, 2).flat, SUBSPACE.items(), strict=True)
    for axes, (name, (label, scale)) in panels:
        axes.plot(steps, [row[name] for row in rows], color="tab:blue", linewidth=0.8)
        axes.set(xlabel="step", ylabel=label, yscale=scale)
    figure.savefig(path, dpi=150)


def smooth(values: np.ndarray) -> np.ndarray:
    """Each value's mean with those around it, over a fiftieth of the run; fewer at the ends."""
    near = np.ones(1 + 2 * (len(values) // 100))
    return np.convolve(values, near, "same") / np.convolve(np.ones(len(values)), near, "same")
