"""Pre-trains a LLaMA-style language model with any optimizer of sumo_optax or optax.

python examples/pretrain.py
python examples/pretrain.py --optimizer adamw --data my_folder --tokenizer bpe:8192
python examples/pretrain.py --preset 60m --data hf:allenai/c4 --tokenizer bpe:32000 --scan-layers
"""

import dataclasses
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import command_line
import jax
import mesh
import numpy as np
import optax
import optimizers
import processes
import run_folder
import text
import training
import tyro
from flax import nnx
from jax.typing import ArrayLike
from llama import PRESETS, Llama, LlamaConfig
from plot import plot_losses, plot_subspace
from training import State

import sumo_optax

TINY = PRESETS["tiny"]


@dataclasses.dataclass(frozen=True)
class Base:
    """Pre-train a LLaMA-style language model."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "tiny"
    """Where the defaults of steps, batch, length and the model's shape come from."""
    optimizer: Annotated[str, tyro.conf.arg(metavar="|".join(optimizers.LEARNING_RATES))] = "sumo"
    """What trains it, at a rank of a quarter of the width where no other is given."""


@dataclasses.dataclass(frozen=True)
class Config(optimizers.Arguments, Base):
    """Pre-train a LLaMA-style language model."""

    subspace_gradients: bool = False
    """Between refreshes, backpropagate into the subspaces alone: for sumo and mofasgd."""
    fused: bool = False
    """Update each layer inside the backward pass, with clipping by the norm of the step before."""

    data: str | None = None
    """A text file, a folder or hf:NAME[:CONFIG]; by default the Python standard library."""
    tokenizer: str = "bytes"
    """bytes or bpe:SIZE."""

    steps: int = TINY.steps
    """Steps to train."""
    batch: int = TINY.batch
    """Windows in a step."""
    length: int = TINY.length
    """Tokens in a window."""
    width: int = TINY.width
    """Width of the model."""
    hidden: int = TINY.hidden
    """Hidden width of SwiGLU."""
    heads: int = TINY.heads
    """Attention heads."""
    layers: int = TINY.layers
    """Blocks."""
    scan_layers: bool = False
    """Stack the blocks: one compilation for all of them."""
    seed: int = 0
    """Of the initial parameters and the order of the data."""
    mesh: str | None = None
    """data=N,fsdp=N,tensor=N: how all devices share the work; by default one does it."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes; job schedulers tell JAX by themselves."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""

    out: Path | None = None
    """Folder to write to; by default a new runs/PRESET-OPTIMIZER."""
    resume: bool = False
    """Go on from the last checkpoint."""
    overwrite: bool = False
    """Delete the run in the folder first."""
    eval_every: int | None = None
    """Steps between two validations; by default a tenth of all."""
    eval_windows: int = 256
    """Windows of the validation text to validate with."""
    save_every: int | None = None
    """Steps between two checkpoints; by default a tenth of all."""
    log_subspace: bool = False
    """Log at every step how the optimizer's subspaces are doing, and draw it at the end."""


# A resumed run must be given all else as it was; what is set is among the optimizer's arguments.
FREE = (
    "set",
    "mesh",
    "coordinator",
    "processes",
    "process",
    "out",
    "resume",
    "overwrite",
    "eval_every",
    "save_every",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `command_line.run`."""

    def prepared() -> Pretraining:
        config = command_line.check(parse(argv))
        processes.join(config.coordinator, config.processes, config.process)
        pretraining = prepare(config)
        training.look(pretraining.run)
        print_plan(pretraining)
        return pretraining

    return command_line.run(prepared, train)


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; what it leaves out is the preset's."""
    with command_line.in_one_line():
        base, _ = tyro.cli(Base, args=argv, return_unknown_args=True, add_help=False)
        if base.preset not in PRESETS:
            raise ValueError(f"no preset {base.preset!r}; choose among {', '.join(PRESETS)}")
        preset = Config(preset=base.preset, **dataclasses.asdict(PRESETS[base.preset]))
        return tyro.cli(Config, args=argv, default=preset, config=(tyro.conf.FlagCreatePairsOff,))


class Pretraining(NamedTuple):
    """A run, and what it is made of."""

    config: Config
    options: dict[str, Any]  # of the optimizer
    corpus: text.Corpus
    tx: optax.GradientTransformation
    loss: Callable[[Any, ArrayLike], jax.Array]  # mean nats per token, from params and windows
    run: training.Run


def prepare(config: Config) -> Pretraining:
    """A run, having found out that it can be made."""
    out = run_folder.choose(
        config.out,
        Path("runs") / f"{config.preset}-{config.optimizer}",
        resume=config.resume,
        overwrite=config.overwrite,
    )
    options = optimizers.complete(
        config.optimizer,
        config,
        rank=max(1, config.width // 4),
        subspace_gradients=config.subspace_gradients,
    )
    tx = measured(config, optimizer_of(config, options))
    corpus = text.load(
        config.data,
        config.tokenizer,
        length=config.length,
        batch=config.batch,
        validation_windows=config.eval_windows,
        seed=config.seed,
        earlier=out / "tokenizer.json" if config.resume else None,
    )
    shape = LlamaConfig(
        vocab=corpus.tokenizer.vocab,
        width=config.width,
        hidden=config.hidden,
        heads=config.heads,
        layers=config.layers,
        scan_layers=config.scan_layers,
    )
    init, loss = functions(shape, tx, config.seed)
    state, batch_sharding = training.on_one_device(jax.eval_shape(init)), None
    if config.mesh is not None:
        devices = mesh.parse(config.mesh)
        state, batch_sharding = on_mesh(devices, tx, state), mesh.batch_sharding(devices)
        if config.batch % (devices.shape["data"] * devices.shape["fsdp"]):
            raise ValueError(
                f"--batch {config.batch} must be a multiple of data x fsdp in --mesh {config.mesh}"
            )
    tenth = math.ceil(config.steps / 10)
    validation_loss = jax.jit(loss)
    run = training.Run(
        out=out,
        record=record(config, options, corpus),
        resume=config.resume,
        overwrite=config.overwrite,
        steps=config.steps,
        eval_every=config.eval_every or tenth,
        save_every=config.save_every or tenth,
        units=(config.batch * config.length, "tokens"),
        batches=corpus.batches,
        batch_sharding=batch_sharding,
        init=init,
        state=state,
        compile=lambda: compiled(pretraining),
        validate=lambda params: {
            "validation_loss": evaluate(validation_loss, params, corpus.validation, config.batch)
        },
        tell=tell,
        write_tokenizer=corpus.tokenizer.write,
    )
    pretraining = Pretraining(config, options, corpus, tx, loss, run)
    return pretraining


def record(config: Config, options: dict[str, Any], corpus: text.Corpus) -> dict[str, Any]:
    """What makes a run this run, as JSON."""
    given = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    data = {
        "vocab": corpus.tokenizer.vocab,
        "validation checksum": zlib.crc32(corpus.validation.tobytes()),
    }
    return given | options | data


def optimizer_of(config: Config, options: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer, with the clipping that the step can do."""
    if not config.fused:
        return optimizers.create(config.optimizer, config.steps, options)
    if config.subspace_gradients:
        raise ValueError(
            "--fused updates each layer from its whole gradient; leave out --subspace-gradients"
        )
    if config.optimizer == "galore":
        raise ValueError(
            "galore of optax fails on a layer without matrices; leave out --fused or choose another"
            " --optimizer"
        )
    # The global norm is known only when no gradient is left to clip.
    return optimizers.create(config.optimizer, config.steps, options, sumo_optax.clip_by_last_norm)


def measured(config: Config, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, measuring its subspaces where that was asked for."""
    if not config.log_subspace:
        return tx
    if config.optimizer in optimizers.OPTAX:
        raise ValueError(f"{config.optimizer} has no subspace to log; leave out --log-subspace")
    if config.subspace_gradients:
        raise ValueError("--log-subspace looks at whole gradients; leave out --subspace-gradients")
    return sumo_optax.with_subspace_metrics(tx)


def on_mesh(devices: jax.sharding.Mesh, tx: optax.GradientTransformation, state: State) -> State:
    """The state's shapes with the shardings that the mesh gives them."""
    shardings = mesh.parameter_shardings(devices, state.params)
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return State(
        jax.tree.map(placed, state.params, shardings),
        sumo_optax.abstract_state(tx, state.params, shardings),
    )


def functions(shape: LlamaConfig, tx: optax.GradientTransformation, seed: int):
    """The functions `Run.init` and `Run.loss`."""

    def create() -> Llama:
        return Llama(shape, nnx.Rngs(seed))

    graph = nnx.graphdef(nnx.eval_shape(create))

    def init() -> State:
        params = nnx.to_pure_dict(nnx.state(create(), nnx.Param))
        return State(params, tx.init(params))

    def loss(params, windows):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    return init, loss


def compiled(pretraining: Pretraining) -> training.Step:
    """A step of training; of two kinds, where most of them need no whole gradient."""
    config, options, _, tx, loss, run = pretraining
    value_and_grad = sumo_optax.subspace_value_and_grad(loss)
    value_and_update = sumo_optax.value_and_update(loss, tx)

    def updated(
        state: State, windows: jax.Array, full: bool
    ) -> tuple[jax.Array, optax.Params, optax.OptState]:
        if config.fused:
            return value_and_update(state.params, state.optimizer, windows)
        loss, gradients = value_and_grad(state.params, state.optimizer, windows, full=full)
        updates, optimizer = tx.update(gradients, state.optimizer, state.params)
        return loss, optax.apply_updates(state.params, updates), optimizer

    def step_function(
        state: State, windows: jax.Array, full: bool
    ) -> tuple[State, dict[str, jax.Array]]:
        loss, params, optimizer = updated(state, windows, full)
        logged = {"loss": loss}
        if config.log_subspace:
            logged |= sumo_optax.subspace_metrics(optimizer).summary
        return State(params, optimizer), logged

    shape = (config.batch, config.length + 1)
    example = jax.ShapeDtypeStruct(shape, np.int32, sharding=run.batch_sharding)
    results = None if run.shardings is None else (run.shardings, None)
    step_jit = jax.jit(
        step_function, donate_argnums=0, static_argnames="full", out_shardings=results
    )
    kinds = (True, False) if config.subspace_gradients else (True,)
    steps = {full: step_jit.lower(run.state, example, full=full).compile() for full in kinds}
    refresh_every = options.get("refresh_every", config.steps)

    def step(number: int, state: State, windows: ArrayLike):
        return steps[not config.subspace_gradients or (number - 1) % refresh_every == 0](
            state, windows
        )

    return step


def evaluate(
    loss: Callable[[Any, ArrayLike], jax.Array], params: Any, windows: np.ndarray, batch: int
) -> float:
    """Mean loss over all windows, in nats per token."""
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    return sum(len(part) * float(loss(params, part)) for part in parts) / len(windows)


def tell(step: int, found: Mapping[str, float]) -> str:
    """A line on a validation."""
    loss = found["validation_loss"]
    return f"step {step:>6}  validation loss {loss:.4f}  perplexity {np.exp(loss):.3f}"


def print_plan(pretraining: Pretraining) -> None:
    """Says what will be trained, on what, and what the optimizer will hold."""
    config, _, corpus, tx, _, run = pretraining
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(run.state.params))
    print(
        f"{config.preset}: {config.layers} blocks of width {config.width},"
        f" {count:,} parameters\n"
        f"{config.optimizer}: {config.steps:,} steps of {config.batch} x {config.length} tokens,"
        f" {config.tokenizer} of {corpus.name}\n"
    )
    print(sumo_optax.describe(tx, run.state.params), end="\n\n")


def train(pretraining: Pretraining) -> None:
    """Trains, draws the curves, and says how it went."""
    config, options, corpus, _, _, run = pretraining
    trained = training.train(run)
    if not processes.leads():
        return
    rank = f", rank {options['rank']}" if "rank" in options else ""
    title = f"{config.preset}, {config.optimizer}{rank}"
    plot_losses(trained.rows, title, "nats per token", run.out / "loss.png")
    if config.log_subspace:
        plot_subspace(trained.rows, title, run.out / "subspace.png")
    summary = {
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.length,
        "seconds": trained.seconds,
        "validation_loss": trained.rows[-1]["validation_loss"],
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(trained.state.optimizer)),
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(run.out, corpus.bytes_per_token, **summary)


def print_summary(
    out: Path,
    bytes_per_token: float,
    *,
    steps: int,
    tokens: int,
    seconds: float,
    validation_loss: float,
    state_bytes: int,
) -> None:
    """Says how it went and where things are."""
    loss = f"{validation_loss:.4f} nats per token, perplexity {np.exp(validation_loss):.3f}"
    if bytes_per_token != 1:
        loss += f", {validation_loss / bytes_per_token:.4f} nats per byte"
    lines = {
        "trained": f"{steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s",
        "speed": f"{tokens / seconds:,.0f} tokens/s, {steps / seconds:.2f} steps/s",
        "validation loss": loss,
        "optimizer state": f"{state_bytes / 2**20:,.1f} MiB",
        "written": f"{out}/: metrics.jsonl, summary.json, loss.png, checkpoints/{steps}",
    }
    print()
    for name, value in lines.items():
        print(f"{name:>15}  {value}")


if __name__ == "__main__":
    sys.exit(main())
