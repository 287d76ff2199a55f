"""How well a basis follows the gradients of a training run, and how orthonormal it stays.

python benchmarks/subspace.py              # 2000 steps of two optimizers: 20 minutes on two cores
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain
import record
from common import optimizers

# Of the matrices, twice the best and so harder to follow; of the other leaves.
RATES = 1e-2, 5e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the preset `tiny` and looks at bases and gradients on the way."""

    steps: int = 2000
    """Steps to train."""
    look_every: int = 50
    """Steps between two looks."""
    rank: int = 32
    """Of both optimizers."""
    pretrain: str = ""
    """More arguments of examples/pretrain.py, as in --pretrain="--width 64"."""


def candidates(config: Config) -> dict[str, optax.GradientTransformation]:
    """The optimizers, with the schedule of the example."""
    learning_rate, adam_learning_rate = (optimizers.schedule(x, config.steps) for x in RATES)
    clipped = lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)
    return {
        "online_subspace_descent": clipped(
            sumo_optax.online_subspace_descent(
                learning_rate, config.rank, adam_learning_rate=adam_learning_rate
            )
        ),
        "Adam in an SVD basis of every 200 steps": clipped(
            adam_in_svd_basis(learning_rate, config.rank, adam_learning_rate)
        ),
    }


def adam_in_svd_basis(learning_rate, rank, adam_learning_rate):
    """GaLore on the short side, with the fallback that the others have."""
    inner = sumo_optax.scale_in_subspace(
        optax.scale_by_adam(), rank, basis="svd", side="short", fallback=optax.scale_by_adam()
    )
    rate = lambda path: learning_rate if optimizers.is_matrix(path) else adam_learning_rate

    def scaled(updates, state, params=None):
        step = lambda path, u: -rate(path)(state) * u
        return jax.tree.map_with_path(step, updates), state + 1

    init = lambda params: jnp.zeros([], jnp.int32)
    return optax.chain(inner, optax.GradientTransformation(init, scaled))


def look(bases: Any, grads: Any) -> dict[str, jax.Array]:
    """Over all matrices: the energy captured, over the best basis's; and ||PᵀP - I||."""
    energies, errors = [], []
    for path, P in jax.tree.leaves_with_path(bases):
        G = functools.reduce(
            lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, grads
        )
        G = G if G.shape[0] == P.shape[0] else G.T
        Q = jnp.linalg.qr(P)[0]
        best = jnp.sum(jnp.linalg.svd(G, compute_uv=False)[: P.shape[1]] ** 2)
        energies.append(jnp.sum((Q.T @ G) ** 2) / best)
        errors.append(jnp.linalg.norm(P.T @ P - jnp.eye(P.shape[1])))
    energies, errors = jnp.stack(energies), jnp.stack(errors)
    return {
        "energy": energies.mean(),
        "least_energy": energies.min(),
        "orthogonality": errors.max(),
    }


def training(
    tx: optax.GradientTransformation, steps: int, arguments: str = ""
) -> Iterator[tuple[jax.Array, Any, Any, Any]]:
    """Steps of the example with this optimizer: loss, gradients, and its state before and after."""
    argv = ["--steps", str(steps), "--out", "runs/subspace", "--overwrite", *arguments.split()]
    run = pretrain.prepare(pretrain.parse(argv))
    params = run.init().params
    state = tx.init(params)

    @jax.jit
    def step(params, state, windows):
        loss, grads = jax.value_and_grad(run.loss)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    for _ in range(steps):
        before = state
        params, state, loss, grads = step(params, state, next(run.batches))
        yield loss, grads, before, state


def train(config: Config, name: str, tx: optax.GradientTransformation) -> dict[str, Any]:
    """What was seen of one optimizer; each look at a gradient and the basis that it meets."""
    seen, looking = [], jax.jit(look)
    steps = enumerate(training(tx, config.steps, config.pretrain), 1)
    for t, (loss, grads, before, after) in steps:
        if t % config.look_every == 0:
            held = looking(optax.tree.get(before, "basis"), grads)
            fresh = looking(optax.tree.get(after, "basis"), grads)
            seen.append({"step": t, "loss": float(loss)} | {k: float(v) for k, v in held.items()})
            seen[-1]["energy_after"] = float(fresh["energy"])
    return {
        "optimizer": name,
        "mean_energy": sum(s["energy"] for s in seen) / len(seen),
        "mean_energy_after": sum(s["energy_after"] for s in seen) / len(seen),
        "largest_orthogonality_error": max(s["orthogonality"] for s in seen),
        "final_loss": sum(s["loss"] for s in seen[-5:]) / len(seen[-5:]),
        "seen": seen,
    }


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    rows = [train(config, name, tx) for name, tx in candidates(config).items()]
    print("written:", record.write("subspace", rows))
    columns = {
        "optimizer": "{optimizer}",
        "energy captured, over the best": "{mean_energy:.3f}",
        "after the step": "{mean_energy_after:.3f}",
        "largest ||PᵀP - I||": "{largest_orthogonality_error:.1e}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
