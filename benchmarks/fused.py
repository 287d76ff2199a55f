"""What a training step takes with updates inside the backward pass, over the ordinary step.

python benchmarks/fused.py      # the preset `tiny`, stacked layers and separate ones: 2 minutes
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import record
from common.llama import PRESETS, Llama, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Times both steps of a model in turns."""

    preset: str = "tiny"
    """Whose shape, length and batch; tokens are bytes."""
    runs: int = 30
    """Steps of each kind; medians count."""


OPTIMIZERS = {
    "optax.adamw": lambda width: optax.adamw(1e-3),
    "sumo": lambda width: sumo_optax.sumo(1e-3, width // 4),
}


def model(preset: str, *, stacked: bool):
    """Parameters and the loss of a batch of windows."""
    shape = PRESETS[preset]
    sizes = {name: getattr(shape, name) for name in ("width", "hidden", "heads", "layers")}
    create = lambda: Llama(LlamaConfig(vocab=256, scan_layers=stacked, **sizes), nnx.Rngs(0))
    graph = nnx.graphdef(nnx.eval_shape(create))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create(), nnx.Param)))()

    def loss(params, windows):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    return params, loss


def ordinary(loss, tx: optax.GradientTransformation):
    def step(params, state, windows):
        value, gradients = jax.value_and_grad(loss)(params, windows)
        updates, state = tx.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return step


def measure(preset: str, name: str, runs: int, *, stacked: bool) -> dict[str, Any]:
    shape = PRESETS[preset]
    params, loss = model(preset, stacked=stacked)
    tx = OPTIMIZERS[name](shape.width)
    windows = jax.random.randint(jax.random.key(0), (shape.batch, shape.length + 1), 0, 256)
    steps = {"ordinary": ordinary(loss, tx), "fused": sumo_optax.value_and_update(loss, tx)}
    compiled, trees, times = {}, {}, {kind: [] for kind in steps}
    for kind, step in steps.items():
        trees[kind] = (jax.tree.map(jnp.copy, params), tx.init(params))
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*trees[kind], windows)
        compiled[kind] = lowered.compile()
    for _ in range(runs + 1):
        for kind, step in compiled.items():
            begun = time.perf_counter()
            _, *trees[kind] = jax.block_until_ready(step(*trees[kind], windows))
            times[kind].append(1e3 * (time.perf_counter() - begun))
    medians = {kind: statistics.median(each[1:]) for kind, each in times.items()}
    temporaries = {
        kind: step.memory_analysis().temp_size_in_bytes for kind, step in compiled.items()
    }
    return {
        "layers": "stacked" if stacked else "separate",
        "optimizer": name,
        **{f"{kind}_ms": round(ms, 1) for kind, ms in medians.items()},
        "over_ordinary": round(medians["fused"] / medians["ordinary"], 3),
        **{f"{kind}_temporary_bytes": size for kind, size in temporaries.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    rows = []
    for stacked in (True, False):
        for name in OPTIMIZERS:
            rows.append(measure(config.preset, name, config.runs, stacked=stacked))
            print(rows[-1], flush=True)
    print("written:", record.write("fused", rows))
    columns = {
        "layers": "{layers}",
        "optimizer": "{optimizer}",
        "ordinary, ms": "{ordinary_ms:.0f}",
        "inside the backward pass, ms": "{fused_ms:.0f}",
        "ratio": "{over_ordinary:.2f}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
