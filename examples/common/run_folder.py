"""The folder of a run: what it may overwrite, what belongs to it, its checkpoints."""

import contextlib
import json
import logging
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from common import processes

import sumo_optax

# Orbax logs, with tracebacks, what it then raises, and leaves coroutines that nothing awaits.
warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def ignore_late_answers(unraisable: Any, then: Any = sys.unraisablehook) -> None:
    """TensorStore's threads still report to a save or restore that has failed meanwhile."""
    if str(unraisable.exc_value) != "Event loop is closed":
        then(unraisable)


sys.unraisablehook = ignore_late_answers

# All that a run writes. Nothing else in its folder is ever deleted.
FILES = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
    "subspace.png",
    "tokenizer.json",
    "tensorboard",
    "wandb",
    "wandb.txt",
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
        part_of(path).unlink(missing_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where a file is while it is being written."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when it is done: who is killed leaves no half file."""
    part = part_of(path)
    yield part
    if part.exists():
        part.replace(path)


def check_same(out: Path, now: Mapping[str, Any]) -> None:
    """Refuses to resume a run of another configuration, naming all that differs."""
    path = out / "config.json"
    try:
        then = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        if any((out / "checkpoints").glob("[0-9]*")):
            raise ValueError(
                f"{path} is missing or torn: what this run was is not known; start with another"
                " --out"
            ) from None
        return  # it was killed before it had begun
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

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the last one first."""
        return sorted(self.manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, batches: grain.DatasetIterator, seconds: float) -> None:
        """Writes in the background what `restore` needs."""
        progress = {"seconds": seconds, "checksum": checksum(state, batches)}
        with self.failures_in_words():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(batches),
                    progress=ocp.args.JsonSave(progress),
                ),
                force=True,
            )

    def close(self) -> None:
        """Waits for what is being written."""
        with self.failures_in_words():
            self.manager.close()

    @contextlib.contextmanager
    def failures_in_words(self) -> Iterator[None]:
        """A full disk, in one line instead of Orbax's many."""
        try:
            yield
        except Exception as error:  # of the disk, the file system or Orbax: many types
            good = ", ".join(map(str, sorted(self.manager.all_steps(read=True)))) or "none"
            raise OSError(
                f"a checkpoint could not be written to {self.manager.directory}: {reason(error)};"
                f" those there are good: {good}"
            ) from None

    def check_shapes(self, state: Any) -> None:
        """Refuses checkpoints of other arrays than `state` has, naming all that differ."""
        for step in self.steps():
            try:
                then = self.manager.item_metadata(step)["state"].tree
            except Exception:  # torn, which `restore` will find
                continue
            try:
                sumo_optax.check_state(then, state)
            except ValueError as error:
                raise ValueError(
                    f"{self.manager.directory} is of another model or optimizer: {error}"
                ) from None
            return

    def restore(self, state: Any, batches: grain.DatasetIterator) -> tuple[int, Any, float] | None:
        """Step, state and seconds of the last checkpoint that can be read; None if there is none.

        Moves the batches to their place then. Deletes what cannot be read, once another could.
        """
        torn: dict[int, Exception] = {}
        for step in self.steps():
            found = None
            torn[step] = ValueError("another process cannot read it")
            try:
                found = self.read(step, state, batches)
            except Exception as error:  # of JSON, TensorStore or Orbax: many types
                torn[step] = error
            if processes.all_agree(found is not None) and found is not None:
                del torn[step]
                for bad, error in torn.items():
                    print(
                        f"warning: checkpoint {bad} cannot be read ({reason(error)});"
                        f" it is deleted, and step {step} is what there is",
                        file=sys.stderr,
                    )
                    self.manager.delete(bad)
                return step, *found
        if torn:
            error = next(iter(torn.values()))
            raise OSError(
                f"no checkpoint in {self.manager.directory} can be read ({reason(error)});"
                " start again with --overwrite"
            )
        return None

    def read(self, step: int, state: Any, batches: grain.DatasetIterator) -> tuple[Any, float]:
        """State and seconds at that step; an error if they are not what was saved."""
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                data=grain.checkpoint.CheckpointRestore(batches),
                progress=ocp.args.JsonRestore(),
            ),
        )
        if checksum(restored["state"], batches) != restored["progress"]["checksum"]:
            raise ValueError("its checksum is wrong")
        return restored["state"], restored["progress"]["seconds"]


def checksum(state: Any, batches: grain.DatasetIterator) -> int:
    """Of all bits of all arrays, however they are sharded, and of the place in the data."""
    sums = [int(x) for x in sums_of_bits(jax.tree.leaves(state))]
    return zlib.crc32(json.dumps([sums, str(batches.get_state())]).encode())


@jax.jit
def sums_of_bits(arrays: list[jax.Array]) -> list[jax.Array]:
    """Sums modulo 2³², for which order does not matter."""
    words = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return [jnp.sum(words(x), dtype=jnp.uint32) for x in arrays]


def reason(error: Exception) -> str:
    """What an error says, in a few words; of TensorStore's many, what the system says."""
    words = (str(error).splitlines() or [""])[0] or type(error).__name__
    system = re.search(r"([^:]+) \[os_error_code=", words)
    return system[1].strip() if system else words[:80]


class Metrics:
    """One JSON object a line, one line a step."""

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
        # A run that was killed may have gone on after its last checkpoint, and have left half a
        # line: those steps come again.
        rows = (json.loads(line) for line in lines if line.endswith("\n"))
        self.rows = [row for row in rows if row["step"] <= start]
        if processes.leads():
            with whole(path) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows."""
        self.rows += rows
        if not processes.leads():
            return
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
