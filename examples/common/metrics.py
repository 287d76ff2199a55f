"""What is measured of a run: lines in a file, curves, and if asked TensorBoard and W&B."""

import contextlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import mesh
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]  # each with its `step`

# What is drawn where it is logged.
PANELS = ("loss", "captured", "rotation", "condition_number", "effective_rank")


class Metrics(contextlib.ExitStack):
    """One JSON object a line, one line a step; goes on after the step `start`."""

    def __init__(self, out: Path, start: int, options: Any, record: Mapping[str, Any]):
        super().__init__()
        self.path, self.rows, self.boards = out / "metrics.jsonl", Rows(), []
        if not mesh.leads():
            return
        self.path.touch()
        with self.path.open("rb+") as file:
            # A run that was killed may have gone on after its last checkpoint, and have left half
            # a line: those steps come again.
            whole = [line for line in file if line.endswith(b"\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= start]
            file.truncate(sum(map(len, kept)))
        self.rows += map(json.loads, kept)
        if options.tensorboard:
            library: Any = importlib.import_module("tensorboardX")
            # TensorBoard drops what was written of the steps that come again.
            board = library.SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
            add = self.enter_context(board).add_scalar
            self.boards.append(lambda row, t: [add(name, x, t) for name, x in row.items()])
        if options.wandb:
            library: Any = importlib.import_module("wandb")
            name = out / "wandb.txt"  # of the run there, for who resumes
            known = {"id": name.read_text() if name.exists() else None, "resume": "allow"}
            where = {"project": options.wandb, "name": out.name, "dir": str(out)}
            run = self.enter_context(library.init(config=dict(record), **where, **known))
            name.write_text(run.id)
            self.boards.append(lambda row, t: run.log(row, step=t))

    def add(self, rows: Rows) -> None:
        """Writes rows."""
        self.rows += rows
        if mesh.leads():
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row, log in ((row, log) for row in rows for log in self.boards):
            log({name: value for name, value in row.items() if name != "step"}, row["step"])


def plot(rows: Rows, path: Path) -> None:
    """Draws metrics over steps; of the loss, validation's too."""
    names = [name for name in PANELS if name in rows[-1]]
    figure = Figure(figsize=(7, 1 + 3 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False).flat, names, strict=True):
        for key, style in ((name, "-"), (f"validation_{name}", "o-")):
            seen = [row for row in rows if key in row]
            axes.plot([row["step"] for row in seen], [row[key] for row in seen], style)
        scale = "log" if name == "condition_number" else "linear"
        axes.set(xlabel="step", ylabel=name.replace("_", " "), yscale=scale)
    figure.savefig(path, dpi=150)
