"""Training runs that are made once, the walk to the best learning rate, and the time of a step."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import jax
import record
from common import training

Key = tuple[Any, ...]

# The scales of the recorded runs, and so of their rates; the defaults of today are larger.
SCALES = {
    "sumo": "consistent_rms=0.2",
    "mofasgd": "consistent_rms=0.2",
}


def settings(optimizer: str, *others: str) -> list[str]:
    """The arguments of an example that set a recorded run's scale, and all others."""
    given = [SCALES.get(optimizer, ""), *others]
    return ["--set", *" ".join(given).split()] if any(given) else []


class Record:
    """The runs in a file of benchmarks/results, each known by the values of some of its columns.

    The last two of these are learning rate and seed. Several programs may add to it: each reads it
    again before it writes.
    """

    def __init__(self, name: str, columns: Sequence[str]):
        self.name = name
        self.columns = columns

    def rows(self) -> dict[Key, dict[str, Any]]:
        """All of them."""
        path = record.RESULTS / f"{self.name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return {tuple(row[column] for column in self.columns): row for row in rows}

    def get(self, *key: Any, make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """The run with this key, which is made and written down if it was not yet."""
        if key not in self.rows():
            self.add({key: make(*key)})
        return self.rows()[key]

    def add(self, made: dict[Key, dict[str, Any]]) -> None:
        """Writes runs down, each under its key."""
        named = {key: dict(zip(self.columns, key, strict=True)) | x for key, x in made.items()}
        record.RESULTS.mkdir(exist_ok=True)
        with (record.RESULTS / f".{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = list((self.rows() | named).values())
            record.write(self.name, rows, arguments=())  # a part, or all of it: the same runs

    def at_best_rate(self, *entry: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The runs of an entry at the rate that has all seeds; none where they are not all made."""
        runs = {key[-2:]: row for key, row in self.rows().items() if key[:-2] == entry}
        rate = next((rate for rate, seed in runs if seed == seeds[-1]), None)
        best = [runs[rate, seed] for seed in seeds if (rate, seed) in runs]
        return best if len(best) == len(seeds) else []


def best_rate(
    loss: Callable[[float], float], guess: float, rates: Sequence[float], *, above: int
) -> float:
    """Where the loss is least: the rate below it, and so many above it, are worse."""
    best = rates.index(guess)
    while True:
        losses = {i: loss(rates[i]) for i in range(best - 1, best + above + 1)}
        last, best = best, min(losses, key=losses.__getitem__)
        if last == best:
            return rates[best]


def train(program: ModuleType, out: Path, argv: Sequence[str]) -> dict[str, Any]:
    """The summary of a run of an example with these arguments."""
    argv = ["--out", str(out), "--overwrite", *argv]
    print(program.__name__, *argv, flush=True)
    with contextlib.redirect_stdout(None):
        code = program.main(argv)
    if code:
        raise SystemExit(code)
    return json.loads((out / "summary.json").read_text())


def step_ms(run: training.Run, step: training.Step, steps: int) -> float:
    """The median of so many training steps of an example, with forward and backward pass."""
    state, times = run.init(), []
    for t in range(1, steps + 4):
        batch = next(run.batches)
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(step(t, state, batch))
        times.append(1e3 * (time.perf_counter() - begun))
    return median(times[3:])


def timed_over_adamw(
    names: Sequence[str], measure: Callable[[str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row of `measure` for each name, AdamW's first, with its time over AdamW's.

    Of two rounds the faster: a shared machine has slow spells.
    """
    names = ["adamw", *(x for x in names if x != "adamw")]
    rounds = [[measure(name) for name in names] for _ in range(2)]
    time_of = lambda row: row["train_step_ms"]
    rows = [min(both, key=time_of) for both in zip(*rounds, strict=True)]
    rows = [row | {"over_adamw": round(time_of(row) / time_of(rows[0]), 3)} for row in rows]
    print(*rows, sep="\n")
    return rows
