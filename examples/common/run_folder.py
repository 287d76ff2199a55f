"""The folder of a run: what it may overwrite, and its checkpoints."""

import dataclasses
import importlib
import itertools
import json
import logging
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from common import mesh
from common.options import default

import sumo_optax

# Orbax logs what it then raises; TensorStore reports to saves that have failed meanwhile.
warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
hook = sys.unraisablehook
sys.unraisablehook = lambda x: None if "loop is closed" in str(x.exc_value) else hook(x)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written."""

    # Folder to write to.
    out: Annotated[Path | None, default("a new one in runs/")] = None
    resume: bool = False  # Go on from the last checkpoint.
    overwrite: bool = False  # Delete the run in the folder first.
    # Steps between two validations.
    eval_every: Annotated[int | None, default("a tenth of all; an epoch to fine-tune")] = None
    # Steps between two checkpoints.
    save_every: Annotated[int | None, default("a tenth of all; an epoch to fine-tune")] = None
    tensorboard: bool = False  # Write the metrics for TensorBoard, too, into OUT/tensorboard.
    # Send the metrics to this project of Weights & Biases, too.
    wandb: Annotated[str | None, default("none")] = None


# What a resumed run may be given otherwise; what is set is among the optimizer's arguments.
FREE = {"set", *vars(mesh.Options()), *vars(Options())}


def record(options: Any, more: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run, as JSON."""
    return {name: x for name, x in vars(options).items() if name not in FREE} | more


def choose(options: Any, name: str) -> Path:
    """The folder to write to; refuses options that make no sense, those of a program too."""
    for option, value in vars(options).items():
        least = 1 if type(value) is int and option not in ("seed", "process") else 0
        if type(value) in (int, float) and not value >= least:
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} must be at least {least}, got {value}")
    for asked, library in ((options.tensorboard, "tensorboardX"), (options.wandb, "wandb")):
        if asked:
            importlib.import_module(library)
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    if (out := options.out) is None:
        folder = lambda i: Path("runs", f"{name}-{i}" if i > 1 else name)
        free = next(i for i in itertools.count(1) if not holds_run(folder(i)))
        out = folder(1 if options.overwrite else free - options.resume)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if options.resume and not holds_run(out):
        raise ValueError(f"{out} holds no run to resume; leave out --resume or name another --out")
    if holds_run(out) and not (options.resume or options.overwrite):
        raise ValueError(f"{out} holds a run already; give --resume, --overwrite or another --out")
    return out


def holds_run(out: Path) -> bool:
    """Whether a run has written there."""
    return any((out / x).exists() for x in ("checkpoints", "metrics.jsonl", "summary.json"))


reason = lambda error: (str(error).splitlines() or [repr(error)])[0][:200]  # in a few words
checksum = lambda progress: zlib.crc32(json.dumps(progress).encode())


class OtherRun(ValueError):
    """The folder has checkpoints of another configuration."""


class Checkpoints:
    """The last checkpoints of a run: its arrays, and in `progress` all else that it goes on with.

    Orbax writes them in the background and makes them visible when they are whole. It does not see
    a bit that has flipped in one: that is what the sums and the checksum are for.
    """

    def __init__(self, out: Path, record: Mapping[str, Any]):
        self.record = record  # what makes this run this run, as JSON
        json_handler = ocp.JsonCheckpointHandler()
        self.manager = ocp.CheckpointManager(
            (out / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": json_handler},
        )

    def save(self, step: int, state: Any, batches: Any, seconds: float) -> None:
        """Writes in the background what `restore` needs."""
        progress = {"record": self.record, "data": batches.get_state(), "seconds": seconds}
        progress |= {"sums": list(map(int, sums(state)))}
        saved = ocp.args.JsonSave(progress | {"checksum": checksum(progress)})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=saved)
        self.write(self.manager.save, step, args=items, force=True)

    def close(self) -> None:
        """Waits for what is being written."""
        self.write(self.manager.close)

    def write(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Writes; a full disk is one line instead of Orbax's many."""
        try:
            write(*args, **kwargs)
        except Exception as error:  # of the disk, the file system or Orbax: many types
            good = ", ".join(map(str, sorted(self.manager.all_steps(read=True)))) or "none"
            folder = self.manager.directory
            words = f"a checkpoint could not be written to {folder}: {reason(error)}"
            raise OSError(f"{words}; those there are good: {good}") from None

    def restore(self, state: Any, batches: Any) -> tuple[int, Any, float] | None:
        """Step, state and seconds of the last checkpoint that can be read; None if there is none.

        Moves the batches to their place then. Deletes what cannot be read once another could: the
        run comes by that step again, and Orbax does not write over a step.
        """
        torn: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            found, why = None, "another process cannot read it"
            try:
                found = self.read(step, state)
            except OtherRun:
                raise
            except Exception as error:  # of JSON, TensorStore or Orbax: many types
                why = reason(error)
            if mesh.all_agree(found is not None) and found is not None:
                for bad, why in torn.items():
                    words = f"warning: checkpoint {bad} cannot be read ({why}); it is deleted"
                    print(f"{words}, and step {step} is what there is", file=sys.stderr)
                    self.manager.delete(bad)
                restored, progress = found
                batches.set_state(progress["data"])
                return step, restored, progress["seconds"]
            torn[step] = why
        if torn:
            words = f"no checkpoint in {self.manager.directory} can be read"
            raise OSError(f"{words} ({next(iter(torn.values()))}); start again with --overwrite")
        return None

    def read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """State and progress at that step; an error if they are not what was saved."""
        read = lambda **args: self.manager.restore(step, args=ocp.args.Composite(**args))
        progress = read(progress=ocp.args.JsonRestore())["progress"]
        if progress.pop("checksum") != checksum(progress):
            raise ValueError("its checksum is wrong")
        then, now = progress["record"], self.record
        others = [name for name in now | then if then.get(name) != now.get(name)]
        if others:
            words = "; ".join(f"{x} was {then.get(x)}, now {now.get(x)}" for x in others)
            folder = self.manager.directory.parent
            raise OtherRun(f"{folder} holds another run: {words}. Give the same or another --out")
        sumo_optax.check_state(self.manager.item_metadata(step)["state"].tree, state)
        restored = read(state=ocp.args.StandardRestore(state))["state"]
        if progress["sums"] != list(map(int, sums(restored))):
            raise ValueError("its sums are wrong")
        return restored, progress


@jax.jit
def sums(state: Any) -> list[jax.Array]:
    """Of all bits of each array, modulo 2³², for which it does not matter how it is sharded."""
    words = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return [jnp.sum(words(x), dtype=jnp.uint32) for x in jax.tree.leaves(state)]
