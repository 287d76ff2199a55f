"""Fine-tunes a BERT on a task of GLUE with any optimizer of sumo_optax or optax, or with LoRA.

python examples/finetune.py --model sentence-transformers/all-MiniLM-L6-v2 --task rte
python examples/finetune.py --model my_bert --task mrpc --data glue/MRPC --optimizer adamw
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from common import bert, glue, mesh, optimizers, run_folder, training
from common.training import State
from flax import nnx

# name: learning rate, and that of the Adam for leaves that are no matrices. As swept
# for all-MiniLM-L6-v2 by benchmarks/finetuning.py; online_subspace_descent and muon guessed.
LEARNING_RATES = {
    "sumo": (4e-4, 1e-4),
    "online_subspace_descent": (1e-3, 1e-4),
    "mofasgd": (4e-4, 1e-4),
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

    # Folder with config.json, model.safetensors and tokenizer.json, or the name of one on the hub.
    model: str
    task: glue.Name = "rte"  # What it learns.
    # A folder with the task's TSV files.
    data: Annotated[Path | None, optimizers.default("the hub")] = None
    # What trains it, at rank 8 by default; lora is AdamW on an addend of low rank to each matrix.
    optimizer: optimizers.Name | Literal["lora"] = "sumo"
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
    return tyro.cli(
        Config, args=argv, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    )


def prepare(config: Config) -> training.Run:
    """A run, having found out that it can be made."""
    out = run_folder.choose(config, Path("runs") / f"{config.task}-{config.optimizer}")
    task = glue.TASKS[config.task]
    name, arguments = complete(config)
    rows = glue.load(config.task, config.data)
    folder = find(config.model)
    shape = bert.read_config(folder)
    if config.length > (limit := shape.max_position_embeddings):
        raise ValueError(f"--length {config.length} is more than the model's {limit} positions")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    examples, validation = (glue.tokenized(x, tokenizer, config.length) for x in rows)
    per_epoch = (count := len(examples["labels"])) // config.batch
    if not per_epoch:
        raise ValueError(f"--batch {config.batch} is more than the {count} training rows")
    steps = config.epochs * per_epoch
    params, logits = model(folder, shape, max(1, task.classes), config)
    tx = optimizers.create(name, steps, arguments)
    init, predict = lambda: State(params, tx.init(params)), jax.jit(logits)

    def loss(params: Any, batch: Batch, dropout: jax.Array) -> jax.Array:
        return mean_loss(task, logits(params, batch, dropout), batch["labels"])

    def validate(params: Any) -> dict[str, float]:
        labels = validation["labels"]
        rows = (slice(i, i + config.batch) for i in range(0, len(labels), config.batch))
        parts = ({name: x[some] for name, x in validation.items()} for some in rows)
        found = np.concatenate([predict(params, part) for part in parts])
        loss = float(mean_loss(task, jnp.asarray(found), jnp.asarray(labels)))
        return {"validation_loss": loss} | glue.score(task, labels, found)

    devices = mesh.parse(None)
    given = {name: x for name, x in vars(config).items() if name not in FREE}
    return training.Run(
        out=out,
        options=config,
        record=given | arguments | {"data": str(config.data)},
        tx=tx,
        steps=steps,
        eval_every=per_epoch,
        save_every=per_epoch,
        units=(config.batch, "rows"),
        batches=glue.batches(examples, batch=config.batch, seed=config.seed),
        init=init,
        state=State(*mesh.abstract_state(devices, tx, jax.eval_shape(lambda: params))),
        loss=loss,
        compile=lambda: step_function(tx, loss, config.seed),
        validate=validate,
        write_tokenizer=lambda path: tokenizer.save(str(path)),
    )


def complete(config: Config) -> tuple[str, dict[str, Any]]:
    """The optimizer's name and arguments; LoRA's are AdamW's, with rates of its own."""
    name, given, rates = config.optimizer, config, LEARNING_RATES
    if name == "lora":
        name, given = "adamw", dataclasses.replace(config, rank=None)
        rates = {name: LEARNING_RATES["lora"]}
    return name, optimizers.complete(name, given, RANK, rates=rates)


def find(model: str) -> Path:
    """The folder of a model, which the hub gives where there is none."""
    if Path(model).exists():
        return Path(model)
    import huggingface_hub

    files = ["config.json", "model.safetensors", "tokenizer.json"]
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model} is no folder; the hub: {error}") from None


def model(
    folder: Path, shape: Any, classes: int, config: Config
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
    for part in (part for block in module.layers for part in (block, block.attention)):
        for name, W in list(vars(part).items()):
            if isinstance(W, nnx.Linear):
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
    if not task.classes:
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
