"""What makes SUMO good: one thing changed at a time, from tracking at every step.

python benchmarks/tuning.py                        # two seeds each: an hour and a half on one core
python benchmarks/tuning.py --only "momentum 0.95"
python benchmarks/tuning.py --draw                 # the table of the record

What was the default when the study began; tracking at every 10th step is, by what it found. All at
one learning rate, next to the best: what is changed here leaves the size of an update as it is, or
nearly. A run that is in the record is not made again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import convergence
import record
import sweep
import tyro

RATE = 1.5e-2
SEEDS = (0, 1)
BASE = "tracking at every step"
STEP = "--refresh-every 1"
VARIANTS = {
    BASE: STEP,
    "tracking at every 5th step": "--refresh-every 5",
    "tracking at every 10th step, the default": "",
    "tracking at every 20th step": "--refresh-every 20",
    "tracking at every 50th step": "--refresh-every 50",
    "refreshed every 10": "--refresh-every 10 --set basis=randomized_svd",
    "refreshed every 50": "--refresh-every 50 --set basis=randomized_svd",
    "refreshed every 200": "--refresh-every 200 --set basis=randomized_svd",
    "the longer side": f"{STEP} --set side=long",
    "momentum 0.7": f"{STEP} --set momentum=0.7",
    "momentum 0.9": f"{STEP} --set momentum=0.9",
    "momentum 0.95": f"{STEP} --set momentum=0.95",
    "no Nesterov": f"{STEP} --set nesterov=False",
    "momentum 0.95, no Nesterov": f"{STEP} --set momentum=0.95 nesterov=False",
    "no limit on growth": f"{STEP} --set norm_growth_limit=None",
    "Adam for the other leaves at 2.5e-3": f"{STEP} --adam-learning-rate 2.5e-3",
    "Adam for the other leaves at 1e-2": f"{STEP} --adam-learning-rate 1e-2",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the preset `tiny` with variants of SUMO."""

    only: tuple[str, ...] = tuple(VARIANTS)
    """Which of them."""
    draw: bool = False
    """Train nothing: the table of what is recorded."""
    pretrain: str = ""
    """More arguments of examples/pretrain.py, as in --pretrain="--width 64"."""
    runs: Path = Path("runs/tuning")
    """Where the runs are kept."""


RUNS = sweep.Record("tuning", ("variant", "learning_rate", "seed"))


def run(config: Config, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    argv = ["--learning-rate", f"{rate:g}", "--seed", str(seed)]
    argv += [*config.pretrain.split(), *VARIANTS[name].split(), *sweep.settings("sumo")]
    return convergence.trained(config.runs / f"{list(VARIANTS).index(name)}-{seed}", argv)


def summarize() -> list[dict[str, Any]]:
    """A row for each variant: its mean loss, and what that is over the base's, seed by seed."""
    losses = {(name, s): row["validation_loss"] for (name, _, s), row in RUNS.rows().items()}
    rows = []
    for name in VARIANTS:
        seeds = [s for s in SEEDS if (name, s) in losses and (BASE, s) in losses]
        if seeds:
            over = [losses[name, s] - losses[BASE, s] for s in seeds]
            loss = mean(losses[name, s] for s in seeds)
            rows.append({"variant": name, "loss": loss, "over": mean(over), "each": over})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """All of them, in the order above."""
    of_each = [row | {"each": ", ".join(f"{x:+.4f}" for x in row["each"])} for row in rows]
    columns = {
        "variant": "{variant}",
        "validation loss": "{loss:.4f}",
        "over the first": "{over:+.4f}",
        "seed by seed": "{each}",
    }
    return record.table(of_each, columns)


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    for name in config.only:
        if name not in VARIANTS:
            raise SystemExit(f"error: no variant {name!r}; there are {', '.join(VARIANTS)}")
    for seed, name in () if config.draw else itertools.product(SEEDS, config.only):
        RUNS.get(name, RATE, seed, make=functools.partial(run, config))
    print(table(summarize()))


if __name__ == "__main__":
    main()
