"""What projected gradients cost beside whole ones: products, memory, time, bytes sent.

python benchmarks/subspace_gradients.py    # LLaMA-60M with byte tokens, rank 128: minutes
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
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import collectives
import record
from common.llama import PRESETS, Llama, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles and runs a loss with its gradients, whole and projected."""

    preset: str = "60m"
    """Whose shape; tokens are bytes."""
    rank: int = 128
    """Of the optimizers."""
    batch: int = 8
    """Windows in a step; a multiple of 8, over which devices share them."""
    length: int = 128
    """Tokens in a window."""
    runs: int = 5
    """To take the median of."""


def model(config: Config):
    """Parameters' shapes, and the loss."""
    shape = PRESETS[config.preset]
    sizes = {name: getattr(shape, name) for name in ("width", "hidden", "heads", "layers")}
    create = lambda: Llama(LlamaConfig(vocab=256, **sizes), nnx.Rngs(0))
    graph = nnx.graphdef(nnx.eval_shape(create))
    init = lambda: nnx.to_pure_dict(nnx.state(create(), nnx.Param))

    def loss(params, windows):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    return jax.jit(init)(), loss


def reduced_bytes(program: Any, params: Any, state: Any, windows: Any) -> int:
    """What eight devices with an eighth of the batch each all-reduce."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    on = lambda spec: (
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    )
    everywhere = jax.tree.map(on(P()), (params, state))
    hlo = program.lower(*everywhere, on(P("data"))(windows)).compile().as_text()
    always, _ = collectives.collectives(hlo)
    return 4 * sum(sum(sizes) for kind, sizes in always if kind == "all-reduce")


def measure(name: str, program: Any, arguments: tuple[Any, ...], runs: int) -> dict[str, Any]:
    compiled = program.lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - begun)
    memory = compiled.memory_analysis()
    return {
        "gradients": name,
        "gigaflop": round(compiled.cost_analysis()["flops"] / 1e9, 1),
        "temporary_bytes": memory.temp_size_in_bytes,
        "returned_bytes": memory.output_size_in_bytes,
        "step_ms": round(1e3 * statistics.median(times)),
        "reduced_bytes": reduced_bytes(program, *arguments),
    }


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    params, loss = model(config)
    windows = jax.random.randint(jax.random.key(0), (config.batch, config.length + 1), 0, 256)
    projected = sumo_optax.subspace_value_and_grad(loss)
    optimizers = {
        "of SUMO": sumo_optax.sumo(
            1e-3,
            config.rank,
            basis="randomized_svd",
            side="long",
            refresh_every=200,
            residual=None,
        ),
        "of MoFaSGD": sumo_optax.mofasgd(1e-3, config.rank),
    }
    whole = jax.jit(lambda params, _, windows: jax.value_and_grad(loss)(params, windows))
    rows = [measure("whole", whole, (params, (), windows), config.runs)]
    for name, tx in optimizers.items():
        state = jax.jit(tx.init)(params)
        rows.append(measure(name, jax.jit(projected), (params, state, windows), config.runs))
    first = rows[0]
    memory = lambda row: row["temporary_bytes"] + row["returned_bytes"]
    for row in rows:
        row["over_whole_gigaflop"] = round(row["gigaflop"] / first["gigaflop"], 3)
        row["over_whole_memory"] = round(memory(row) / memory(first), 3)
        row["over_whole_time"] = round(row["step_ms"] / first["step_ms"], 3)
        row["over_whole_reduced"] = round(row["reduced_bytes"] / first["reduced_bytes"], 3)
    print("written:", record.write("subspace_gradients", rows))
    columns = {
        "gradients": "{gradients}",
        "GFLOP": "{gigaflop:.1f}",
        "over whole ones'": "{over_whole_gigaflop:.2f}",
        "memory": "{over_whole_memory:.2f}",
        "time": "{over_whole_time:.2f}",
        "all-reduced on 8 devices": "{over_whole_reduced:.3f}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
