"""Where metrics go: a file, and if asked TensorBoard and Weights & Biases."""

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import mesh
from common.run_folder import RunOptions

Rows = list[dict[str, Any]]  # each with its `step`


class Metrics:
    """One JSON object a line, one line a step; where asked, the same to boards."""

    def __init__(self, path: Path, start: int):
        self.path, self.rows, self.boards = path, Rows(), []
        if not (mesh.leads() and path.exists()):
            return
        # A run that was killed may have gone on after its last checkpoint, and have left half a
        # line: those steps come again.
        with path.open("rb+") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n") or (row := json.loads(line))["step"] > start:
                    break
                self.rows.append(row)
                end += len(line)
            file.truncate(end)

    def add(self, rows: Rows) -> None:
        """Writes rows."""
        self.rows += rows
        if mesh.leads():
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row, log in ((row, log) for row in rows for log in self.boards):
            log({name: value for name, value in row.items() if name != "step"}, row["step"])


def check(output: RunOptions) -> None:
    """Refuses what is asked for where its library is missing."""
    for asked, library in ((output.tensorboard, "tensorboardX"), (output.wandb, "wandb")):
        if asked:
            importlib.import_module(library)


@contextlib.contextmanager
def opened(
    output: RunOptions, out: Path, record: Mapping[str, Any], start: int
) -> Iterator[Metrics]:
    """The metrics of a run that goes on after the step `start`."""
    metrics = Metrics(out / "metrics.jsonl", start)
    with contextlib.ExitStack() as stack:
        if output.tensorboard and mesh.leads():
            library: Any = importlib.import_module("tensorboardX")
            # TensorBoard drops what was written of the steps that come again.
            writer = library.SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
            stack.enter_context(writer)
            add = lambda row, step: [writer.add_scalar(k, v, step) for k, v in row.items()]
            metrics.boards.append(add)
        if output.wandb and mesh.leads():
            library: Any = importlib.import_module("wandb")
            name = out / "wandb.txt"  # of the run there, for who resumes
            known = name.read_text().strip() if name.exists() else None
            run = library.init(
                project=output.wandb,
                name=out.name,
                dir=str(out),
                config=dict(record),
                id=known,
                resume="allow",
            )
            name.write_text(f"{stack.enter_context(run).id}\n")
            metrics.boards.append(lambda row, step: run.log(row, step=step))
        yield metrics
