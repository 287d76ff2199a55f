"""Pre-trains a LLaMA-style language model with any optimizer of sumo_optax or optax.

python examples/pretrain.py
python examples/pretrain.py --optimizer adamw --data my_folder --tokenizer bpe:8192
python examples/pretrain.py --preset 60m --data hf:allenai/c4 --tokenizer bpe:32000 --scan-layers
"""

import dataclasses
import math
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import mesh, optimizers, run_folder, text, training
from common.llama import PRESETS, Llama, LlamaConfig
from common.training import State
from flax import nnx

import sumo_optax

TINY = PRESETS["tiny"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(optimizers.Options, run_folder.RunOptions):
    """Pre-train a LLaMA-style language model."""

    # The model whose shape, steps, batch and length are the defaults.
    preset: Literal["tiny", "60m", "130m", "350m", "1b", "7b"] = "tiny"
    # What trains it: sumo, online_subspace_descent, mofasgd, galore, muon or adamw.
    optimizer: str = "sumo"
    width: int = TINY.width  # Width of the model.
    hidden: int = TINY.hidden  # Hidden width of SwiGLU.
    heads: int = TINY.heads  # Attention heads.
    layers: int = TINY.layers  # Blocks.
    scan_layers: bool = False  # Stack the blocks: one compilation for all of them.
    # Text file, folder or hf:NAME[:CONFIG].
    data: Annotated[str | None, optimizers.default("Python's standard library")] = None
    tokenizer: str = "bytes"  # What makes tokens of text: bytes or bpe:SIZE.
    batch: int = TINY.batch  # Windows in a step.
    length: int = TINY.length  # Tokens in a window.
    eval_windows: int = 256  # Windows of the validation text to validate with.
    steps: int = TINY.steps  # Steps to train.
    seed: int = 0  # Of the initial parameters and the order of the data.
    subspace_gradients: bool = False  # Take whole ones at refreshes alone: sumo, mofasgd.
    fused: bool = False  # Update layers in the backward pass; clip by the norm of the step before.
    # How devices share the work: data=N,fsdp=N,tensor=N.
    mesh: Annotated[str | None, optimizers.default("one device")] = None
    # HOST:PORT of the first process.
    coordinator: Annotated[str | None, optimizers.default("a job scheduler's")] = None
    # How many processes there are.
    processes: Annotated[int | None, optimizers.default("a job scheduler's")] = None
    # Which of them this is, from 0.
    process: Annotated[int | None, optimizers.default("a job scheduler's")] = None
    # Steps between two validations.
    eval_every: Annotated[int | None, optimizers.default("a tenth of all")] = None
    # Steps between two checkpoints.
    save_every: Annotated[int | None, optimizers.default("a tenth of all")] = None
    log_subspace: bool = False  # Log at every step how the subspaces are doing; draw it at the end.


# A resumed run must be given all else as it was; what is set is among the optimizer's arguments.
FREE = {"set", "mesh", "coordinator", "processes", "process", "eval_every", "save_every"}
FREE |= vars(run_folder.RunOptions()).keys()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `training.main`."""
    return training.main(lambda: prepare(parse(argv)))


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; what it leaves out is the preset's."""
    given: dict[str, Any] = {
        "args": argv,
        "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    }
    first, _ = tyro.cli(Config, add_help=False, return_unknown_args=True, **given)
    preset = vars(PRESETS[first.preset])
    known = {name: x for name, x in preset.items() if hasattr(first, name)}
    return tyro.cli(Config, default=Config(preset=first.preset, **known), **given)


def prepare(config: Config) -> training.Run:
    """A run, having found out that it can be made."""
    out = run_folder.choose(config, Path("runs") / f"{config.preset}-{config.optimizer}")
    mesh.join(config.coordinator, config.processes, config.process)
    rank = max(1, config.width // 4)
    arguments = optimizers.complete(config.optimizer, config, rank, config.subspace_gradients)
    tx = optimizer(config, arguments)
    earlier = out / "tokenizer.json" if config.resume else None
    tokenizer, batches, validation = text.load(config, earlier)
    sizes = (config.width, config.hidden, config.heads, config.layers)
    shape = LlamaConfig(*sizes, vocab=tokenizer.vocab, scan_layers=config.scan_layers)
    init, loss, evaluate = functions(shape, tx, config.seed)
    devices = mesh.parse(config.mesh)
    shares = devices.shape["data"] * devices.shape["fsdp"]
    if config.batch % shares:
        raise ValueError(f"--batch must be a multiple of data x fsdp, {shares}, got {config.batch}")
    state = State(*mesh.abstract_state(devices, tx, jax.eval_shape(init).params))
    data = {"vocab": shape.vocab, "validation checksum": zlib.crc32(validation.tobytes())}
    tenth = math.ceil(config.steps / 10)
    run = training.Run(
        out=out,
        options=config,
        record={x: y for x, y in vars(config).items() if x not in FREE} | arguments | data,
        tx=tx,
        steps=config.steps,
        eval_every=config.eval_every or tenth,
        save_every=config.save_every or tenth,
        units=(config.batch * config.length, "tokens"),
        batches=batches,
        init=init,
        state=state,
        loss=loss,
        compile=lambda: compiled(config, arguments, run),
        validate=lambda params: {"validation_loss": evaluate(params, validation, config.batch)},
        write_tokenizer=tokenizer.write,
    )
    return run


def optimizer(config: Config, arguments: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer, with the clipping that the step can do; measuring its subspaces if asked."""
    if config.subspace_gradients and config.fused:
        raise ValueError("--fused needs whole gradients; leave out --subspace-gradients")
    if config.subspace_gradients and config.log_subspace:
        raise ValueError("--log-subspace needs whole gradients; leave out --subspace-gradients")
    if config.fused and config.optimizer == "galore":
        raise ValueError("galore of optax fails on a layer without matrices; leave out --fused")
    if config.log_subspace and config.optimizer in optimizers.OPTAX:
        raise ValueError(f"{config.optimizer} has no subspace to log; leave out --log-subspace")
    # Updates inside the backward pass: no norm is known before the last gradient is gone.
    clip = sumo_optax.clip_by_last_norm if config.fused else optax.clip_by_global_norm
    metrics = {"metrics": True} if config.log_subspace else {}
    return optimizers.create(config.optimizer, config.steps, arguments | metrics, clip)


def functions(shape: LlamaConfig, tx: optax.GradientTransformation, seed: int):
    """The state at first; mean nats per token from parameters and windows; the same of many."""
    create = lambda: Llama(shape, nnx.Rngs(seed))
    graph = nnx.graphdef(nnx.eval_shape(create))

    def init() -> State:
        params = nnx.to_pure_dict(nnx.state(create(), nnx.Param))
        return State(params, tx.init(params))

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    validation_loss = jax.jit(loss)

    def evaluate(params: Any, windows: np.ndarray, batch: int) -> float:
        parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
        total = sum(len(part) * float(validation_loss(params, part)) for part in parts)
        return total / len(windows)

    return init, loss, evaluate


def compiled(config: Config, arguments: dict[str, Any], run: training.Run) -> training.Step:
    """A step of training; of two kinds, where most of them need no whole gradient."""
    value_and_grad = sumo_optax.subspace_value_and_grad(run.loss)
    value_and_update = sumo_optax.value_and_update(run.loss, run.tx)

    def update(state: State, windows: jax.Array, full: bool) -> tuple[State, dict[str, jax.Array]]:
        if config.fused:
            loss, *new = value_and_update(state.params, state.optimizer, windows)
            # Gradients are never there together; clipping has their norm.
            norm = jnp.sqrt(optax.tree.get(new[1], "squared"))
        else:
            loss, gradients = value_and_grad(state.params, state.optimizer, windows, full=full)
            updates, optimizer = run.tx.update(gradients, state.optimizer, state.params)
            new = optax.apply_updates(state.params, updates), optimizer
            norm = optax.tree.norm(gradients)
        logged = {"loss": loss, "gradient_norm": norm}
        if config.log_subspace:
            logged |= sumo_optax.subspace_metrics(new[1]).summary
        return State(*new), logged

    shape = (config.batch, config.length + 1)
    example = jax.ShapeDtypeStruct(shape, np.int32, sharding=mesh.batch_sharding(run.state))
    shardings = (jax.tree.map(lambda x: x.sharding, run.state), None)
    jitted = jax.jit(update, donate_argnums=0, static_argnames="full", out_shardings=shardings)
    kinds = (True, False) if config.subspace_gradients else (True,)
    steps = {full: jitted.lower(run.state, example, full=full).compile() for full in kinds}
    refresh_every = arguments.get("refresh_every", config.steps)

    def step(number: int, state: State, windows: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        full = not config.subspace_gradients or (number - 1) % refresh_every == 0
        return steps[full](state, windows)

    return step


if __name__ == "__main__":
    sys.exit(main())
