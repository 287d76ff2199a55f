"""Fine-tunes a BERT on a task of GLUE with any optimizer of sumo_optax or optax, or with LoRA.

python examples/finetune.py --model sentence-transformers/all-MiniLM-L6-v2 --task rte
python examples/finetune.py --model my_bert --task mrpc --data glue/MRPC --optimizer adamw
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from common import bert, glue, hub, loggers, mesh, optimizers, run_folder, training
from common.training import State
from flax import nnx

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
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(optimizers.Options, run_folder.RunOptions):
    """Fine-tune a BERT on a task of GLUE."""

    model: str
    """A folder with config.json, model.safetensors and tokenizer.json, or the name of one on the
    Hugging Face hub."""
    task: glue.Name = "rte"  # What it learns.
    data: Path | None = None  # A folder with the task's TSV files, by default the hub's.
    optimizer: optimizers.Name | Literal["lora"] = "sumo"
    """What trains it, at a rank of 8 where no other is given. lora is AdamW on an addend of low
    rank to each matrix."""
    epochs: int = 3  # Times round the training rows.
    batch: int = 32  # Rows in a step.
    length: int = 128  # Tokens of a row; longer ones are cut.
    seed: int = 0  # Of the classifier, the order of the rows, and dropout.


# A resumed run must be given all else as it was; what is set is among the optimizer's arguments.
FREE = {"set", *vars(run_folder.RunOptions())}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `training.main`."""
    return training.main(lambda: prepare(parse(argv)))


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config."""
    return tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))


def prepare(config: Config) -> training.Run:
    """A run, having found out that it can be made."""
    config.check()
    out = run_folder.choose(config, Path("runs") / f"{config.task}-{config.optimizer}")
    loggers.check(config)
    arguments, task = complete(config), glue.TASKS[config.task]
    rows = glue.load(config.task, config.data)
    folder = Path(config.model)
    if not folder.exists():
        folder = hub.download(config.model)
    shape = bert.read_config(folder)
    if config.length > (limit := shape.max_position_embeddings):
        raise ValueError(
            f"--length {config.length} is more than the {limit} positions of the model"
        )
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    examples, validation = (glue.Examples(x, tokenizer, config.length) for x in rows)
    per_epoch = len(examples) // config.batch
    if not per_epoch:
        raise ValueError(f"--batch {config.batch} is more than the {len(examples)} training rows")
    steps = config.epochs * per_epoch
    params, logits = model(folder, shape, max(1, len(task.labels)), config)
    name = "adamw" if config.optimizer == "lora" else config.optimizer
    tx = optimizers.create(name, steps, arguments)
    init, predict = lambda: State(params, tx.init(params)), jax.jit(logits)

    def loss(params: Any, batch: Batch, dropout: jax.Array) -> jax.Array:
        return mean_loss(task, logits(params, batch, dropout), batch["labels"])

    def validate(params: Any) -> dict[str, float]:
        starts = range(0, len(validation), config.batch)
        found = np.concatenate([predict(params, validation[i : i + config.batch]) for i in starts])
        labels = validation.arrays["labels"]
        loss = float(mean_loss(task, jnp.asarray(found), jnp.asarray(labels)))
        return {"validation_loss": loss} | glue.score(task, labels, found)

    devices = mesh.parse(None)
    given = {name: x for name, x in vars(config).items() if name not in FREE}
    return training.Run(
        out=out,
        options=config,
        record=given | arguments | {"data": str(config.data)},
        title=f"{config.task}, {config.optimizer}, {config.model}",
        tx=tx,
        steps=steps,
        eval_every=per_epoch,
        save_every=per_epoch,
        units=(config.batch, "rows"),
        learning_rate=optimizers.schedule(arguments["learning_rate"], steps),
        batches=glue.batches(examples, batch=config.batch, seed=config.seed),
        batch_sharding=mesh.batch_sharding(devices),
        init=init,
        state=State(*mesh.abstract_state(devices, tx, jax.eval_shape(lambda: params))),
        loss=loss,
        compile=lambda: step_function(tx, loss, config.seed),
        validate=validate,
        figures=("validation_loss", *task.metrics),
        loss_unit="nats" if task.labels else "squared error",
        write_tokenizer=lambda path: tokenizer.save(str(path)),
    )


def complete(config: Config) -> dict[str, Any]:
    """The optimizer's arguments; LoRA's are those of AdamW."""
    if config.optimizer != "lora":
        return optimizers.complete(config.optimizer, config, RANK, rates=LEARNING_RATES)
    given = dataclasses.replace(config, rank=None)
    return optimizers.complete("adamw", given, RANK, rates={"adamw": LEARNING_RATES["lora"]})


def model(
    folder: Path, shape: bert.BertConfig, classes: int, config: Config
) -> tuple[Any, Callable[..., jax.Array]]:
    """What is trained, as it is at first, and the logits from it, a batch and a key of dropout."""
    rngs = nnx.Rngs(config.seed)
    module = bert.Bert(shape, classes, rngs)
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, bert.read_weights(folder, nnx.to_pure_dict(state)))
    nnx.update(module, state)
    trained = nnx.Param
    if config.optimizer == "lora":
        rank = config.rank or RANK
        if not isinstance(rank, int):
            raise ValueError(f"lora takes an integer as its --rank, got {rank}")
        add_lora(module, rank, rngs)
        trained = nnx.Any(nnx.LoRAParam, *map(nnx.PathContains, bert.HEADS))
    graph, params, frozen = nnx.split(module, trained, ...)

    def logits(params: Any, batch: Batch, dropout: jax.Array | None = None) -> jax.Array:
        rngs = None if dropout is None else nnx.Rngs(dropout)
        bert_now = nnx.merge(graph, params, frozen)
        return bert_now(batch["tokens"], batch["types"], batch["mask"], rngs)

    return nnx.to_pure_dict(params), logits


def add_lora(module: bert.Bert, rank: int, rngs: nnx.Rngs) -> None:
    """Adds A B (arXiv 2106.09685) to each matrix: A random with variance 1/m, B zero at first."""
    start = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    for part in (part for block in module.layers for part in (block.attention, block.mlp)):
        for name in optimizers.MATRICES:
            if hasattr(part, name):
                W = getattr(part, name)
                sizes = (W.in_features, rank, W.out_features)
                added = nnx.LoRA(*sizes, base_module=W, a_initializer=start, rngs=rngs)
                setattr(part, name, added)


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a Hugging Face folder."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the only type that it raises
        raise ValueError(f"{path} cannot be read: {error}") from None


def mean_loss(task: glue.Task, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of classes; of a score, the squared error."""
    if not task.labels:
        return jnp.mean((logits[:, 0] - labels) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step_function(
    tx: optax.GradientTransformation, loss: Callable[..., jax.Array], seed: int
) -> training.Step:
    """A step of training; its dropout depends on seed and step alone."""

    def step(number: int, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        dropout = jax.random.fold_in(jax.random.key(seed), number)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, dropout)
        updates, optimizer = tx.update(gradients, state.optimizer, state.params)
        logged = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        return State(optax.apply_updates(state.params, updates), optimizer), logged

    return jax.jit(step, donate_argnums=1)


if __name__ == "__main__":
    sys.exit(main())
