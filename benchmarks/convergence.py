"""Which optimizer trains the pre-training example best, for equal tokens.

python benchmarks/convergence.py                                  # all of it: many hours
python benchmarks/convergence.py --only adamw sumo muon           # some
python benchmarks/convergence.py --draw                           # table and figures of the record
python benchmarks/convergence.py --time                           # their steps, on a quiet machine
python benchmarks/convergence.py --quick                          # a few steps of a small model

Each one's learning rate walks along 1, 1.5, 2, 3, 5, 7, 10 ... from where it is guessed to be best,
until the one below it and the two above it were worse; then two more seeds at the best. A run that
is in the record is not run again: stop and start as you like, several at a time.
"""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from matplotlib.figure import Figure

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain
import record
import sweep

RATES = [digit * 10.0**power for power in range(-4, 0) for digit in (1, 1.5, 2, 3, 5, 7)]
SEEDS = (0, 1, 2)
LONG = "side=long momentum=0.9 refresh_every=1"
# With the scale of the paper's text, which its listing leaves out, and so the same for all.
PUBLISHED = " ".join(
    f"{k}={v}" for k, v in {**sumo_optax.presets.SUMO, "consistent_rms": 0.2}.items()
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is compared: an optimizer, how it differs from its default, where its rate may lie."""

    optimizer: str
    rate: float
    settings: str = ""
    rank: int | None = None


STUDY = {
    "adamw": Entry("adamw", 3e-3),
    "optax muon": Entry("muon", 1e-2),
    "optax muon, momentum 0.8": Entry("muon", 2e-2, "beta=0.8"),
    "optax galore": Entry("galore", 1e-2),
    "sumo": Entry("sumo", 1.5e-2),
    "sumo, Newton-Schulz": Entry("sumo", 1.5e-2, "polar=newton_schulz"),
    "sumo, refresh_every=1": Entry("sumo", 2e-2, "refresh_every=1"),
    "sumo, residual=None": Entry("sumo", 2e-2, "residual=None"),
    "sumo, residual=gradient": Entry("sumo", 2e-2, "residual=gradient"),
    "sumo, longer side": Entry("sumo", 1.5e-2, LONG),
    "sumo, longer side, Newton-Schulz": Entry("sumo", 1.5e-2, f"{LONG} polar=newton_schulz"),
    "sumo as published": Entry("sumo", 1e-2, PUBLISHED),
    "sumo as published, Newton-Schulz": Entry("sumo", 1e-2, f"{PUBLISHED} polar=newton_schulz"),
    "online_subspace_descent": Entry("online_subspace_descent", 1e-2),
    "mofasgd": Entry("mofasgd", 1e-2),
    "mofasgd, momentum 0.9": Entry("mofasgd", 1e-2, "momentum=0.9"),
    "sumo, rank 64": Entry("sumo", 1.5e-2, rank=64),
    "sumo, rank 64, refresh_every=1": Entry("sumo", 1.5e-2, "refresh_every=1", rank=64),
    "sumo, rank 16": Entry("sumo", 2e-2, rank=16),
    "sumo, longer side, rank 64": Entry("sumo", 1.5e-2, LONG, rank=64),
    "sumo, longer side, rank 16": Entry("sumo", 1.5e-2, LONG, rank=16),
    "optax galore, rank 16": Entry("galore", 1e-2, rank=16),
    "online_subspace_descent, rank 16": Entry("online_subspace_descent", 1e-2, rank=16),
    "mofasgd, rank 16": Entry("mofasgd", 1e-2, rank=16),
}
# The curves of the picture: more of them are not told apart.
DRAWN = {
    "adamw",
    "optax muon, momentum 0.8",
    "optax galore",
    "sumo",
    "online_subspace_descent",
    "mofasgd, momentum 0.9",
}
QUICK = ["--steps", "4", "--width", "32", "--hidden", "32", "--layers", "1", "--length", "32"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the preset `tiny` with every optimizer of the study."""

    only: tuple[str, ...] = tuple(STUDY)
    """Which of the study's."""
    quick: bool = False
    """A small version, for the tests: one rate each, nothing recorded."""
    draw: bool = False
    """Train nothing: the table and the figures of what is recorded."""
    time: bool = False
    """Train nothing: time a training step of each, on a machine that does nothing else."""
    runs: Path = Path("runs/convergence")
    """Where the runs are kept."""


def arguments(config: Config, name: str, rate: float, seed: int) -> list[str]:
    """Those of `examples/pretrain.py` for a run."""
    entry = STUDY[name]
    argv = ["--optimizer", entry.optimizer, "--learning-rate", f"{rate:g}", "--seed", str(seed)]
    if entry.rank:
        argv += ["--rank", str(entry.rank)]
    argv += sweep.settings(entry.optimizer, entry.settings)
    return argv + (QUICK if config.quick else [])


def run(config: Config, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    out = config.runs / f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    return trained(out, arguments(config, name, rate, seed))


def trained(out: Path, argv: list[str]) -> dict[str, Any]:
    """What `examples/pretrain.py` comes to with these arguments."""
    summary = sweep.train(pretrain, out, argv)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        "validation_loss": summary["validation_loss"],
        "state_bytes": summary["state_bytes"],
        "validated": [
            (x["step"], round(x["validation_loss"], 5)) for x in lines if "validation_loss" in x
        ],
    }


RUNS = sweep.Record("convergence", ("entry", "learning_rate", "seed"))


def loss(config: Config, name: str, rate: float, seed: int = 0) -> float:
    """The final validation loss of a run."""
    row = RUNS.get(name, rate, seed, make=functools.partial(run, config))
    final = row["validation_loss"]
    return final if math.isfinite(final) else math.inf


def study(config: Config) -> None:
    """Makes all runs that are missing."""
    for name in config.only:
        if name not in STUDY:
            raise SystemExit(f"error: no entry {name!r}; there are {', '.join(STUDY)}")
        if config.quick:
            run(config, name, STUDY[name].rate, 0)
            continue
        rate = sweep.best_rate(
            functools.partial(loss, config, name), STUDY[name].rate, RATES, above=2
        )
        for seed in SEEDS:
            loss(config, name, rate, seed)


def timed(config: Config, name: str) -> dict[str, Any]:
    """A training step of an entry."""
    argv = ["--out", str(config.runs / "timed"), "--overwrite"]
    argv += arguments(config, name, STUDY[name].rate, seed=0)
    run = pretrain.prepare(pretrain.parse(argv))
    return {"entry": name, "train_step_ms": round(sweep.step_ms(run, run.compile(), steps=50), 1)}


def measure(config: Config) -> None:
    """A row for each entry: its step, also over AdamW's."""
    rows = sweep.timed_over_adamw(config.only, functools.partial(timed, config))
    if not config.quick:
        record.write("train_step", rows)


def summarize() -> list[dict[str, Any]]:
    """A row for each entry that has all its runs: at its best rate, over the seeds."""
    rows: list[dict[str, Any]] = []
    for name in STUDY:
        best = RUNS.at_best_rate(name, seeds=SEEDS)
        if not best:
            continue
        losses = [x["validation_loss"] for x in best]
        steps, *_ = zip(*best[0]["validated"], strict=True)
        curve = [mean(y) for y in zip(*([l for _, l in x["validated"]] for x in best), strict=True)]
        rows.append(
            {
                "entry": name,
                "learning_rate": best[0]["learning_rate"],
                "mean_loss": mean(losses),
                "spread": max(losses) - min(losses),
                "state_mib": best[0]["state_bytes"] / 2**20,
                "steps": steps,
                "losses": curve,
            }
        )
    target = next((x["mean_loss"] for x in rows if x["entry"] == "adamw"), -math.inf)
    timed = record.RESULTS / "train_step.json"
    times = json.loads(timed.read_text())["rows"] if timed.exists() else []
    over_adamw = {x["entry"]: x["over_adamw"] for x in times}
    for row in rows:
        steps = steps_to(target, row["steps"], row["losses"])
        part = steps / row["steps"][-1] * over_adamw.get(row["entry"], math.nan)
        row["steps_to_adamw"] = f"{steps:.0f}" if steps < math.inf else "-"
        row["time_to_adamw"] = f"{part:.2f}" if part < math.inf else "-"
    return rows


def steps_to(target: float, steps: list[int], losses: list[float]) -> float:
    """The step at which a curve comes to the target, on a line between the two looks at it."""
    for i, y in enumerate(losses):
        if y <= target:
            if i == 0:
                return steps[0]
            part = (losses[i - 1] - target) / (losses[i - 1] - y)
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return math.inf


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of the best entry of each method at one rank, in the order of their ends."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for row in sorted(rows, key=lambda row: row["mean_loss"], reverse=True):
        if row["entry"] in DRAWN:
            axes.plot(row["steps"], row["losses"], "o-", markersize=3, label=row["entry"])
    axes.set(xlabel="step", ylabel="validation loss, nats per byte", yscale="log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.1f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_costs(rows: list[dict[str, Any]], path: Path) -> None:
    """What each entry holds, and its time to AdamW's end where it comes to it."""
    in_order = sorted(rows, key=lambda row: row["mean_loss"], reverse=True)
    names = [row["entry"] for row in in_order]
    figure = Figure(figsize=(8, 1 + 0.25 * len(rows)), layout="constrained")
    state, times = figure.subplots(1, 2, sharey=True)
    state.barh(names, [row["state_mib"] for row in in_order])
    state.set(xlabel="optimizer state, MiB")
    reached = [
        0.0 if row["time_to_adamw"] == "-" else float(row["time_to_adamw"]) for row in in_order
    ]
    bars = times.barh(names, reached, color="C1")
    times.bar_label(
        bars, ["" if time else "not reached" for time in reached], padding=3, color="gray"
    )
    times.set(xlabel="time to AdamW's loss, over AdamW's")
    for axes in (state, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, metadata={"Date": None})


def table(rows: list[dict[str, Any]]) -> str:
    """All entries, the best first."""
    columns = {
        "optimizer": "{entry}",
        "learning rate": "{learning_rate:g}",
        "validation loss": "{mean_loss:.4f}",
        "spread": "{spread:.4f}",
        "steps to AdamW's loss": "{steps_to_adamw}",
        "time to AdamW's loss": "{time_to_adamw}",
        "state, MiB": "{state_mib:.1f}",
    }
    return record.table(sorted(rows, key=lambda row: row["mean_loss"]), columns)


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    if config.time:
        measure(config)
    elif not config.draw:
        study(config)
    if config.quick:
        return
    rows = summarize()
    draw(rows, record.RESULTS / "convergence.svg")
    draw_costs(rows, record.RESULTS / "convergence_costs.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
