"""What an optimizer's step takes on the GPU that is here: time, memory, seconds to compile.

python benchmarks/on_device.py                                          # all cases for one H100
python benchmarks/on_device.py --cases train_7b_h100 --optimizers adamw sumo

The cases and optimizers are those of `compiled.py`, which foretells the memory. Each step is made
in a process of its own: several compile at once, and one at a time has the device.
"""

import dataclasses
import fcntl
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The peak is of what a step takes, not of a share of the device that is taken at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import record
import training_step
import tyro
from compiled import CASES, FUSED, OPTIMIZERS, failure, is_for, optimizer
from jax.sharding import Mesh

ON_ONE_H100 = tuple(name for name, case in CASES.items() if case.target == "h100")
INTERVALS = 2  # of ten steps: SUMO moves its bases in one step of each


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs the step of every optimizer in every case, on the first device."""

    cases: tuple[str, ...] = ON_ONE_H100
    """Which of those for one device."""
    optimizers: tuple[str, ...] = OPTIMIZERS
    """Which of them."""
    at_once: int = 4
    """Programs to compile at once."""
    length: int | None = None
    """Tokens of a training step, in place of the case's own."""
    one: bool = False
    """Run the first case and optimizer in this process, and print the row."""
    lock: Path = Path(tempfile.gettempdir()) / "on_device.lock"
    """Who holds this file has the device."""


def measure(config: Config) -> dict[str, Any]:
    """The row of one case and optimizer."""
    (case_name, *_), (name, *_) = config.cases, config.optimizers
    case = CASES[case_name]
    model = dataclasses.replace(case.model, length=config.length or case.model.length)
    tx = optimizer(name.removesuffix(", value_and_update"), case)
    device = jax.devices()[0]
    mesh = Mesh([device], ("x",))
    shapes = training_step.parameters(model, mesh)
    shapes = shapes["layers"] if case.update_alone else shapes

    def array(x: jax.ShapeDtypeStruct) -> jax.Array:
        """Random, the same for each layer of a stack."""
        last = 0.02 * jax.random.normal(jax.random.key(x.size), x.shape[-2:], x.dtype)
        return jnp.broadcast_to(last, x.shape)

    if case.update_alone:
        step, third = training_step.update_step(tx), shapes
    else:
        make = training_step.fused_step if name in FUSED else training_step.train_step
        step = make(model, tx, None)
        third = jax.ShapeDtypeStruct((1, model.length + 1), "int32")
    state_shapes = jax.eval_shape(tx.init, shapes)
    begun = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(shapes, state_shapes, third).compile()
    seconds = time.perf_counter() - begun
    with config.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        create = jax.jit(array, static_argnums=0)
        params = jax.tree.map(create, shapes)
        state = jax.jit(tx.init)(params)
        if case.update_alone:
            data = jax.tree.map(lambda x: x + 0, params)
        else:
            data = jax.random.randint(jax.random.key(0), third.shape, 0, model.vocab)
        milliseconds = []
        for _ in range(10 * INTERVALS + 2):
            begun = time.perf_counter()
            params, state, value = jax.block_until_ready(compiled(params, state, data))
            milliseconds.append(1e3 * (time.perf_counter() - begun))
        kept = milliseconds[2:]
        statistics_of_device = device.memory_stats() or {}
    analysis = compiled.memory_analysis()
    assert analysis is not None
    foretold = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return {
        "step_ms": round(statistics.mean(kept), 2),
        "ordinary_ms": round(statistics.median(kept), 2),
        "worst_ms": round(max(kept), 2),
        "tokens": 0 if case.update_alone else model.length,
        "peak_bytes": statistics_of_device.get("peak_bytes_in_use", 0),
        "foretold_bytes": foretold,
        "compile_s": round(seconds, 1),
        "finite": bool(jnp.isfinite(value)),
        "machine": record.machine(),
    }


def run(config: Config, what: tuple[str, str]) -> dict[str, Any]:
    """The same from a process of its own."""
    case, name = what
    argv = [sys.executable, __file__, "--one", "--cases", case, "--optimizers", name]
    argv += ["--lock", str(config.lock)]
    argv += ["--length", str(config.length)] if config.length else []
    done = subprocess.run(argv, capture_output=True, text=True)
    row = {"case": case, "optimizer": name}
    if done.returncode:
        return row | {"outcome": failure(done.stderr)}
    return row | {"outcome": "ran"} | json.loads(done.stdout.splitlines()[-1])


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that ran, each with its ratios to AdamW in the same case."""
    ran = [row for row in rows if row["outcome"] == "ran"]
    of = {row["case"]: row for row in ran if row["optimizer"] == "adamw"}

    def ratios(row):
        peer = of.get(row["case"], row)
        keys = [key for key in ("step_ms", "peak_bytes") if peer[key]]  # a CPU tells no peak
        return row | {f"{key}_over_adamw": round(row[key] / peer[key], 3) for key in keys}

    return [ratios(row) for row in ran]


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each case."""
    columns = {
        "optimizer": "{optimizer}",
        "step, ms": "{step_ms:,.1f}",
        "over AdamW's": "{step_ms_over_adamw:.2f}",
        "without a moved basis, ms": "{ordinary_ms:,.1f}",
        "peak, GiB": "{peak_gib:.2f}",
        "foretold, GiB": "{foretold_gib:.2f}",
        "compilation, s": "{compile_s:.0f}",
    }
    parts = []
    for name in dict.fromkeys(row["case"] for row in rows):
        of_case = [
            row | {f"{k}_gib": row[f"{k}_bytes"] / 2**30 for k in ("peak", "foretold")}
            for row in rows
            if row["case"] == name
        ]
        title = CASES[name].title
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{record.table(of_case, columns)}")
    return "\n\n".join(parts)


def summarize() -> list[dict[str, Any]]:
    """The rows of the record."""
    path = record.RESULTS / "on_device.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    for name in (*config.cases, *config.optimizers):
        if name not in (*ON_ONE_H100, *OPTIMIZERS):
            raise SystemExit(f"error: {name!r} is none of {', '.join((*ON_ONE_H100, *OPTIMIZERS))}")
    if config.one:
        print(json.dumps(measure(config)))
        return
    wanted = [
        (case, name)
        for case in config.cases
        for name in config.optimizers
        if is_for(CASES[case], name)
    ]
    rows = []
    with ThreadPoolExecutor(config.at_once) as pool:
        for row in pool.map(functools.partial(run, config), wanted):
            print(json.dumps(row), flush=True)
            rows.append(row)
            record.write("on_device", compared(rows))
    print(table(compared(rows)))


if __name__ == "__main__":
    main()
