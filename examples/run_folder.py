"""The folder of a run: what it may overwrite, what belongs to it, its checkpoints."""

import json
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import processes

# All that a run writes. Nothing else in its folder is ever deleted.
FILES = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
    "tokenizer.json",
    "checkpoints",
)


def choose(out: Path | None, default: Path, *, resume: bool, overwrite: bool) -> Path:
    """The folder to write to; refuses to start where a run is, and to resume where none is."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    if out is None:
        candidates = (
            default if i == 1 else default.with_name(f"{default.name}-{i}") for i in count(1)
        )
        taken = []
        for out in candidates:
            if not holds_run(out):
                break
            taken.append(out)
        if resume and taken:
            out = taken[-1]
        elif overwrite:
            out = default
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if resume and not holds_run(out):
        raise ValueError(f"{out} holds no run to resume; leave out --resume or name another --out")
    if holds_run(out) and not (resume or overwrite):
        raise ValueError(f"{out} holds a run already; give --resume, --overwrite or another --out")
    return out


def holds_run(out: Path) -> bool:
    """Whether a run has written there."""
    return any((out / name).exists() for name in FILES)


def clear(out: Path) -> None:
    """Deletes the run there, if any, and nothing else."""
    for name in FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_same(out: Path, now: Mapping[str, Any]) -> None:
    """Refuses to resume a run of another configuration, naming all that differs."""
    path = out / "config.json"
    if not path.exists():
        raise ValueError(
            f"{path} is missing: what this run was is not known; start with another --out"
        )
    then = json.loads(path.read_text())
    differences = [
        f"{name} was {then.get(name)}, now {now.get(name)}"
        for name in now | then
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{out} holds another run: {'; '.join(differences)}. Give the same or another --out"
        )


class Checkpoints:
    """The last checkpoints of a run: arrays, the place in the data, and the seconds trained."""

    def __init__(self, out: Path):
        handlers: dict[str, Any] = {
            "state": ocp.StandardCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(
            (out / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
            item_handlers=handlers,
        )

    def save(self, step: int, state: Any, batches: grain.DatasetIterator, seconds: float) -> None:
        """Writes in the background what `restore` needs."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(batches),
                progress=ocp.args.JsonSave({"seconds": seconds}),
            ),
            force=True,
        )

    def last_step(self) -> int:
        """The step of the last checkpoint."""
        step = self.manager.latest_step()
        if step is None:
            raise ValueError(
                f"{self.manager.directory} holds no checkpoint yet; start again with --overwrite"
            )
        return step

    def check_shapes(self, state: Any) -> None:
        """Refuses a checkpoint of other arrays than `state` has, naming the first that differs."""
        then = shapes(self.manager.item_metadata(self.last_step())["state"].tree)
        now = shapes(state)
        for name in now | then:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"{self.manager.directory} is of another model or optimizer: {name} was"
                    f" {then.get(name, 'absent')}, now {now.get(name, 'absent')}"
                )

    def restore(self, step: int, state: Any, batches: grain.DatasetIterator) -> tuple[Any, float]:
        """State and seconds at that step; moves the batches to their place then."""
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                data=grain.checkpoint.CheckpointRestore(batches),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["progress"]["seconds"]

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()


def shapes(tree: Any) -> dict[str, str]:
    """Type and shape of each array by its path."""
    return {
        jax.tree_util.keystr(
            path, simple=True, separator="/"
        ): f"{np.dtype(x.dtype)}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(tree)
    }


class Metrics:
    """One JSON object a line, one line a step."""

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = path.read_text().splitlines() if start else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= start]
        # A run that was killed may have gone on after its last checkpoint: those steps come again.
        if processes.leads():
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows."""
        self.rows += rows
        if not processes.leads():
            return
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
