"""What a step needs on 8, 64 and 256 TPUs, by compilation alone: it does not grow with the pod.

python benchmarks/pods.py

Needs the extra `compile`. Four layers of a LLaMA of width 512, bfloat16, rank 128.
"""

import dataclasses
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import compile_one
import compiled
import record
import tyro
from compiled import Case
from training_step import Model

STACKED = Model(512, 1536, 4, heads=8, dtype="bfloat16", stacked=True)
SEPARATE = dataclasses.replace(STACKED, stacked=False)
TARGETS = {8: "v5e:2x4", 64: "v5e:8x8", 256: "v5p:8x8x4"}
LAYOUTS = {
    "data": lambda devices: {"data": devices},
    "fsdp": lambda devices: {"x": devices},
    "fsdp x tensor": lambda devices: {"x": devices // 4, "tensor": 4},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles a training step for pods of three sizes."""

    optimizers: tuple[str, ...] = ("adamw", "sumo")
    """Those of `compiled.py`."""
    at_once: int = 2
    """Programs to compile at once."""


def row(what: tuple[bool, str, int, str]) -> dict[str, Any]:
    stacked, layout, devices, name = what
    case = Case(
        layout,
        TARGETS[devices],
        STACKED if stacked else SEPARATE,
        rank=128,
        state_dtype="bfloat16",
        axes=LAYOUTS[layout](devices),
    )
    found = compile_one.figures(case, compile_one.optimizer(name, case))
    keys = ("argument_bytes", "state_bytes", "temporary_bytes", "program_bytes", "gigaflop")
    return {
        "layers": "stacked" if stacked else "separate",
        "layout": layout,
        "devices": devices,
        "optimizer": name,
        **{key: found[key] for key in keys},
        "sent_bytes": sum(found["collectives"].values()),
    }


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    wanted = itertools.chain(
        itertools.product((True,), LAYOUTS, TARGETS, config.optimizers),
        itertools.product((False,), LAYOUTS, (64,), config.optimizers),
    )
    with ProcessPoolExecutor(config.at_once, max_tasks_per_child=1) as pool:
        rows = []
        for found in pool.map(row, wanted):
            rows.append(found)
            print(json.dumps(found), flush=True)
    print("written:", record.write("pods", rows, packages=compiled.PACKAGES))


if __name__ == "__main__":
    main()
