"""The folder of a run: what it may overwrite, and its checkpoints."""

import contextlib
import dataclasses
import itertools
import json
import logging
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from common import mesh

import sumo_optax

# Orbax logs what it then raises, with tracebacks, and leaves coroutines that nothing awaits.
# TensorStore's threads report to a save that has failed meanwhile.
warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
hook = sys.unraisablehook
sys.unraisablehook = lambda x: None if "loop is closed" in str(x.exc_value) else hook(x)

# All that a run writes. Nothing else in its folder is ever deleted.
FILES = "config.json summary.json tokenizer.json metrics.jsonl loss.png subspace.png wandb.txt"
FILES = [*FILES.split(), "tensorboard", "wandb", "checkpoints"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is written, and where."""

    out: Path | None = None  # Folder to write to, by default a new one in runs/.
    resume: bool = False  # Go on from the last checkpoint.
    overwrite: bool = False  # Delete the run in the folder first.
    tensorboard: bool = False  # Write the metrics for TensorBoard, too, into OUT/tensorboard.
    wandb: str | None = None  # Send the metrics to this project of Weights & Biases, too.

    def check(self) -> None:
        """Refuses numbers that make no sense, among those of a program too."""
        for name, value in vars(self).items():
            least = 1 if type(value) is int and name not in ("seed", "process") else 0
            if type(value) in (int, float) and not value >= least:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least {least}, got {value}")


def choose(output: RunOptions, default: Path) -> Path:
    """The folder to write to; refuses to start where a run is, and to resume where none is."""
    if output.resume and output.overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    if output.out is None:
        name = lambda i: default.with_name(f"{default.name}-{i}") if i > 1 else default
        free = next(i for i in itertools.count(1) if not holds_run(name(i)))
        out = default if output.overwrite else name(free - 1 if output.resume else free)
    else:
        out = output.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if output.resume and not holds_run(out):
        raise ValueError(f"{out} holds no run to resume; leave out --resume or name another --out")
    if holds_run(out) and not (output.resume or output.overwrite):
        raise ValueError(f"{out} holds a run already; give --resume, --overwrite or another --out")
    return out


def holds_run(out: Path) -> bool:
    """Whether a run has written there."""
    return any((out / name).exists() for name in FILES)


def clear(out: Path) -> None:
    """Deletes the run there, if any, and nothing else."""
    for path in (out / name for name in FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class OtherRun(ValueError):
    """The folder has checkpoints of another configuration."""


class Checkpoints:
    """The last checkpoints of a run: its arrays, and in `progress` all else that it goes on with.

    Orbax writes them in the background and makes them visible when they are whole. It does not see
    a bit that has flipped in one: that is what the sums and the checksum are for.
    """

    def __init__(self, out: Path, record: Mapping[str, Any]):
        self.record = record  # what makes this run this run, as JSON
        self.manager = ocp.CheckpointManager(
            (out / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the last one first."""
        return sorted(self.manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, batches: grain.DatasetIterator, seconds: float) -> None:
        """Writes in the background what `restore` needs."""
        progress = {"record": self.record, "data": batches.get_state(), "seconds": seconds}
        progress |= {"sums": sums(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(progress | {"checksum": checksum(progress)}),
        )
        with self.failures_in_words():
            self.manager.save(step, args=items, force=True)

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

    def restore(self, state: Any, batches: grain.DatasetIterator) -> tuple[int, Any, float] | None:
        """Step, state and seconds of the last checkpoint that can be read; None if there is none.

        Moves the batches to their place then. Deletes what cannot be read once another could: the
        run comes by that step again, and Orbax does not write over a step.
        """
        torn: dict[int, str] = {}
        for step in self.steps():
            found, torn[step] = None, "another process cannot read it"
            try:
                found = self.read(step, state)
            except OtherRun:
                raise
            except Exception as error:  # of JSON, TensorStore or Orbax: many types
                torn[step] = reason(error)
            if mesh.all_agree(found is not None) and found is not None:
                del torn[step]
                for bad, why in torn.items():
                    print(
                        f"warning: checkpoint {bad} cannot be read ({why});"
                        f" it is deleted, and step {step} is what there is",
                        file=sys.stderr,
                    )
                    self.manager.delete(bad)
                restored, progress = found
                batches.set_state(progress["data"])
                return step, restored, progress["seconds"]
        if torn:
            raise OSError(
                f"no checkpoint in {self.manager.directory} can be read"
                f" ({next(iter(torn.values()))}); start again with --overwrite"
            )
        return None

    def read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """State and progress at that step; an error if they are not what was saved."""
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        progress = self.manager.restore(step, args=args)["progress"]
        if progress.pop("checksum") != checksum(progress):
            raise ValueError("its checksum is wrong")
        then, now = progress["record"], self.record
        differences = [
            f"{name} was {then.get(name)}, now {now.get(name)}"
            for name in now | then
            if then.get(name) != now.get(name)
        ]
        if differences:
            raise OtherRun(
                f"{self.manager.directory.parent} holds another run: {'; '.join(differences)}."
                " Give the same or another --out"
            )
        sumo_optax.check_state(self.manager.item_metadata(step)["state"].tree, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(state))
        restored = self.manager.restore(step, args=args)["state"]
        if progress["sums"] != sums(restored):
            raise ValueError("its checksum is wrong")
        return restored, progress


def checksum(progress: Mapping[str, Any]) -> int:
    """Of what is written as JSON."""
    return zlib.crc32(json.dumps(progress).encode())


def sums(state: Any) -> list[int]:
    """Of all bits of each array, modulo 2³², for which it does not matter how it is sharded."""
    return [int(x) for x in sums_of_bits(jax.tree.leaves(state))]


@jax.jit
def sums_of_bits(arrays: list[jax.Array]) -> list[jax.Array]:
    """The sums, on the devices."""
    words = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return [jnp.sum(words(x), dtype=jnp.uint32) for x in arrays]


def reason(error: Exception) -> str:
    """What an error says, in a few words; of TensorStore's many, what the system says."""
    words = (str(error).splitlines() or [""])[0] or type(error).__name__
    system = re.search(r"([^:]+) \[os_error_code=", words)
    return system[1].strip() if system else words[:200]
