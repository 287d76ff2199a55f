"""What an optimizer step costs: time, refresh, compilation, memory, on the matrices of a LLaMA.

python benchmarks/step.py                      # LLaMA-60M at rank 128 and 8
python benchmarks/step.py --preset 130m --ranks 256

All optimizers are measured in one process; read the ratios, the times move between machines.
"""

import dataclasses
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax
import tyro

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import record
from common.llama import PRESETS

PERIODIC = "side=long, refreshed every 200, residual=None"
STAGGERED = "staggered"


@dataclasses.dataclass(frozen=True)
class Config:
    """Times optimizer steps on random gradients of a model's projection matrices."""

    preset: str = "60m"
    """Whose matrices."""
    ranks: tuple[int, ...] = (128, 8)
    """Ranks of the low-rank optimizers."""
    steps: int = 11
    """Steps to time at least, and two seconds of them; the median counts."""


def matrices(preset: str) -> dict[str, Any]:
    """Random gradients with the shapes of all projections of a model's blocks."""
    shape = PRESETS[preset]
    d, f = shape.width, shape.hidden
    block = {name: (d, d) for name in "qkvo"} | {"gate": (d, f), "up": (d, f), "down": (f, d)}
    keys = iter(jax.random.split(jax.random.key(0), shape.layers * len(block)))
    return {
        f"layer{i}": {
            k: {"kernel": 0.02 * jax.random.normal(next(keys), s)} for k, s in block.items()
        }
        for i in range(shape.layers)
    }


def products_alone(rank: int, *, both_sides: bool) -> optax.GradientTransformation:
    """The products that no optimizer in a subspace can do without: QᵀG and Q(QᵀG); and GV."""

    def init(params):
        thin = lambda side: jax.tree.map(lambda x: jnp.ones((side(x.shape), rank)), params)
        return thin(max), thin(min), thin(max)

    def update(updates, state, params=None):
        tall = lambda G: G.shape[0] >= G.shape[1]
        onto = lambda G, Q: Q @ (Q.T @ G) if tall(G) else (G @ Q) @ Q.T
        beyond = lambda G, V: G @ V if tall(G) else (V.T @ G).T
        bases, rows, seen = state
        if both_sides:
            seen = jax.tree.map(beyond, updates, rows)
        return jax.tree.map(onto, updates, bases), (bases, rows, seen)

    return optax.GradientTransformation(init, update)


def optimizers(ranks: tuple[int, ...]) -> dict[str, optax.GradientTransformation]:
    table = {
        "optax.adamw": optax.adamw(1e-3),
        "optax muon": optax.contrib.muon(1e-3),
        "three products alone, rank 32": products_alone(32, both_sides=True),
        "mofasgd, rank 32": sumo_optax.mofasgd(1e-3, 32),
    }
    for r in ranks:
        periodic = functools.partial(
            sumo_optax.sumo,
            1e-3,
            r,
            basis="randomized_svd",
            side="long",
            refresh_every=200,
            residual=None,
        )
        table |= {
            f"two products alone, rank {r}": products_alone(r, both_sides=False),
            f"optax galore, rank {r}": optax.contrib.galore(1e-3, rank=r),
            f"sumo, rank {r}": sumo_optax.sumo(1e-3, r),
            f"sumo, rank {r}, residual=None": sumo_optax.sumo(1e-3, r, residual=None),
            f"sumo, rank {r}, refresh_every=1": sumo_optax.sumo(1e-3, r, refresh_every=1),
            f"sumo, rank {r}, {PERIODIC}": periodic(),
            f"the same, Newton-Schulz, rank {r}": periodic(polar="newton_schulz"),
            f"the same, {STAGGERED}, rank {r}": periodic(stagger=True),
            f"online_subspace_descent, rank {r}": sumo_optax.online_subspace_descent(1e-3, r),
        }
    return table


def measure(name: str, tx: optax.GradientTransformation, grads: Any, steps: int) -> dict[str, Any]:
    """Milliseconds and bytes of one optimizer; its first step is its refresh step."""
    state = tx.init(grads)
    begun = time.perf_counter()
    update = jax.jit(tx.update).lower(grads, state, grads).compile()
    compilation = time.perf_counter() - begun

    def milliseconds(state):
        begun = time.perf_counter()
        result = jax.block_until_ready(update(grads, state, grads))
        return 1e3 * (time.perf_counter() - begun), result[1]

    milliseconds(state)
    firsts = [milliseconds(state) for _ in range(3)]
    refresh, state = statistics.median(elapsed for elapsed, _ in firsts), firsts[-1][1]
    times: list[float] = []
    least = 250 if STAGGERED in name else steps
    while len(times) < least or sum(times) < 2000:
        elapsed, state = milliseconds(state)
        times.append(elapsed)
    analysis = update.memory_analysis()
    temporaries = 0 if analysis is None else analysis.temp_size_in_bytes
    return {
        "optimizer": name,
        "step_ms": round(statistics.median(times), 1),
        "worst_ms": round(max(times), 1),
        "steps": len(times),
        "refresh_ms": round(refresh, 1),
        "compile_s": round(compilation, 1),
        "state_bytes": sumo_optax.state_bytes(tx, grads),
        "temporary_over_gradient_bytes": round(
            temporaries / sum(x.nbytes for x in jax.tree.leaves(grads)), 3
        ),
    }


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    grads = jax.tree.map(jnp.asarray, matrices(config.preset))
    rows = []
    for name, tx in optimizers(config.ranks).items():
        rows.append(measure(name, tx, grads, config.steps))
        rows[-1]["over_adamw"] = round(rows[-1]["step_ms"] / rows[0]["step_ms"], 2)
        rows[-1]["worst_over_median"] = round(rows[-1]["worst_ms"] / rows[-1]["step_ms"], 2)
        print(rows[-1], flush=True)
    print("written:", record.write(f"step_{config.preset}", rows))
    columns = {
        "optimizer": "{optimizer}",
        "step, ms": "{step_ms:.0f}",
        "over AdamW": "{over_adamw:.2f}",
        "worst over median": "{worst_over_median:.2f}",
        "first step, ms": "{refresh_ms:.0f}",
        "compile, s": "{compile_s:.0f}",
        "state, bytes": "{state_bytes:,}",
        "temporaries / gradients": "{temporary_over_gradient_bytes:.2f}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
