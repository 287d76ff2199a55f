"""Where metrics go beside their file: TensorBoard, Weights & Biases."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import processes
from common.options import RunOptions

# Takes rows of metrics, each with its `step`.
Log = Callable[[list[dict[str, Any]]], None]


def check(output: RunOptions) -> None:
    """Refuses what is asked for where its library is missing."""
    asked = {"tensorboard": (output.tensorboard, "tensorboardX"), "wandb": (output.wandb, "wandb")}
    for option, (wanted, library) in asked.items():
        if wanted and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"--{option} needs {library}, which is not installed: pip install {library}"
            )


@contextlib.contextmanager
def opened(
    output: RunOptions, out: Path, record: Mapping[str, Any], start: int
) -> Iterator[list[Log]]:
    """Those that are asked for, of a run that goes on after the step `start`."""
    logs: list[Log] = []
    with contextlib.ExitStack() as stack:
        if processes.leads() and output.tensorboard:
            logs.append(stack.enter_context(tensorboard(out / "tensorboard", start)))
        if processes.leads() and output.wandb:
            logs.append(stack.enter_context(wandb(output.wandb, out, record)))
        yield logs


@contextlib.contextmanager
def tensorboard(folder: Path, start: int) -> Iterator[Log]:
    """Writes event files; those of steps that come again are dropped by TensorBoard."""
    library: Any = importlib.import_module("tensorboardX")
    # What was written after the checkpoint that the run goes on from comes again.
    with library.SummaryWriter(str(folder), purge_step=start + 1) as writer:

        def log(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        writer.add_scalar(name, value, row["step"])

        yield log


@contextlib.contextmanager
def wandb(project: str, out: Path, record: Mapping[str, Any]) -> Iterator[Log]:
    """Sends rows to a run of that project, whose name is in the folder for who resumes."""
    library: Any = importlib.import_module("wandb")
    name = out / "wandb.txt"
    known = name.read_text().strip() if name.exists() else None
    with library.init(
        project=project, name=out.name, dir=str(out), config=dict(record), id=known, resume="allow"
    ) as run:
        name.write_text(f"{run.id}\n")

        def log(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

        yield log
