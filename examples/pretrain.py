"""Pre-trains a LLaMA-style language model with any optimizer of sumo_optax or optax.

python examples/pretrain.py
python examples/pretrain.py --optimizer adamw --data my_folder --tokenizer bpe:8192
python examples/pretrain.py --preset 60m --data hf:allenai/c4 --tokenizer bpe:32000 --scan-layers
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import mesh
import numpy as np
import optax
import optimizers
import processes
import run_folder
import stopping
import text
import tyro
from flax import nnx
from jax.typing import ArrayLike
from llama import PRESETS, Llama, LlamaConfig
from plot import plot_losses, plot_subspace
from tqdm import tqdm

import sumo_optax

TINY = PRESETS["tiny"]


@dataclasses.dataclass(frozen=True)
class Base:
    """Pre-train a LLaMA-style language model."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "tiny"
    """Where the defaults of steps, batch, length and the model's shape come from."""


@dataclasses.dataclass(frozen=True)
class Config(Base):
    """Pre-train a LLaMA-style language model."""

    optimizer: Annotated[str, tyro.conf.arg(metavar="|".join(optimizers.LEARNING_RATES))] = "sumo"
    """What trains it."""
    learning_rate: float | None = None
    """Peak of the schedule; each optimizer has its default."""
    adam_learning_rate: float | None = None
    """The same for the Adam that trains embedding, head and norms."""
    rank: int | None = None
    """Rank of the subspace; by default a quarter of the width."""
    refresh_every: int | None = None
    """Steps between two refreshes of the subspace."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    subspace_gradients: bool = False
    """Between refreshes, backpropagate into the subspaces alone: for sumo and mofasgd."""

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


# A resumed run must be given all else as it was.
FREE = (
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
# Steps between two looks at the loss.
LOOK_EVERY = 10
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} < {remaining}{postfix}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program: 0 is success, 1 a failure, 2 something given that is wrong.

    128 + n is a stop by signal n, such as 130 by Ctrl-C.
    """
    try:
        config = check(parse(argv))
        processes.join(config.coordinator, config.processes, config.process)
        run = prepare(config)
        processes.wait("all have looked at the folder, none has written")
        run.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted before anything was written", file=sys.stderr)
        return 128 + signal.SIGINT
    try:
        return train(run)
    except OSError as error:
        return fail(error, 1)


def fail(error: Exception, code: int) -> int:
    """Says what went wrong, in a line."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


# tyro's words for an optional number that is none.
WRONG_NUMBER = r"no type matching \{None\}\|(\w+) could be instantiated from \['(.*)'\]\."


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; what it leaves out is the preset's."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            base, _ = tyro.cli(Base, args=argv, return_unknown_args=True, add_help=False)
            if base.preset not in PRESETS:
                raise ValueError(f"no preset {base.preset!r}; choose among {', '.join(PRESETS)}")
            preset = Config(base.preset, **dataclasses.asdict(PRESETS[base.preset]))
            flags = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(Config, args=argv, default=preset, config=flags)
        except SystemExit as exit:
            if not exit.code:
                raise
    # tyro frames a message of several lines, then repeats the help: one line is enough.
    lines = [line.strip("│ ") for line in stderr.getvalue().splitlines()[1:]]
    message = itertools.takewhile(lambda line: line.strip("─"), lines)
    words = " ".join(message).removeprefix("Error parsing ")
    raise ValueError(re.sub(WRONG_NUMBER, r"must be a number (\1), got '\2'", words))


def check(config: Config) -> Config:
    """The same, if its numbers make sense."""
    for name, value in dataclasses.asdict(config).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) is int and value < 1 and name not in ("seed", "process"):
            raise ValueError(f"{flag} must be an integer of at least 1, got {value}")
        if type(value) is float and not value >= 0:
            raise ValueError(f"{flag} must be a number of at least 0, got {value}")
    return config


class State(NamedTuple):
    """What training changes."""

    params: Any
    optimizer: Any


class Run(NamedTuple):
    """All that training needs, with nothing written yet."""

    config: Config
    out: Path
    options: dict[str, Any]  # of the optimizer
    corpus: text.Corpus
    tx: optax.GradientTransformation
    init: Callable[[], State]
    state: State  # shapes, dtypes and shardings of what `init` gives
    batch_sharding: jax.sharding.Sharding | None
    loss: Callable[[Any, ArrayLike], jax.Array]  # mean nats per token, from params and windows

    @property
    def record(self) -> dict[str, Any]:
        """What makes this run this run, as JSON."""
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE}
        corpus = {
            "vocab": self.corpus.tokenizer.vocab,
            "validation checksum": zlib.crc32(self.corpus.validation.tobytes()),
        }
        return config | self.options | corpus


def prepare(config: Config) -> Run:
    """Shows the plan of a run, having found out that it can be made."""
    out = run_folder.choose(
        config.out,
        Path("runs") / f"{config.preset}-{config.optimizer}",
        resume=config.resume,
        overwrite=config.overwrite,
    )
    given = {name: getattr(config, name) for name in optimizers.OPTIONS}
    options = optimizers.complete(
        config.optimizer, config.width, given, subspace_gradients=config.subspace_gradients
    )
    tx = measured(config, optimizers.create(config.optimizer, config.steps, options))
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
    state, batch_sharding = jax.eval_shape(init), None
    if config.mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    else:
        devices = mesh.parse(config.mesh)
        state, batch_sharding = on_mesh(devices, tx, state), mesh.batch_sharding(devices)
        if config.batch % (devices.shape["data"] * devices.shape["fsdp"]):
            raise ValueError(
                f"--batch {config.batch} must be a multiple of data x fsdp in --mesh {config.mesh}"
            )
    run = Run(config, out, options, corpus, tx, init, state, batch_sharding, loss)
    if config.resume:
        run_folder.check_same(out, run.record)
        run_folder.Checkpoints(out).check_shapes(state)
    print_plan(run, state)
    return run


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


def train(run: Run) -> int:
    """Trains from the start or the last checkpoint, and says how it went."""
    config, out, corpus = run.config, run.out, run.corpus
    if config.overwrite and processes.leads():
        run_folder.clear(out)
    processes.wait("the folder is clear")
    if processes.leads() and not (config.resume and (out / "config.json").exists()):
        # The configuration comes last of these, the checkpoints' folder after it: see `check_same`.
        with run_folder.whole(out / "tokenizer.json") as part:
            corpus.tokenizer.write(part)
        with run_folder.whole(out / "config.json") as part:
            part.write_text(json.dumps(run.record, indent=2) + "\n")
    checkpoints = run_folder.Checkpoints(out)
    restored = checkpoints.restore(run.state, corpus.batches) if config.resume else None
    if restored is None:
        start, seconds = 0, 0.0
        state = jax.jit(run.init, out_shardings=shardings(run))()
    else:
        start, state, seconds = restored
    if config.resume:
        print(f"going on from step {start}" if start else "no checkpoint yet: starting from step 0")
    metrics = run_folder.Metrics(out / "metrics.jsonl", start)
    with stopping.noted() as signals:
        try:
            state, step, seconds = loop(run, state, start, seconds, metrics, checkpoints, signals)
        except KeyboardInterrupt:
            signals.append(signal.SIGINT)
            step = None
        checkpoints.close()
    if step != config.steps:
        last = max(checkpoints.steps(), default=0)
        number = signals[0] if signals else signal.SIGTERM
        print(
            f"stopped by {number.name}; --resume --out {out} goes on from step {last}",
            file=sys.stderr,
        )
        return 128 + number
    rank = f", rank {run.options['rank']}" if "rank" in run.options else ""
    if not processes.leads():
        return 0
    title = f"{config.preset}, {config.optimizer}{rank}"
    plot_losses(metrics.rows, title, out / "loss.png")
    if config.log_subspace:
        plot_subspace(metrics.rows, title, out / "subspace.png")
    summary = {
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.length,
        "seconds": seconds,
        "validation_loss": metrics.rows[-1]["validation_loss"],
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state.optimizer)),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(run, **summary)
    return 0


def shardings(run: Run) -> State | None:
    """Of the state, on a mesh."""
    if run.batch_sharding is None:
        return None
    return jax.tree.map(lambda x: x.sharding, run.state)


def loop(
    run: Run,
    state: State,
    start: int,
    seconds: float,
    metrics: run_folder.Metrics,
    checkpoints: run_folder.Checkpoints,
    signals: Sequence[signal.Signals],
) -> tuple[State, int, float]:
    """The steps after `start` until the end or a signal.

    Gives the last state, its step and the seconds spent on training alone.
    """
    config, corpus = run.config, run.corpus
    tokens_per_step = config.batch * config.length
    tenth = math.ceil(config.steps / 10)
    validation_loss = jax.jit(run.loss)

    value_and_grad = sumo_optax.subspace_value_and_grad(run.loss)

    def step_function(
        state: State, windows: jax.Array, full: bool
    ) -> tuple[State, dict[str, jax.Array]]:
        loss, gradients = value_and_grad(state.params, state.optimizer, windows, full=full)
        updates, optimizer = run.tx.update(gradients, state.optimizer, state.params)
        logged = {"loss": loss}
        if config.log_subspace:
            logged |= sumo_optax.subspace_metrics(optimizer).summary
        return State(optax.apply_updates(state.params, updates), optimizer), logged

    shape = (config.batch, config.length + 1)
    example = jax.ShapeDtypeStruct(shape, np.int32, sharding=run.batch_sharding)
    results = None if run.batch_sharding is None else (shardings(run), None)
    step_jit = jax.jit(
        step_function, donate_argnums=0, static_argnames="full", out_shardings=results
    )
    train_steps = {
        full: step_jit.lower(state, example, full=full).compile()
        for full in ((True, False) if config.subspace_gradients else (True,))
    }
    refresh_every = run.options.get("refresh_every", config.steps)

    pending, step = [], start
    begun = time.perf_counter()
    with tqdm(
        total=config.steps,
        initial=start,
        disable=None,
        unit="step",
        dynamic_ncols=True,
        bar_format=BAR,
    ) as bar:
        for step in range(start + 1, config.steps + 1):
            windows = next(corpus.batches).astype(np.int32)
            full = not config.subspace_gradients or (step - 1) % refresh_every == 0
            state, logged = train_steps[full](state, shared(windows, run.batch_sharding))
            pending.append(logged)
            validate = step % (config.eval_every or tenth) == 0 or step == config.steps
            stop = bool(signals) or checkpoints.manager.reached_preemption(step)
            save = step % (config.save_every or tenth) == 0 or step == config.steps or stop
            # To look at a loss is to wait for it: not after every step.
            if not (validate or save or step % LOOK_EVERY == 0):
                continue
            first = step - len(pending) + 1
            rows = [
                {"step": first + i} | {name: x.item() for name, x in logged.items()}
                for i, logged in enumerate(pending)
            ]
            elapsed = time.perf_counter() - begun
            seconds += elapsed
            bar.set_postfix_str(
                f"loss {rows[-1]['loss']:.3f},"
                f" {len(rows) * tokens_per_step / elapsed:,.0f} tokens/s",
                refresh=False,
            )
            bar.update(len(rows))
            if validate:
                mean = evaluate(validation_loss, state.params, corpus.validation, config.batch)
                rows[-1] |= {"validation_loss": mean, "seconds": round(seconds, 3)}
                bar.write(
                    f"step {step:>6}  validation loss {mean:.4f}  perplexity {np.exp(mean):.3f}"
                )
            metrics.add(rows)
            if save:
                checkpoints.save(step, state, corpus.batches, seconds)
            if stop:
                break
            pending = []
            begun = time.perf_counter()
    return state, step, seconds


def shared(windows: np.ndarray, sharding: jax.sharding.Sharding | None) -> ArrayLike:
    """The batch on its devices: each process gives its own the windows they need."""
    if sharding is None:
        return windows
    return jax.make_array_from_callback(windows.shape, sharding, lambda index: windows[index])


def evaluate(
    loss: Callable[[Any, ArrayLike], jax.Array], params: Any, windows: np.ndarray, batch: int
) -> float:
    """Mean loss over all windows, in nats per token."""
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    return sum(len(part) * float(loss(params, part)) for part in parts) / len(windows)


def print_plan(run: Run, state: State) -> None:
    """Says what will be trained, on what, and what the optimizer will hold."""
    config, corpus = run.config, run.corpus
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    print(
        f"{config.preset}: {config.layers} blocks of width {config.width},"
        f" {count:,} parameters\n"
        f"{config.optimizer}: {config.steps:,} steps of {config.batch} x {config.length} tokens,"
        f" {config.tokenizer} of {corpus.name}\n"
    )
    print(sumo_optax.describe(run.tx, state.params), end="\n\n")


def print_summary(
    run: Run, *, steps: int, tokens: int, seconds: float, validation_loss: float, state_bytes: int
) -> None:
    """Says how it went and where things are."""
    loss = f"{validation_loss:.4f} nats per token, perplexity {np.exp(validation_loss):.3f}"
    if run.corpus.bytes_per_token != 1:
        loss += f", {validation_loss / run.corpus.bytes_per_token:.4f} nats per byte"
    lines = {
        "trained": f"{steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s",
        "speed": f"{tokens / seconds:,.0f} tokens/s, {steps / seconds:.2f} steps/s",
        "validation loss": loss,
        "optimizer state": f"{state_bytes / 2**20:,.1f} MiB",
        "written": f"{run.out}/: metrics.jsonl, summary.json, loss.png, checkpoints/{steps}",
    }
    print()
    for name, value in lines.items():
        print(f"{name:>15}  {value}")


if __name__ == "__main__":
    sys.exit(main())
