"""Kills training at random moments, over and over, and compares its end with an unbroken run's.

python benchmarks/faults.py               # 100 kills, about 20 minutes on two cores
python benchmarks/faults.py --kills 10
python benchmarks/faults.py --short --at-once 2 --steps 240 --save-every 40

The short form forks its processes from one that has imported everything, since imports are most of
the time of the full form. No kill comes during imports then.

A third of the kills come at any moment before the first step, while the process imports, restores
or compiles; a third during the steps, every second of which is a refresh; a third while a
checkpoint is being written.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain
import record
from common import run_folder

ROOT = Path(__file__).parents[1]

MICRO = "--width 32 --hidden 48 --heads 2 --layers 1 --length 32 --batch 8 --eval-windows 16"
REFRESHES = "--optimizer sumo --refresh-every 2"
NAMES = {False: "faults", True: "faults_short"}  # of the records
COUNTING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Config:
    """Kills the pre-training program with SIGKILL and resumes it, as often as asked."""

    short: bool = False
    """Fork the processes from one that has imported all; the record is another file."""
    kills: int = 100
    """How many processes to kill."""
    at_once: int = 1
    """How many runs are under way together."""
    steps: int = 400
    """Steps of a run."""
    save_every: int = 40
    """Steps between two checkpoints."""
    set: tuple[str, ...] = ()
    """More arguments NAME=VALUE of SUMO, such as state_dtype=int8."""
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
    state_bits_compared: int = 0
    state_bits_differing: int = 0


class Forked:
    """What is used of `subprocess.Popen`, for a process of `forks`."""

    forks = multiprocessing.get_context("forkserver")
    # To start a process looks at how all others are; of two threads that look, one is told 255.
    looking = threading.Lock()

    def __init__(self, arguments: list[str], cache: dict[str, Any], log: Path):
        self.logs = [log.with_suffix(f".{name}") for name in ("out", "err")]
        log.parent.mkdir(parents=True, exist_ok=True)
        given = (arguments, cache, self.logs)
        self.process = self.forks.Process(target=train, args=given, daemon=True)
        self.kill = self.process.kill
        with self.looking:
            self.process.start()

    @classmethod
    def prepare(cls) -> None:
        """Lets the next process be forked from one that has imported the program.

        That one has no backend of JAX, whose threads would not survive a fork; this one has.
        """
        # Where it looks for what to import before it gets our sys.path.
        paths = [str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        cls.forks.set_forkserver_preload(["pretrain"])

    def poll(self) -> int | None:
        with self.looking:
            return self.process.exitcode

    def communicate(self) -> tuple[str, str]:
        while self.poll() is None:
            time.sleep(0.001)
        out, err = (path.read_text() if path.exists() else "" for path in self.logs)
        return out, err


def train(arguments: list[str], cache: dict[str, Any], logs: list[Path]) -> None:
    """The program in a forked process, with its output in files."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream, path in zip(streams, logs, strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream.fileno())
        stream.reconfigure(line_buffering=True)
    for name, value in cache.items():
        jax.config.update(name.lower(), value)
    sys.exit(pretrain.main(arguments))


def start(config: Config, out: Path) -> subprocess.Popen[str] | Forked:
    """A process that trains to the end, from the last checkpoint if there is a run already."""
    steps = f"--steps {config.steps} --save-every {config.save_every}"
    data = f"--data {ROOT / 'sumo_optax'}"
    resume = "--resume" if run_folder.holds_run(out) else ""
    arguments = f"{MICRO} {REFRESHES} {steps} {data} --out {out} {resume}".split()
    arguments += ["--set", *config.set] if config.set else []
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((config.runs / "cache").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }
    if config.short:
        return Forked(arguments, cache, config.runs / "logs" / out.name)
    environment = {name: str(value) for name, value in cache.items()} | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples/pretrain.py"), *arguments],
        env=os.environ | environment,
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
    process: subprocess.Popen[str] | Forked, out: Path, start_up: float, rng: random.Random
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
    code = process.poll()
    with COUNTING:
        count(code, printed, errors, out, started, tally)
    if code not in (0, -signal.SIGKILL):
        print(errors, file=sys.stderr)
    return code != -signal.SIGKILL


def count(
    code: int | None, printed: str, errors: str, out: Path, started: float, tally: Tally
) -> None:
    """Adds what became of a process to the tally."""
    resumed = re.search(r"going on from step (\d+)", printed)
    tally.resumptions += bool(resumed)
    tally.resumptions_without_a_checkpoint += "no checkpoint yet" in printed
    tally.checkpoints_lost += errors.count("warning: checkpoint")
    if code != -signal.SIGKILL:
        tally.runs_lost += code != 0
        return
    tally.kills += 1
    if saving(out, started):
        tally.kills_while_saving += 1
    elif steps_written(out, started) > (int(resumed[1]) if resumed else 0):
        tally.kills_while_stepping += 1
    else:
        tally.kills_before_the_first_step += 1
    print(json.dumps(dataclasses.asdict(tally)), flush=True)


def end(config: Config, out: Path) -> dict[str, np.ndarray]:
    """All bytes of parameters and optimizer state that a run ended with."""
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
    checkpoints = run_folder.Checkpoints(out, {})
    state = checkpoints.manager.restore(config.steps, args=arguments)["state"]
    checkpoints.close()
    as_bytes = lambda x: np.ravel(jax.device_get(x)).view(np.uint8)
    joined = lambda tree: np.concatenate([as_bytes(x) for x in jax.tree.leaves(tree)])
    return {name: joined(state[name]) for name in ("params", "optimizer")}


def compare(config: Config, out: Path, expected: dict[str, np.ndarray], tally: Tally) -> None:
    """What a broken run ended with, against the end of the unbroken one."""
    found = end(config, out)
    ours, theirs = (x["params"].view(np.uint32) for x in (found, expected))
    tally.parameters_compared += len(ours)
    tally.parameters_differing += int(np.sum(ours != theirs))
    ours, theirs = (x["optimizer"] for x in (found, expected))
    tally.state_bits_compared += 8 * len(ours)
    tally.state_bits_differing += int(np.unpackbits(np.bitwise_xor(ours, theirs)).sum())


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    tally, numbers = Tally(), itertools.count()
    shutil.rmtree(config.runs, ignore_errors=True)
    if config.short:
        Forked.prepare()
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
        if process.poll():
            raise SystemExit(errors)
    expected = end(config, config.runs / "unbroken")
    compare(config, config.runs / "first", expected, tally)

    def write() -> dict[str, Any]:
        row: dict[str, Any] = dataclasses.asdict(tally)
        row |= {"steps_of_a_run": config.steps, "save_every": config.save_every, "refresh_every": 2}
        row["minutes"] = round((time.monotonic() - begun) / 60, 1)
        record.write(NAMES[config.short], [row], argv)
        return row

    def break_runs() -> None:
        """A run after the other, each to its end, until there were enough kills."""
        while tally.kills < config.kills:
            number = next(numbers)
            out, rng = config.runs / f"broken-{number}", random.Random(f"{config.seed} {number}")
            # Those side by side start more slowly.
            while not break_once(config, out, config.at_once * start_up, rng, tally):
                pass
            with COUNTING:
                tally.runs += 1
                if (out / "summary.json").exists():
                    compare(config, out, expected, tally)
                    shutil.rmtree(out)
                write()

    with concurrent.futures.ThreadPoolExecutor(config.at_once) as pool:
        for worker in [pool.submit(break_runs) for _ in range(config.at_once)]:
            worker.result()
    row = write()
    print(record.table([row], {name.replace("_", " "): f"{{{name}}}" for name in row}))


if __name__ == "__main__":
    main()
