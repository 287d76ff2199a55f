"""What the SUMO paper says of moments, Newton-Schulz, rank and interval, on runs of the example.

python benchmarks/claims.py                # 20 minutes on two cores
python benchmarks/claims.py --draw         # the figure of the record

The spectrum of the projected moments (its Figure 1) and what five Newton-Schulz steps make of them
(its Lemma 3.2) over a run of each algorithm; and the grid of ranks and intervals (its Table 9).
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import convergence
import jax
import jax.numpy as jnp
import optax
import tyro
from matplotlib.figure import Figure

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import record
import subspace
import sweep
from common import optimizers

PUBLISHED = "sumo as published"
RATES = {"sumo": 1.5e-2, PUBLISHED: 1e-2}  # the convergence study's best
ALGORITHMS = {
    name: optimizers.parse(sweep.settings("sumo", convergence.STUDY[name].settings)[1:])
    for name in RATES
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the preset `tiny`, looks at the moments, and fills the grid."""

    steps: int = 500
    """Steps to train."""
    look_every: int = 25
    """Steps between two looks at the moments."""
    ranks: tuple[int, ...] = (16, 32, 64)
    """Of the grid; the middle one is that of the moments."""
    intervals: tuple[int, ...] = (10, 50, 200)
    """Steps between refreshes, of the grid."""
    pretrain: str = ""
    """More arguments of examples/pretrain.py, as in --pretrain="--width 64"."""
    draw: bool = False
    """Train nothing: the tables and the figure of what is recorded."""


def look(moments: Any) -> dict[str, jax.Array]:
    """Condition numbers of all moments, and the relative errors of Newton-Schulz on them."""
    of_each = []
    for M in jax.tree.leaves(moments):
        s = jnp.linalg.svd(M, compute_uv=False)
        exact, approximate = (
            sumo_optax.polar_factor(M, method=method) for method in ("svd", "newton_schulz")
        )
        error = jnp.linalg.norm(approximate - exact) / jnp.linalg.norm(exact)
        least = jnp.maximum(s[-1], jnp.finfo(s.dtype).eps * s[0])
        of_each.append((s[0] / least, error))
    conditions, errors = map(jnp.stack, zip(*of_each, strict=True))
    return {
        "least_condition": conditions.min(),
        "median_condition": jnp.median(conditions),
        "largest_condition": conditions.max(),
        "median_error": jnp.median(errors),
        "largest_error": errors.max(),
    }


def spectra(config: Config, name: str) -> list[dict[str, Any]]:
    """A row for each look at the moments of a run."""
    schedule = functools.partial(optimizers.schedule, steps=config.steps)
    adam_rate = optimizers.LEARNING_RATES["sumo"][1]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        sumo_optax.sumo(
            schedule(RATES[name]),
            config.ranks[len(config.ranks) // 2],
            adam_learning_rate=schedule(adam_rate),
            **ALGORITHMS[name],
        ),
    )
    steps = enumerate(subspace.training(tx, config.steps, config.pretrain), 1)
    looking, rows = jax.jit(look), []
    for t, (_, _, _, state) in steps:
        if t % config.look_every == 0:
            seen = looking(optax.tree.get(state, "moment"))
            rows.append({"algorithm": name, "step": t} | {k: float(v) for k, v in seen.items()})
    return rows


GRID = sweep.Record("grid", ("rank", "refresh_every", "learning_rate", "seed"))


def grid_run(config: Config, rank: int, interval: int, rate: float, seed: int) -> dict[str, Any]:
    settings = {**ALGORITHMS[PUBLISHED], "refresh_every": interval}
    argv = ["--rank", str(rank), "--learning-rate", f"{rate:g}", "--seed", str(seed)]
    argv += ["--steps", str(config.steps), *config.pretrain.split()]
    argv += ["--set", *(f"{k}={v}" for k, v in settings.items())]
    return convergence.trained(Path(f"runs/grid/{rank}-{interval}"), argv)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Condition numbers and errors over the steps, the range of all matrices and their median."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    conditions, errors = figure.subplots(1, 2)
    for name in ALGORITHMS:
        of_name = [row for row in rows if row["algorithm"] == name]
        column = {key: [row[key] for row in of_name] for key in of_name[0]}
        (line,) = conditions.plot(column["step"], column["median_condition"], label=name)
        ends = column["least_condition"], column["largest_condition"]
        conditions.fill_between(column["step"], *ends, color=line.get_color(), alpha=0.2, lw=0)
        errors.plot(column["step"], column["median_error"], label=name)
    conditions.set(yscale="log", ylabel="condition number of the moments")
    errors.margins(y=0.2)
    errors.set(ylim=(0, None), ylabel="error of five Newton-Schulz steps")
    for axes in (conditions, errors):
        axes.set(xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    conditions.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def summarize() -> list[dict[str, Any]]:
    """The looks at the moments, less and less often."""
    rows = json.loads((record.RESULTS / "claims.json").read_text())["rows"]
    first, last = rows[0]["step"], rows[-1]["step"]
    kept = {first, 2 * first, 4 * first, 8 * first, last}
    return [row for row in rows if row["step"] in kept]


def table(rows: list[dict[str, Any]]) -> str:
    """Of all matrices, the median and the worst."""
    columns = {
        "algorithm": "{algorithm}",
        "step": "{step}",
        "condition number": "{median_condition:,.0f}",
        "largest": "{largest_condition:,.0f}",
        "error of Newton-Schulz": "{median_error:.2f}",
        "largest error": "{largest_error:.2f}",
    }
    return record.table(rows, columns)


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    if not config.draw:
        rows = [row for name in ALGORITHMS for row in spectra(config, name)]
        print("written:", record.write("claims", rows))
        for rank, interval in itertools.product(config.ranks, config.intervals):
            make = functools.partial(grid_run, config)
            GRID.get(rank, interval, RATES[PUBLISHED], 0, make=make)
    rows = json.loads((record.RESULTS / "claims.json").read_text())["rows"]
    draw(rows, record.RESULTS / "claims.svg")
    grid = {
        "rank": "{rank}",
        "refreshed every": "{refresh_every}",
        "validation loss": "{validation_loss:.4f}",
    }
    print(table(summarize()), record.table(list(GRID.rows().values()), grid), sep="\n\n")


if __name__ == "__main__":
    main()
