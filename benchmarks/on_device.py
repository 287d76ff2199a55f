"""What an optimizer's step takes on the GPU that is here: time, memory, seconds to compile.

python benchmarks/on_device.py                                          # all cases for one H100
python benchmarks/on_device.py --cases train_7b_h100 --optimizers adamw sumo

The cases and optimizers are those of `compiled.py`, which predicts the memory.
"""

import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

# The peak is of what a step takes, not of a share of the device that is taken at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import program
import record
import training_step
import tyro
from compiled import CASES, FUSED, OPTIMIZERS, Case, failure, is_for, optimizer
from jax.sharding import Mesh

ON_ONE_H100 = tuple(name for name, case in CASES.items() if case.target == "h100")
STEPS = 10  # in one of which SUMO moves its bases


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs the step of every optimizer in every case, on the first device."""

    cases: tuple[str, ...] = ON_ONE_H100
    """Which of those for one device."""
    optimizers: tuple[str, ...] = OPTIMIZERS
    """Which of them."""
    at_once: int = 4
    """Programs to compile at once."""
    cache: Path = Path("runs/on_device")
    """Where compiled programs are kept; what is there is compiled no more."""
    one: Literal["compile", "run"] | None = None
    """Do so with the first case and optimizer in this process, and print the figures."""


class Step:
    """The step of one optimizer in one case."""

    def __init__(self, case: Case, name: str):
        tx = optimizer(name.removesuffix(", value_and_update"), case)
        params = training_step.parameters(case.model, Mesh(jax.devices()[:1], ("x",)))
        if case.update_alone:
            step, params = training_step.update_step(tx), params["layers"]
            self.data = params
        else:
            make = training_step.fused_step if name in FUSED else training_step.train_step
            step = make(case.model, tx, None)
            self.data = jax.ShapeDtypeStruct((1, case.model.length + 1), "int32")
        self.tx, self.params, self.vocab = tx, params, case.model.vocab
        state = jax.eval_shape(tx.init, params)
        begun = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, self.data)
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - begun

    def predicted(self) -> dict[str, Any]:
        """What the compiler says."""
        peak = program.peak_bytes(self.compiled)
        return {"predicted_bytes": peak, "compile_s": round(self.compile_s, 1)}

    def arrays(self, shapes: Any) -> Any:
        """Random numbers, the same for each layer of a stack; or tokens."""

        def array(x: jax.ShapeDtypeStruct) -> jax.Array:
            if x.dtype == "int32":
                return jax.random.randint(jax.random.key(0), x.shape, 0, self.vocab)
            last = 0.02 * jax.random.normal(jax.random.key(x.size), x.shape[-2:], x.dtype)
            return jnp.broadcast_to(last, x.shape)

        return jax.tree.map(jax.jit(array, static_argnums=0), shapes)

    def run(self) -> dict[str, Any]:
        """Milliseconds and the device's own count of bytes."""
        params, data = self.arrays(self.params), self.arrays(self.data)
        state = jax.jit(self.tx.init)(params)
        milliseconds = []
        for _ in range(STEPS + 1):
            begun = time.perf_counter()
            params, state, value = jax.block_until_ready(self.compiled(params, state, data))
            milliseconds.append(1e3 * (time.perf_counter() - begun))
        kept = milliseconds[1:]
        return {
            "step_ms": round(statistics.mean(kept), 2),
            "ordinary_ms": round(statistics.median(kept), 2),
            "worst_ms": round(max(kept), 2),
            "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0),
            "finite": bool(jnp.isfinite(value)),
        }


def one(config: Config) -> dict[str, Any]:
    """The figures of the first case and optimizer."""
    step = Step(CASES[config.cases[0]], config.optimizers[0])
    if config.one == "compile":
        return step.predicted()
    with record.locked(config.cache / "lock"):  # who holds it has the device
        return step.run()


def make(config: Config, wanted: list[tuple[str, str]]) -> None:
    """Each step in a process of its own: all are compiled, then they run one after the other."""
    config.cache.mkdir(parents=True, exist_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(config.cache.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def process(do: str, what: tuple[str, str]) -> bool:
        """Whether it came to its end; its figures are in the record then."""
        case, name = what
        argv = [sys.executable, __file__, "--one", do, "--cases", case, "--optimizers", name]
        argv += ["--cache", str(config.cache)]
        done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | cache)
        row = {"case": case, "optimizer": name}
        if done.returncode:
            print(json.dumps(row | {"outcome": failure(done.stderr)}), flush=True)
            return False
        row |= json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(row), flush=True)
        with lock:
            add(row)
        return True

    lock = threading.Lock()
    with ThreadPoolExecutor(config.at_once) as pool:
        compiled = list(pool.map(functools.partial(process, "compile"), wanted))
    with ThreadPoolExecutor(2) as pool:  # one starts while the other runs
        list(pool.map(functools.partial(process, "run"), itertools.compress(wanted, compiled)))


def summarize() -> list[dict[str, Any]]:
    """The rows of the record, none where there is none."""
    path = record.RESULTS / "on_device.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add(row: dict[str, Any]) -> None:
    """Puts figures into the record, in the order of the tables; those of another machine go."""
    here = {"machine": record.machine()}
    rows = {(x["case"], x["optimizer"]): x for x in summarize() if here.items() <= x.items()}
    key = row["case"], row["optimizer"]
    rows[key] = rows.get(key, {}) | row | here
    order = itertools.product(ON_ONE_H100, OPTIMIZERS)
    record.write("on_device", compared([rows[x] for x in order if x in rows]), arguments=())


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its ratios to AdamW in the same case."""
    of = {row["case"]: row for row in rows if row["optimizer"] == "adamw"}

    def ratios(row):
        peer = of.get(row["case"], {})
        keys = [x for x in ("step_ms", "peak_bytes") if row.get(x) and peer.get(x)]
        return {f"{key}_over_adamw": round(row[key] / peer[key], 3) for key in keys}

    return [row | ratios(row) for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each case."""
    columns = {
        "optimizer": "{optimizer}",
        "step, ms": "{step_ms:,.1f}",
        "over AdamW's": "{step_ms_over_adamw:.2f}",
        "without a moved basis, ms": "{ordinary_ms:,.1f}",
        "peak, GiB": "{peak_gib:.2f}",
        "predicted, GiB": "{predicted_gib:.2f}",
        "compilation, s": "{compile_s:.0f}",
    }
    parts, rows = [], [row for row in rows if "step_ms_over_adamw" in row]
    for name in dict.fromkeys(row["case"] for row in rows):
        of_case = [
            row | {f"{k}_gib": row[f"{k}_bytes"] / 2**30 for k in ("peak", "predicted")}
            for row in rows
            if row["case"] == name
        ]
        title = CASES[name].title
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{record.table(of_case, columns)}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    for name in (*config.cases, *config.optimizers):
        if name not in (*ON_ONE_H100, *OPTIMIZERS):
            raise SystemExit(f"error: {name!r} is none of {', '.join((*ON_ONE_H100, *OPTIMIZERS))}")
    if config.one:
        print(json.dumps(one(config)))
        return
    every = itertools.product(config.cases, config.optimizers)
    make(config, [(case, name) for case, name in every if is_for(CASES[case], name)])
    print(table(summarize()))


if __name__ == "__main__":
    main()
