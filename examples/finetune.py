"""Fine-tunes a BERT on a task of GLUE with any optimizer of sumo_optax or optax, or with LoRA.

python examples/finetune.py --model sentence-transformers/all-MiniLM-L6-v2 --task rte
python examples/finetune.py --model my_bert --task mrpc --data glue/MRPC --optimizer adamw

A model is a folder with config.json, model.safetensors and tokenizer.json, or the name of one on
the Hugging Face hub.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from common import bert, command_line, glue, hub, loggers, lora, optimizers, run_folder, training
from common.options import SETTINGS, RunOptions, optional
from common.plot import plot_losses
from common.training import State
from flax import nnx

import sumo_optax

# name: learning rate, and that of the Adam for leaves that are no matrices. As swept
# for all-MiniLM-L6-v2 by benchmarks/finetuning.py; online_subspace_descent and muon guessed.
LEARNING_RATES = {
    "sumo": (2e-3, 1e-4),
    "online_subspace_descent": (1e-3, 1e-4),
    "mofasgd": (1e-3, 1e-4),
    "galore": (2e-3, 1e-4),
    "muon": (1e-3, 1e-4),
    "adamw": (1e-4, 1e-4),
    "lora": (2e-3, 2e-3),
}
RANK = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the defaults of the optimizer's arguments come from."""

    optimizer: Annotated[str, tyro.conf.arg(metavar="|".join(LEARNING_RATES))] = "sumo"
    """What trains it. lora is AdamW on an addend of low rank to each matrix."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what."""

    model: str
    """A folder in the form of Hugging Face, or the name of one on its hub."""
    task: Annotated[str, tyro.conf.arg(metavar="|".join(glue.TASKS))] = "rte"
    """What it learns."""
    data: Annotated[Path | None, optional("FOLDER", "the hub")] = None
    """A folder with the task's TSV files."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How long it is trained, and in which batches."""

    epochs: int = 3
    """Times round the training rows."""
    batch: int = 32
    """Rows in a step."""
    length: int = 128
    """Tokens of a row; longer ones are cut."""
    seed: int = 0
    """Of the classifier, the order of the rows, and dropout."""


@dataclasses.dataclass(frozen=True)
class Config(Choice):
    """Fine-tune a BERT on a task of GLUE."""

    optimization: optimizers.Arguments = optimizers.Arguments()
    task: Task = Task(model=tyro.MISSING)
    training: Training = Training()
    output: RunOptions = RunOptions()


# A resumed run must be given all else as it was; what is set is among the optimizer's arguments.
FREE = ("out", "resume", "overwrite", "tensorboard", "wandb", "set")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `command_line.run`."""

    def prepared() -> Finetuning:
        finetuning = prepare(command_line.check(parse(argv)))
        training.look(finetuning.run)
        print_plan(finetuning)
        return finetuning

    return command_line.run(prepared, train)


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config; what it leaves out of the optimizer is the optimizer's."""
    with command_line.in_one_line():
        chosen, _ = tyro.cli(Choice, args=argv, return_unknown_args=True, add_help=False)
        options = complete(chosen.optimizer, optimizers.Arguments())
        if chosen.optimizer == "lora":
            options["rank"] = RANK
        default = Config(chosen.optimizer, optimizers.shown(options))
        return tyro.cli(Config, args=argv, default=default, config=SETTINGS)


class Finetuning(NamedTuple):
    """A run, and what it is made of."""

    config: Config
    options: dict[str, Any]  # of the optimizer
    examples: glue.Examples  # to train on
    tx: optax.GradientTransformation
    run: training.Run


def prepare(config: Config) -> Finetuning:
    """A run, having found out that it can be made."""
    out = run_folder.choose(
        config.output.out,
        Path("runs") / f"{config.task.task}-{config.optimizer}",
        resume=config.output.resume,
        overwrite=config.output.overwrite,
    )
    loggers.check(config.output)
    options = complete(config.optimizer, config.optimization)
    task = glue.find(config.task.task)
    rows = glue.load(config.task.task, config.task.data)
    folder = Path(config.task.model)
    if not folder.exists():
        folder = hub.download(config.task.model)
    shape = bert.read_config(folder)
    if config.training.length > shape.positions:
        raise ValueError(
            f"--length {config.training.length} is more than the {shape.positions} positions of the"
            " model"
        )
    tokenizer = read_tokenizer(folder)
    examples, validation = (glue.Examples(x, tokenizer, config.training.length) for x in rows)
    if len(examples) < config.training.batch:
        raise ValueError(
            f"--batch {config.training.batch} is more than the {len(examples)} training rows"
        )
    per_epoch = len(examples) // config.training.batch
    steps = config.training.epochs * per_epoch

    params, logits = model(folder, shape, max(1, len(task.labels)), config)
    name = "adamw" if config.optimizer == "lora" else config.optimizer
    tx = optimizers.create(name, steps, options)
    init = lambda: State(params, tx.init(params))
    predict = jax.jit(logits)

    def loss(params: Any, batch: Mapping[str, jax.Array], dropout: jax.Array) -> jax.Array:
        return mean_loss(task, logits(params, batch, dropout), batch["labels"])

    given = {k: v for k, v in command_line.flat(config).items() if k not in FREE}
    what = given | options | {"data": str(config.task.data)}
    run = training.Run(
        out=out,
        record=what,
        resume=config.output.resume,
        overwrite=config.output.overwrite,
        steps=steps,
        eval_every=per_epoch,
        save_every=per_epoch,
        units=(config.training.batch, "rows"),
        batches=glue.batches(examples, batch=config.training.batch, seed=config.training.seed),
        batch_sharding=None,
        init=init,
        state=training.on_one_device(jax.eval_shape(init)),
        compile=lambda: compiled(tx, loss, config.training.seed),
        validate=lambda params: evaluate(task, predict, params, validation, config.training.batch),
        tell=lambda step, found: tell(step / per_epoch, found),
        write_tokenizer=lambda path: tokenizer.save(str(path)),
        learning_rates=optimizers.learning_rates(options, steps),
        loggers=functools.partial(loggers.opened, config.output, out, what),
    )
    return Finetuning(config, options, examples, tx, run)


def complete(name: str, given: optimizers.Arguments) -> dict[str, Any]:
    """The optimizer's arguments; LoRA's are those of AdamW."""
    command_line.choose("unknown optimizer", name, LEARNING_RATES)
    if name != "lora":
        return optimizers.complete(name, given, rank=RANK, rates=LEARNING_RATES)
    given = dataclasses.replace(given, rank=None)
    rates = {"adamw": LEARNING_RATES["lora"]}
    return optimizers.complete("adamw", given, rank=RANK, rates=rates)


def model(
    folder: Path, shape: bert.BertConfig, classes: int, config: Config
) -> tuple[Any, Callable[..., jax.Array]]:
    """What is trained, as it is at first, and the logits from it, a batch and a key of dropout."""
    blank = bert.Bert(shape, classes, nnx.Rngs(config.training.seed))
    graph = nnx.graphdef(blank)
    params = bert.read_weights(folder, nnx.to_pure_dict(nnx.state(blank, nnx.Param)))
    merge: Callable[[Any], Any] = lambda params: params
    if config.optimizer == "lora":
        rank = optimizers.integer("lora", config.optimization.rank or RANK)
        params, merge = lora.split(params, rank, jax.random.key(config.training.seed))

    def logits(
        params: Any, batch: Mapping[str, jax.Array], dropout: jax.Array | None = None
    ) -> jax.Array:
        rngs = None if dropout is None else nnx.Rngs(dropout)
        bert_now = nnx.merge(graph, merge(params))
        return bert_now(batch["tokens"], batch["types"], batch["mask"], rngs)

    return params, logits


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a Hugging Face folder."""
    path = folder / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the only type that it raises
        raise ValueError(f"{path} cannot be read: {error}") from None


def mean_loss(task: glue.Task, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of classes; of a score, the squared error."""
    if not task.labels:
        return jnp.mean((logits[:, 0] - labels) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compiled(
    tx: optax.GradientTransformation, loss: Callable[..., jax.Array], seed: int
) -> training.Step:
    """A step of training; its dropout depends on seed and step alone."""

    def step_function(number: int, state: State, batch: Mapping[str, jax.Array]):
        dropout = jax.random.fold_in(jax.random.key(seed), number)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, dropout)
        updates, optimizer = tx.update(gradients, state.optimizer, state.params)
        logged = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        return State(optax.apply_updates(state.params, updates), optimizer), logged

    return jax.jit(step_function, donate_argnums=1)


def evaluate(
    task: glue.Task,
    predict: Callable[[Any, Mapping[str, np.ndarray]], jax.Array],
    params: Any,
    examples: glue.Examples,
    batch: int,
) -> dict[str, float]:
    """Loss and metrics over all examples."""
    starts = range(0, len(examples), batch)
    logits = np.concatenate([predict(params, examples[i : i + batch]) for i in starts])
    labels = examples.arrays["labels"]
    loss = {"validation_loss": float(mean_loss(task, jnp.asarray(logits), jnp.asarray(labels)))}
    return loss | glue.score(task, labels, logits)


def tell(epoch: float, found: Mapping[str, float]) -> str:
    """A line on a validation."""
    figures = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
    return f"epoch {epoch:g}  {'  '.join(figures)}"


def print_plan(finetuning: Finetuning) -> None:
    """Says what will be trained, on what, and what the optimizer will hold."""
    config, _, examples, tx, run = finetuning
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(run.state.params))
    print(
        f"{config.task.model}: {count:,} parameters to train\n"
        f"{config.optimizer}: {config.training.epochs} epochs of"
        f" {len(examples):,} rows of {config.task.task},"
        f" {run.steps:,} steps of {config.training.batch} x {config.training.length} tokens\n"
    )
    print(sumo_optax.describe(tx, run.state.params), end="\n\n")


def last_and_best(values: Sequence[float]) -> str:
    """In words."""
    best = int(np.argmax(values))
    return f"{values[-1]:.4f} at the end, {values[best]:.4f} at its best, after epoch {best + 1}"


def train(finetuning: Finetuning) -> None:
    """Trains, draws the curves, and says how it went."""
    config, options, _, _, run = finetuning
    trained = training.train(run)
    rank = f", rank {options['rank']}" if "rank" in options else ""
    title = f"{config.task.task}, {config.optimizer}{rank}"
    task = glue.find(config.task.task)
    unit = "nats" if task.labels else "squared error"
    plot_losses(trained.rows, title, unit, run.out / "loss.png")
    epochs = [row for row in trained.rows if "validation_loss" in row]
    figures = ("validation_loss", *task.metrics)
    summary = {
        "epochs": [{name: row[name] for name in figures} for row in epochs],
        "seconds": trained.seconds,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(trained.state.optimizer)),
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = {
        "trained": f"{run.steps:,} steps, {trained.seconds:,.0f} s",
        **{name: last_and_best([row[name] for row in epochs]) for name in task.metrics},
        "optimizer state": f"{summary['state_bytes'] / 2**20:,.1f} MiB",
        "written": f"{run.out}/: metrics.jsonl, summary.json, loss.png, checkpoints/{run.steps}",
    }
    print()
    for name, value in lines.items():
        print(f"{name:>15}  {value}")


if __name__ == "__main__":
    sys.exit(main())
