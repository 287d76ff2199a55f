"""Kills training at random moments, over and over, and compares its end with an unbroken run's.

python benchmarks/faults.py               # 100 kills, about 20 minutes on two cores
python benchmarks/faults.py --kills 10

A third of the kills come at any moment before the first step, while the process imports, restores
or compiles; a third during the steps, every second of which is a refresh; a third while a
checkpoint is being written.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import record
from common import run_folder

ROOT = Path(__file__).parents[1]

MICRO = "--width 32 --hidden 48 --heads 2 --layers 1 --length 32 --batch 8 --eval-windows 16"
REFRESHES = "--optimizer sumo --refresh-every 2"


@dataclasses.dataclass(frozen=True)
class Config:
    """Kills the pre-training program with SIGKILL and resumes it, as often as asked."""

    kills: int = 100
    """How many processes to kill."""
    steps: int = 400
    """Steps of a run."""
    save_every: int = 40
    """Steps between two checkpoints."""
    seed: int = 0
    """Of the moments."""
    runs: Path = Path("runs/faults")
    """Where the runs are kept; what is there is deleted."""


@dataclasses.dataclass
class Tally:
    """What has happened so far."""

    kills: int = 0
    kills_while_saving: int = 0
    kills_while_stepping: int = 0
    kills_before_the_first_step: int = 0
    resumptions: int = 0
    resumptions_without_a_checkpoint: int = 0
    checkpoints_lost: int = 0
    runs: int = 0
    runs_lost: int = 0
    parameters_compared: int = 0
    parameters_differing: int = 0


def start(config: Config, out: Path) -> subprocess.Popen[str]:
    """A process that trains to the end, from the last checkpoint if there is a run already."""
    steps = f"--steps {config.steps} --save-every {config.save_every}"
    data = f"--data {ROOT / 'sumo_optax'}"
    resume = "--resume" if run_folder.holds_run(out) else ""
    arguments = f"{MICRO} {REFRESHES} {steps} {data} --out {out} {resume}".split()
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((config.runs / "cache").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples/pretrain.py"), *arguments],
        env=os.environ | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_written(out: Path, since: float) -> int:
    """How far the metrics go, if they were touched since."""
    path = out / "metrics.jsonl"
    touched = path.exists() and path.stat().st_mtime >= since
    return len(path.read_text().splitlines()) if touched else 0


def saving(out: Path, since: float) -> bool:
    """Whether a checkpoint is there in part, not left by an earlier process."""
    for part in (out / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # it is whole meanwhile
            if part.stat().st_ctime >= since:
                return True
    return False


def wait_for_a_moment(
    process: subprocess.Popen[str], out: Path, start_up: float, rng: random.Random
) -> None:
    """Returns at a random moment, or when the process has ended."""
    since = time.time()

    def wait_while(condition: Callable[[], bool]) -> None:
        while process.poll() is None and condition():
            time.sleep(0.001)

    kind = rng.choice(("start", "step", "save"))
    if kind == "start":
        until = time.monotonic() + rng.uniform(0, start_up)
        wait_while(lambda: time.monotonic() < until)
        return
    happens = (
        (lambda: saving(out, since))
        if kind == "save"
        else (lambda: steps_written(out, since) > before)
    )
    for _ in range(rng.randint(1, 3)):  # not always the first
        before = steps_written(out, 0)
        wait_while(lambda: saving(out, since))
        wait_while(lambda: not happens())
    time.sleep(rng.uniform(0, 0.05))


def break_once(
    config: Config, out: Path, start_up: float, rng: random.Random, tally: Tally
) -> bool:
    """One process, killed or not; whether it came to its end."""
    started = time.time()
    process = start(config, out)
    if tally.kills < config.kills:
        wait_for_a_moment(process, out, start_up, rng)
        process.kill()
    printed, errors = process.communicate()
    resumed = re.search(r"going on from step (\d+)", printed)
    tally.resumptions += bool(resumed)
    tally.resumptions_without_a_checkpoint += "no checkpoint yet" in printed
    tally.checkpoints_lost += errors.count("warning: checkpoint")
    if process.returncode == -signal.SIGKILL:
        tally.kills += 1
        if saving(out, started):
            tally.kills_while_saving += 1
        elif steps_written(out, started) > (int(resumed[1]) if resumed else 0):
            tally.kills_while_stepping += 1
        else:
            tally.kills_before_the_first_step += 1
        return False
    if process.returncode:
        print(errors, file=sys.stderr)
        tally.runs_lost += 1
    return True


def parameters(config: Config, out: Path) -> list[bytes]:
    """All parameters that a run ended with."""
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
    checkpoints = run_folder.Checkpoints(out, {})
    state = checkpoints.manager.restore(config.steps, args=arguments)["state"]
    checkpoints.close()
    return [x.tobytes() for x in map(jax.device_get, jax.tree.leaves(state["params"]))]


def compare(config: Config, out: Path, expected: list[bytes], tally: Tally) -> None:
    """Bytes of parameters that a broken run ended with, against those of the unbroken one."""
    for ours, theirs in zip(parameters(config, out), expected, strict=True):
        ours, theirs = (memoryview(x).cast("I") for x in (ours, theirs))
        tally.parameters_compared += len(ours)
        tally.parameters_differing += sum(a != b for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    rng, tally = random.Random(config.seed), Tally()
    shutil.rmtree(config.runs, ignore_errors=True)
    begun = time.monotonic()
    # The second of them finds everything compiled, as those that follow do.
    for name in ("first", "unbroken"):
        started = time.monotonic()
        out = config.runs / name
        process = start(config, out)
        while process.poll() is None and not steps_written(out, 0):
            time.sleep(0.01)
        start_up = time.monotonic() - started
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors)
    expected = parameters(config, config.runs / "unbroken")
    compare(config, config.runs / "first", expected, tally)
    while tally.kills < config.kills:
        out = config.runs / f"broken-{tally.runs}"
        lost = tally.runs_lost
        while not break_once(config, out, start_up, rng, tally):
            print(json.dumps(dataclasses.asdict(tally)), flush=True)
        tally.runs += 1
        if tally.runs_lost == lost:
            compare(config, out, expected, tally)
            shutil.rmtree(out)
    row: dict[str, Any] = dataclasses.asdict(tally)
    row |= {"steps_of_a_run": config.steps, "save_every": config.save_every, "refresh_every": 2}
    row["minutes"] = round((time.monotonic() - begun) / 60, 1)
    print("written:", record.write("faults", [row]))
    print(record.table([row], {name.replace("_", " "): f"{{{name}}}" for name in row}))


if __name__ == "__main__":
    main()
