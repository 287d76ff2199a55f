"""What an optimizer step sends between devices, read from the compiled program.

python benchmarks/collectives.py           # one 512 x 1376 matrix on 8 simulated devices
"""

import dataclasses
import math
import os
import re
from collections import Counter
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import optax
import record
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sumo_optax

SPECS = {"rows": P("x", None), "columns": P(None, "x"), "both": P("x", "y")}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
Collective = tuple[str, list[int]]  # kind, and the numbers in each operand


@dataclasses.dataclass(frozen=True)
class Config:
    """Counts the collectives of each optimizer's step on one sharded matrix."""

    m: int = 512
    """Rows."""
    n: int = 1376
    """Columns."""
    rank: int = 128
    """Of the low-rank optimizers."""


def collectives(hlo: str) -> tuple[list[Collective], list[Collective]]:
    """Those of every step, and those in the branches of conditionals: of refresh steps."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if line and not line.startswith((" ", "}")):
            name = line.split(" ")[1 if line.startswith("ENTRY") else 0].lstrip("%")
            computations[name] = []
        elif name:
            computations[name].append(line)
    lines = "\n".join(line for body in computations.values() for line in body)
    branches = {
        name.lstrip("%")
        for found in re.findall(r"branch_computations=\{([^}]*)\}", lines)
        for name in found.split(", ")
    } | set(re.findall(r"(?:true|false)_computation=%([\w.\-]+)", lines))
    always: list[Collective] = []
    sometimes: list[Collective] = []
    for name, body in computations.items():
        for line in body:
            if match := COLLECTIVE.search(line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
                sizes = [math.prod(map(int, filter(None, s.split(",")))) for s in shapes]
                (sometimes if name in branches else always).append((match[2], sizes))
    return always, sometimes


def compiled(tx: optax.GradientTransformation, shape: tuple[int, int], spec: P) -> str:
    """The program of a step on 4 x 2 devices."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    state = sumo_optax.abstract_state(tx, params, {"kernel": sharding})
    both = jax.tree.map(lambda x: x.sharding, (params, state))
    update = jax.jit(tx.update, out_shardings=both)
    return update.lower(params, state, params).compile().as_text() or ""


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
    return {
        "optax.adamw": optax.adamw(1e-3),
        "optax muon": optax.contrib.muon(1e-3),
        "optax galore": optax.contrib.galore(1e-3, rank=rank),
        "sumo": sumo_optax.sumo(1e-3, rank),
        "sumo, refreshed every 200, residual=None": sumo_optax.sumo(
            1e-3, rank, basis="randomized_svd", residual=None
        ),
        "online_subspace_descent": sumo_optax.online_subspace_descent(1e-3, rank),
        "mofasgd": sumo_optax.mofasgd(1e-3, rank),
    }


def row(name: str, where: str, hlo: str) -> dict[str, Any]:
    always, sometimes = collectives(hlo)
    total = lambda found: sum(sum(sizes) for _, sizes in found)
    kinds = Counter(kind for kind, _ in always + sometimes)
    return {
        "optimizer": name,
        "sharded": where,
        "step_bytes": 4 * total(always),
        "refresh_bytes": 4 * total(sometimes),
        "largest_bytes": 4 * max((max(sizes) for _, sizes in always + sometimes), default=0),
        "kinds": ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none",
    }


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    rows = []
    for name, tx in optimizers(config.rank).items():
        for where, spec in SPECS.items():
            try:
                rows.append(row(name, where, compiled(tx, (config.m, config.n), spec)))
            except Exception as error:  # what a peer cannot do is a result
                failed = {"kinds": f"fails: {type(error).__name__}"}
                nothing = dict.fromkeys(("step_bytes", "refresh_bytes", "largest_bytes"), 0)
                rows.append({"optimizer": name, "sharded": where} | nothing | failed)
    print("written:", record.write("collectives", rows))
    columns = {
        "optimizer": "{optimizer}",
        "sharded": "{sharded}",
        "bytes of a step": "{step_bytes:,}",
        "in branches besides": "{refresh_bytes:,}",
        "largest array": "{largest_bytes:,}",
        "collectives in the program": "{kinds}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
