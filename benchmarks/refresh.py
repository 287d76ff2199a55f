"""How much of a gradient a basis captures once it has moved, on gradients of a training run.

python benchmarks/refresh.py               # 200 steps of the preset `tiny`: a minute on two cores
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import record
import subspace
from common import optimizers


@dataclasses.dataclass(frozen=True)
class Config:
    """Records gradients of a SUMO run, and moves bases from one of them to another."""

    steps: tuple[int, ...] = (2, 150, 199, 200)
    """Where gradients are recorded; the basis moves from each to the last."""
    rank: int = 32
    """Of the bases."""
    pretrain: str = ""
    """More arguments of examples/pretrain.py, as in --pretrain="--width 64"."""


def recorded(config: Config) -> dict[int, Any]:
    """The gradients at some steps of a run with the example's rates."""
    rate, adam_rate = optimizers.LEARNING_RATES["sumo"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        sumo_optax.sumo(rate, config.rank, adam_learning_rate=adam_rate),
    )
    steps = enumerate(subspace.training(tx, config.steps[-1], config.pretrain), 1)
    return {t: grads for t, (_, grads, _, _) in steps if t in config.steps}


def energies(basis: Any, config: Config, old: Any, new: Any) -> dict[str, float]:
    """Of the new gradient, over the best basis's: of the old one's basis, of that once moved."""
    tx = sumo_optax.scale_by_sumo(config.rank, basis=basis, refresh_every=1)
    update, look = jax.jit(tx.update), jax.jit(subspace.look)
    state: Any = tx.init(old)
    for _ in range(5):  # tracking comes closer step by step, from a random basis
        _, state = update(old, state)
    before, after = look(state.basis, new), look(update(new, state)[1].basis, new)
    return {
        "old": float(before["energy"]),
        "moved": float(after["energy"]),
        "least": float(after["least_energy"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    *earlier, last = config.steps
    gradients = recorded(config)
    rows = [
        {"basis": basis, "from": t, "to": last}
        | energies(basis, config, gradients[t], gradients[last])
        for basis in ("svd", "randomized_svd", "tracking")
        for t in earlier
    ]
    print("written:", record.write("refresh", rows))
    columns = {
        "basis": "{basis}",
        "from step": "{from}",
        "to step": "{to}",
        "the old one's energy": "{old:.3f}",
        "the new one's": "{moved:.3f}",
        "of the worst matrix": "{least:.3f}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
