"""Which optimizer fine-tunes a BERT best on GLUE: accuracy, memory, time.

python benchmarks/finetuning.py --model all-MiniLM-L6-v2 --data glue            # all: many hours
python benchmarks/finetuning.py --model all-MiniLM-L6-v2 --data glue --tasks rte --only adamw
python benchmarks/finetuning.py --model all-MiniLM-L6-v2 --data glue --time     # a quiet machine
python benchmarks/finetuning.py --draw                                          # the record's table

Made small, for two cores: rows cut to 64 tokens, one epoch of MRPC, three of RTE, which has fewer
rows and is harder. Each one's learning rate walks along 1, 2, 5, 10 ... from where it is guessed to
be best, at rank 8 on MRPC, until the validation loss below and above it was worse; then come five
seeds at that rate, on both tasks and at both ranks. A run that is in the record is not run again:
stop and start as you like.
"""

import dataclasses
import functools
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune
import record
import sweep
from common import glue

RATES = [float(f"{digit}e{power}") for power in range(-5, 0) for digit in (1, 2, 5)]
SEEDS = range(5)
TASKS = {"mrpc": ("--epochs", "1"), "rte": ("--epochs", "3")}
SWEPT_TASK, SWEPT_RANK = "mrpc", 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is compared: an optimizer, how it differs from its default, where its rate may lie."""

    optimizer: str
    rate: float
    rank: int | None = None
    settings: str = ""


STUDY = {"adamw": Entry("adamw", 1e-4)}
for rank in (8, 4):
    STUDY |= {
        f"lora, rank {rank}": Entry("lora", 2e-3, rank),
        f"optax galore, rank {rank}": Entry("galore", 2e-3, rank),
        f"sumo, rank {rank}": Entry("sumo", 2e-3, rank),
        f"sumo, rank {rank}, Newton-Schulz": Entry("sumo", 2e-3, rank, "polar=newton_schulz"),
        f"mofasgd, rank {rank}": Entry("mofasgd", 1e-3, rank),
    }


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a model with every optimizer of the study."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A folder in the form of Hugging Face, or the name of one on its hub."""
    data: Path | None = None
    """A folder with one of TSV files a task, named in capitals; by default, the hub."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Of GLUE."""
    only: tuple[str, ...] = tuple(STUDY)
    """Which of the study's."""
    arguments: str = ""
    """More arguments of examples/finetune.py, as in --arguments="--batch 8"."""
    draw: bool = False
    """Train nothing: the table of what is recorded."""
    time: bool = False
    """Train nothing: time a training step of each, on a machine that does nothing else."""
    runs: Path = Path("runs/finetune")
    """Where the runs are kept."""


def arguments(config: Config, task: str, name: str, rate: float, seed: int) -> list[str]:
    """Those of `examples/finetune.py` for a run."""
    entry = STUDY[name]
    argv = ["--model", config.model, "--task", task, "--optimizer", entry.optimizer]
    argv += ["--learning-rate", f"{rate:g}", "--seed", str(seed), "--length", "64", *TASKS[task]]
    argv += config.arguments.split()
    if config.data:
        argv += ["--data", str(config.data / task.upper())]
    if entry.rank:
        argv += ["--rank", str(entry.rank)]
    return argv + sweep.settings(entry.optimizer, entry.settings)


def run(config: Config, task: str, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    out = config.runs / task / f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    summary = sweep.train(finetune, out, arguments(config, task, name, rate, seed))
    return {
        "score": summary[glue.TASKS[task].metrics[0]],
        "validation_loss": summary["validation_loss"],
        "state_bytes": summary["state_bytes"],
    }


RUNS = sweep.Record("finetuning", ("task", "entry", "learning_rate", "seed"))


def loss(config: Config, task: str, name: str, rate: float, seed: int = 0) -> float:
    """The validation loss of a run: less of chance than its score on a few hundred rows."""
    row = RUNS.get(task, name, rate, seed, make=functools.partial(run, config))
    return row["validation_loss"]


def study(config: Config) -> None:
    """Makes all runs that are missing, seed by seed."""
    for name in config.only:
        if name not in STUDY:
            raise SystemExit(f"error: no entry {name!r}; there are {', '.join(STUDY)}")
    for seed, task, name in itertools.product(SEEDS, config.tasks, config.only):
        swept = name.replace(f"rank {STUDY[name].rank}", f"rank {SWEPT_RANK}")
        rate = sweep.best_rate(
            functools.partial(loss, config, SWEPT_TASK, swept), STUDY[name].rate, RATES, above=1
        )
        loss(config, task, name, rate, seed)


def timed(config: Config, name: str) -> dict[str, Any]:
    """A training step of an entry, and all memory that it takes."""
    argv = arguments(config, SWEPT_TASK, name, STUDY[name].rate, seed=0)
    argv += ["--out", str(config.runs / "timed"), "--overwrite"]
    run = finetune.prepare(finetune.parse(argv))
    lazy: Any = run.compile()
    step = lazy.lower(1, run.state, next(run.batches)).compile()
    memory = step.memory_analysis()
    return {
        "entry": name,
        "train_step_ms": round(sweep.step_ms(run, step, steps=20)),
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def measure(config: Config) -> None:
    """A row for each entry: its step, also over AdamW's."""
    rows = sweep.timed_over_adamw(config.only, functools.partial(timed, config))
    record.write("finetuning_step", rows)


def summarize() -> list[dict[str, Any]]:
    """A row for each task and entry with three seeds or all of them, at its best rate."""
    rows = []
    for task, name in itertools.product(TASKS, STUDY):
        best = RUNS.at_best_rate(task, name, seeds=SEEDS)
        best = best or RUNS.at_best_rate(task, name, seeds=SEEDS[:3])
        if not best:
            continue
        scores = [x["score"] for x in best]
        rows.append(
            {
                "task": task,
                "entry": name,
                "learning_rate": best[0]["learning_rate"],
                "mean_score": statistics.mean(scores),
                "spread": statistics.stdev(scores),
                "mean_loss": statistics.mean(x["validation_loss"] for x in best),
                "seeds": len(best),
                "state_mib": best[0]["state_bytes"] / 2**20,
            }
        )
    return sorted(rows, key=lambda row: (row["task"], -row["mean_score"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The best first: the score is the task's own metric after the last epoch."""
    columns = {
        "task": "{task}",
        "optimizer": "{entry}",
        "learning rate": "{learning_rate:g}",
        "score": "{mean_score:.3f}",
        "standard deviation": "{spread:.3f}",
        "seeds": "{seeds}",
        "validation loss": "{mean_loss:.3f}",
        "state, MiB": "{state_mib:.1f}",
    }
    return record.table(rows, columns)


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    if config.time:
        measure(config)
    elif not config.draw:
        study(config)
    print(table(summarize()))


if __name__ == "__main__":
    main()
