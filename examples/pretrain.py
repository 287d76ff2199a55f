"""Pre-trains a LLaMA-style language model with any optimizer of sumo_optax or optax.

python examples/pretrain.py
python examples/pretrain.py --optimizer adamw --data my_folder --tokenizer bpe:8192
python examples/pretrain.py --preset 60m --data hf:allenai/c4 --tokenizer bpe:32000 --scan-layers
"""

import dataclasses
import functools
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
import jax.numpy as jnp
import loggers
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
from options import SETTINGS, RunOptions, optional
from plot import plot_losses, plot_subspace
from training import State

import sumo_optax

TINY = PRESETS["tiny"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the defaults of all else come from."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "tiny"
    """Where the defaults of steps, batch, length and the model's shape come from."""
    optimizer: Annotated[str, tyro.conf.arg(metavar="|".join(optimizers.LEARNING_RATES))] = "sumo"
    """What trains the model, at a rank of a quarter of its width where no other is given."""


@dataclasses.dataclass(frozen=True)
class Choices(Choice):
    """The same, and what the optimizer's defaults come from."""

    width: int | None = None
    subspace_gradients: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of the LLaMA, by default the preset's."""

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


@dataclasses.dataclass(frozen=True)
class Data:
    """What it reads."""

    data: Annotated[str | None, optional("WHERE", "Python's standard library")] = None
    """A text file, a folder or hf:NAME[:CONFIG]."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="bytes|bpe:SIZE")] = "bytes"
    """What makes tokens of text."""
    batch: int = TINY.batch
    """Windows in a step."""
    length: int = TINY.length
    """Tokens in a window."""
    eval_windows: int = 256
    """Windows of the validation text to validate with."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and in which way it is trained."""

    steps: int = TINY.steps
    """Steps to train."""
    seed: int = 0
    """Of the initial parameters and the order of the data."""
    subspace_gradients: bool = False
    """Between refreshes, backpropagate into the subspaces alone: for sumo and mofasgd."""
    fused: bool = False
    """Update each layer inside the backward pass, with clipping by the norm of the step before."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What shares the work."""

    mesh: Annotated[str | None, optional("data=N,fsdp=N,tensor=N", "one device")] = None
    """How all devices share the work."""
    coordinator: Annotated[str | None, optional("HOST:PORT", "a job scheduler's")] = None
    """The first of several processes."""
    processes: Annotated[int | None, optional("INT", "a job scheduler's, or 1")] = None
    """How many processes there are."""
    process: Annotated[int | None, optional("INT", "a job scheduler's")] = None
    """Which of them this is, from 0."""


@dataclasses.dataclass(frozen=True)
class Output(RunOptions):
    """What is written, where and how often."""

    eval_every: Annotated[int | None, optional("INT", "a tenth of the steps")] = None
    """Steps between two validations."""
    save_every: Annotated[int | None, optional("INT", "a tenth of the steps")] = None
    """Steps between two checkpoints."""
    log_subspace: bool = False
    """Log at every step how the optimizer's subspaces are doing, and draw it at the end."""


@dataclasses.dataclass(frozen=True)
class Config(Choice):
    """Pre-train a LLaMA-style language model."""

    optimization: optimizers.Arguments = optimizers.Arguments()
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    devices: Devices = Devices()
    output: Output = Output()


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
    "tensorboard",
    "wandb",
    "eval_every",
    "save_every",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `command_line.run`."""

    def prepared() -> Pretraining:
        config = command_line.check(parse(argv))
        devices = config.devices
        processes.join(devices.coordinator, devices.processes, devices.process)
        pretraining = prepare(config)
        training.look(pretraining.run)
        print_plan(pretraining)
        return pretraining

    return command_line.run(prepared, train)


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; what it leaves out is the preset's and the optimizer's."""
    with command_line.in_one_line():
        chosen, _ = tyro.cli(Choices, args=argv, return_unknown_args=True, add_help=False)
        command_line.choose("no preset", chosen.preset, PRESETS)
        preset = dataclasses.asdict(PRESETS[chosen.preset])
        of = lambda group: group(**{k: v for k, v in preset.items() if hasattr(group, k)})
        shape = Model(width=chosen.width or preset["width"])
        way = Training(subspace_gradients=chosen.subspace_gradients)
        options = complete(chosen.optimizer, optimizers.Arguments(), shape, way)
        default = Config(
            chosen.preset,
            chosen.optimizer,
            optimizers.shown(options),
            of(Model),
            of(Data),
            of(Training),
        )
        return tyro.cli(Config, args=argv, default=default, config=SETTINGS)


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
        config.output.out,
        Path("runs") / f"{config.preset}-{config.optimizer}",
        resume=config.output.resume,
        overwrite=config.output.overwrite,
    )
    loggers.check(config.output)
    options = complete(config.optimizer, config.optimization, config.model, config.training)
    tx = optimizer_of(config, options | metrics(config))
    corpus = text.load(
        config.data.data,
        config.data.tokenizer,
        length=config.data.length,
        batch=config.data.batch,
        validation_windows=config.data.eval_windows,
        seed=config.training.seed,
        earlier=out / "tokenizer.json" if config.output.resume else None,
    )
    shape = LlamaConfig(
        vocab=corpus.tokenizer.vocab,
        width=config.model.width,
        hidden=config.model.hidden,
        heads=config.model.heads,
        layers=config.model.layers,
        scan_layers=config.model.scan_layers,
    )
    init, loss = functions(shape, tx, config.training.seed)
    state, batch_sharding = training.on_one_device(jax.eval_shape(init)), None
    if config.devices.mesh is not None:
        devices = mesh.parse(config.devices.mesh)
        state, batch_sharding = on_mesh(devices, tx, state), mesh.batch_sharding(devices)
        if config.data.batch % (devices.shape["data"] * devices.shape["fsdp"]):
            raise ValueError(
                f"--batch {config.data.batch} must be a multiple of data x fsdp in --mesh"
                f" {config.devices.mesh}"
            )
    tenth = math.ceil(config.training.steps / 10)
    validation_loss = jax.jit(loss)
    what = record(config, options, corpus)
    run = training.Run(
        out=out,
        record=what,
        resume=config.output.resume,
        overwrite=config.output.overwrite,
        steps=config.training.steps,
        eval_every=config.output.eval_every or tenth,
        save_every=config.output.save_every or tenth,
        units=(config.data.batch * config.data.length, "tokens"),
        learning_rates=optimizers.learning_rates(options, config.training.steps),
        batches=corpus.batches,
        batch_sharding=batch_sharding,
        init=init,
        state=state,
        compile=lambda: compiled(pretraining),
        validate=lambda params: {
            "validation_loss": evaluate(
                validation_loss, params, corpus.validation, config.data.batch
            )
        },
        tell=tell,
        write_tokenizer=corpus.tokenizer.write,
        loggers=functools.partial(loggers.opened, config.output, out, what),
    )
    pretraining = Pretraining(config, options, corpus, tx, loss, run)
    return pretraining


def complete(name: str, given: optimizers.Arguments, model: Model, way: Training) -> dict[str, Any]:
    """All arguments of the optimizer, at a rank of a quarter of the width unless one is given."""
    return optimizers.complete(
        name,
        given,
        rank=max(1, model.width // 4),
        subspace_gradients=way.subspace_gradients,
    )


def record(config: Config, options: dict[str, Any], corpus: text.Corpus) -> dict[str, Any]:
    """What makes a run this run, as JSON."""
    given = {k: v for k, v in command_line.flat(config).items() if k not in FREE}
    data = {
        "vocab": corpus.tokenizer.vocab,
        "validation checksum": zlib.crc32(corpus.validation.tobytes()),
    }
    return given | options | data


def optimizer_of(config: Config, options: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer, with the clipping that the step can do."""
    if not config.training.fused:
        return optimizers.create(config.optimizer, config.training.steps, options)
    if config.training.subspace_gradients:
        raise ValueError(
            "--fused updates each layer from its whole gradient; leave out --subspace-gradients"
        )
    if config.optimizer == "galore":
        raise ValueError(
            "galore of optax fails on a layer without matrices; leave out --fused or choose another"
            " --optimizer"
        )
    # The global norm is known only when no gradient is left to clip.
    clip = sumo_optax.clip_by_last_norm
    return optimizers.create(config.optimizer, config.training.steps, options, clip)


def metrics(config: Config) -> dict[str, bool]:
    """The option of the optimizer that measures its subspaces, where that was asked for."""
    if not config.output.log_subspace:
        return {}
    if config.optimizer in optimizers.OPTAX:
        raise ValueError(f"{config.optimizer} has no subspace to log; leave out --log-subspace")
    if config.training.subspace_gradients:
        raise ValueError("--log-subspace looks at whole gradients; leave out --subspace-gradients")
    return {"metrics": True}


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

    def updated(state: State, windows: jax.Array, full: bool) -> tuple[State, dict[str, jax.Array]]:
        if config.training.fused:
            loss, *new = value_and_update(state.params, state.optimizer, windows)
            # Gradients are never there together; clipping has their norm.
            squared = optax.tree.get(new[1], "squared")
            return State(*new), {"loss": loss, "gradient_norm": jnp.sqrt(squared)}
        loss, gradients = value_and_grad(state.params, state.optimizer, windows, full=full)
        updates, optimizer = tx.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        return State(params, optimizer), {"loss": loss, "gradient_norm": norm}

    def step_function(
        state: State, windows: jax.Array, full: bool
    ) -> tuple[State, dict[str, jax.Array]]:
        state, logged = updated(state, windows, full)
        if config.output.log_subspace:
            logged |= sumo_optax.subspace_metrics(state.optimizer).summary
        return state, logged

    shape = (config.data.batch, config.data.length + 1)
    example = jax.ShapeDtypeStruct(shape, np.int32, sharding=run.batch_sharding)
    results = None if run.shardings is None else (run.shardings, None)
    step_jit = jax.jit(
        step_function, donate_argnums=0, static_argnames="full", out_shardings=results
    )
    kinds = (True, False) if config.training.subspace_gradients else (True,)
    steps = {full: step_jit.lower(run.state, example, full=full).compile() for full in kinds}
    refresh_every = options.get("refresh_every", config.training.steps)

    def step(number: int, state: State, windows: ArrayLike):
        return steps[not config.training.subspace_gradients or (number - 1) % refresh_every == 0](
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
        f"{config.preset}: {config.model.layers} blocks of width {config.model.width},"
        f" {count:,} parameters\n"
        f"{config.optimizer}: {config.training.steps:,} steps of"
        f" {config.data.batch} x {config.data.length} tokens,"
        f" {config.data.tokenizer} of {corpus.name}\n"
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
    if config.output.log_subspace:
        plot_subspace(trained.rows, title, run.out / "subspace.png")
    summary = {
        "steps": config.training.steps,
        "tokens": config.training.steps * config.data.batch * config.data.length,
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
