"""Compiles one optimizer's step in one case of `compiled.py`: a line of JSON.

python benchmarks/compile_one.py update_60m_h100 sumo
python benchmarks/compile_one.py update_60m_h100 sumo --keep .   # the program's text in a file
"""

import targets  # isort: skip  # before JAX

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import program
import training_step
import tyro
from compiled import CASES, NO_TARGET, OURS, PLANNED, Case
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sumo_optax


def optimizer(name: str, case: Case) -> optax.GradientTransformation:
    """With the same matrices for all."""
    numbers = training_step.projections
    if name == "sgd":
        return optax.sgd(1e-2)
    if name == "adamw":
        return optax.adamw(1e-3)
    if name == "muon":
        return optax.contrib.muon(1e-2, muon_weight_dimension_numbers=numbers)
    if name == "galore":
        return optax.contrib.galore(1e-2, case.rank, weight_dimension_numbers=galore_numbers)
    function, settings = OURS[name]
    given = {"weight_dimension_numbers": numbers, "state_dtype": case.state_dtype}
    return getattr(sumo_optax, function)(1e-2, case.rank, **given, **settings)


def galore_numbers(params: Any) -> Any:
    """optax's GaLore has a type of its own for them, and a matrix for each leaf."""
    return jax.tree.map(
        lambda spec: optax.contrib.GaLoreDimensionNumbers(
            spec.reduction_axis[0], spec.output_axis[0]
        ),
        training_step.projections(params),
    )


def state(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Shapes of the optimizer's state, laid out as `state_shardings` says."""
    where = jax.tree.map(lambda x: x.sharding, params)
    placed = sumo_optax.state_shardings(tx, params, where)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        placed,
    )


def bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def clock() -> float:
    """Processor seconds so far, of all threads and of the assembler that XLA may start."""
    return sum(os.times()[:4])


def compile_step(case: Case, tx: optax.GradientTransformation) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and what was seen on the way to it."""
    mesh = targets.mesh(case.target, None if case.fsdp else 1)
    model = case.model
    params = training_step.parameters(model, mesh, sharded=case.fsdp)
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
    if case.update_alone:
        params = params["layers"]
        step, third = training_step.update_step(tx), params
    else:
        step = training_step.train_step(model, tx, rows if case.fsdp else None)
        third = jax.ShapeDtypeStruct((mesh.size, model.length + 1), "int32", sharding=rows)
    held = state(tx, params, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (params, held))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, everywhere))
    begun = clock()
    traced = jitted.trace(params, held, third)
    lowered = traced.lower(lowering_platforms=(targets.platform(case.target),))
    between = clock()
    compiled = lowered.compile()
    return compiled, {
        "devices": mesh.size,
        "trace_s": round(between - begun, 1),
        "compile_s": round(clock() - between, 1),
        "equations": program.equations(traced.jaxpr.jaxpr),
        "state_bytes": bytes_on_a_device(held),
    }


def planned_bytes(case: Case, name: str) -> int | None:
    """Parameters and state as the planner foretells them."""
    if not case.planned or name not in PLANNED:
        return None
    argv = [sys.executable, "-m", "sumo_optax", "plan", *case.planned, "--json"]
    plan = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    (row,) = (row for row in plan["rows"] if row["optimizer"] == PLANNED[name])
    return row["parameters"] + row["state"]


def main(
    case: tyro.conf.Positional[str],
    name: tyro.conf.Positional[str],
    limit: int = 3600,
    keep: Path | None = None,
) -> None:
    """Compiles one optimizer's step.

    Args:
        case: of `compiled.py`.
        name: of an optimizer there.
        limit: processor seconds, after which the process is ended.
        keep: a folder for the program's text.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    if why := targets.missing(CASES[case].target):
        raise SystemExit(f"{NO_TARGET}: {why}")
    compiled, seen = compile_step(CASES[case], optimizer(name, CASES[case]))
    if keep:
        (keep / f"{case}-{name}.hlo").write_text(compiled.as_text() or "")
    planned = planned_bytes(CASES[case], name)
    extra = {} if planned is None else {"planned_bytes": planned}
    print(json.dumps(seen | program.figures(compiled) | extra))


if __name__ == "__main__":
    tyro.cli(main)
