"""The curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_losses(rows: Sequence[Mapping[str, float]], title: str, unit: str, path: Path) -> None:
    """Draws training and validation loss over steps."""
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    validated = [row for row in rows if "validation_loss" in row]

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", label="training, smoothed")
    axes.plot(
        [row["step"] for row in validated],
        [row["validation_loss"] for row in validated],
        "o-",
        color="tab:orange",
        label="validation",
    )
    axes.set(title=title, xlabel="step", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# Of `subspace_metrics`: what is drawn, and how.
SUBSPACE = {
    "captured": ("gradient energy foreseen", "linear"),
    "rotation": ("rotation of the basis", "linear"),
    "condition_number": ("condition of the worst moment", "log"),
    "effective_rank": ("effective rank, mean", "linear"),
}


def plot_subspace(rows: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Draws how the subspaces did over steps."""
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, (label, scale)) in zip(
        figure.subplots(2, 2).flat, SUBSPACE.items(), strict=True
    ):
        axes.plot(steps, [row[name] for row in rows], color="tab:blue", linewidth=0.8)
        axes.set(xlabel="step", ylabel=label, yscale=scale)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def smooth(values: np.ndarray) -> np.ndarray:
    """Each value's mean with those around it, over a fiftieth of the run; fewer at the ends."""
    reach = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    first = np.maximum(np.arange(len(values)) - reach, 0)
    return (total[last] - total[first]) / (last - first)
