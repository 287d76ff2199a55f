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
from compiled import CASES, FUSED, NO_TARGET, PLANNED, Case, optimizer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sumo_optax


def clock() -> float:
    """Processor seconds so far, of all threads and of the assembler that XLA may start."""
    return sum(os.times()[:4])


def shapes(tx: optax.GradientTransformation, case: Case) -> tuple[Any, Any, Mesh]:
    """Those of parameters and state, laid out as the case and `state_shardings` say."""
    mesh = targets.mesh(case.target, case.axes or {"x": 1})
    params = training_step.parameters(case.model, mesh)
    if case.update_alone:
        params = params["layers"]
    placed = sumo_optax.state_shardings(tx, params, jax.tree.map(lambda x: x.sharding, params))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        placed,
    )
    return params, state, mesh


def state_bytes(tx: optax.GradientTransformation, case: Case) -> tuple[int, int]:
    """Of the whole state, and what a device holds of it."""
    arrays = jax.tree.leaves(shapes(tx, case)[1])
    held = lambda shape_of: sum(math.prod(shape_of(x)) * x.dtype.itemsize for x in arrays)
    return held(lambda x: x.shape), held(lambda x: x.sharding.shard_shape(x.shape))


def figures(
    case: Case, tx: optax.GradientTransformation, fused: bool = False, keep: Path | None = None
) -> dict[str, Any]:
    """Of the compiled step; its text is written to `keep`."""
    params, state, mesh = shapes(tx, case)
    everywhere = NamedSharding(mesh, P())
    batch = [axis for axis in mesh.axis_names if axis != "tensor"]
    rows = NamedSharding(mesh, P(tuple(batch)))
    sequences = math.prod(mesh.shape[axis] for axis in batch)
    if case.update_alone:
        step, third = training_step.update_step(tx), params
    else:
        make = training_step.fused_step if fused else training_step.train_step
        step = make(case.model, tx, rows if mesh.size > 1 else None)
        third = jax.ShapeDtypeStruct((sequences, case.model.length + 1), "int32", sharding=rows)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, everywhere))
    begun = clock()
    traced = jitted.trace(params, state, third)
    lowered = traced.lower(lowering_platforms=(targets.platform(case.target),))
    between = clock()
    compiled = lowered.compile()
    seconds = {"trace_s": between - begun, "compile_s": clock() - between}
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(compiled.as_text() or "")
    return {
        "devices": mesh.size,
        **{name: round(x, 1) for name, x in seconds.items()},
        "equations": program.equations(traced.jaxpr.jaxpr),
        "state_bytes": state_bytes(tx, case)[1],
        **program.figures(compiled),
    }


def planned(case: Case, name: str) -> dict[str, int]:
    """Bytes of parameters and state as the planner foretells them, where it can."""
    if not case.planned or name not in PLANNED:
        return {}
    argv = [sys.executable, "-m", "sumo_optax", "plan", *case.planned, "--json"]
    plan = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    (row,) = (row for row in plan["rows"] if row["optimizer"] == PLANNED[name])
    return {"planned_bytes": row["parameters"] + row["state"]}


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
    tx = optimizer(name.removesuffix(", value_and_update"), CASES[case])
    found = figures(CASES[case], tx, name in FUSED, keep and keep / f"{case}, {name}.hlo")
    print(json.dumps(found | planned(CASES[case], name)))


if __name__ == "__main__":
    tyro.cli(main)
