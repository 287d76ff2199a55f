"""Fine-tunes a BERT on a task of GLUE with any optimizer of sumo_optax or optax, or with LoRA.

python examples/finetune.py --model sentence-transformers/all-MiniLM-L6-v2 --task rte
python examples/finetune.py --model my_bert --task mrpc --data glue/MRPC --optimizer adamw
"""

import dataclasses
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
from common import bert, glue, mesh, optimizers, options, run_folder, training
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
class Task:
    """What is trained on what."""

    # Folder with config.json, model.safetensors and tokenizer.json, or the name of one on the hub.
    model: str
    task: glue.Name = "rte"  # What it learns.
    # A folder with the task's TSV files.
    data: Annotated[str | None, options.default("the hub")] = None
    epochs: int = 3  # Times round the training rows.
    batch: int = 32  # Rows in a step.
    length: int = 128  # Tokens of a row; longer ones are cut.
    seed: int = 0  # Of the classifier, the order of the rows, and dropout.


class Config(NamedTuple):
    """Fine-tune a BERT on a task of GLUE."""

    task: Task
    optimizer: optimizers.Options = optimizers.Options()
    output: run_folder.Options = run_folder.Options()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `training.main`."""
    return training.main(lambda: prepare(parse(argv)))


def parse(argv: Sequence[str] | None) -> Any:
    """The options of a command line."""
    return options.flat(options.parse(Config, argv))


class Finetuning(training.Run):
    """A BERT that learns to tell the classes of rows, or their scores."""

    def __init__(self, config: Any):
        self.config, self.units = config, (config.batch, "rows")
        self.out = run_folder.choose(config, f"{config.task}-{config.optimizer}")
        self.task = glue.TASKS[config.task]
        arguments = optimizers.complete(config, {"rank": RANK}, LEARNING_RATES)
        self.record = run_folder.record(config, arguments)
        rows = glue.load(config.task, config.data)
        folder = find(config.model)
        shape = bert.read_config(folder)
        if config.length > (limit := shape.max_position_embeddings):
            raise ValueError(f"--length {config.length} is more than the model's {limit} positions")
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        self.write_tokenizer = lambda path: tokenizer.save(str(path))
        examples, self.validation = (glue.tokenized(x, tokenizer, config.length) for x in rows)
        self.every = (count := len(examples["labels"])) // config.batch
        if not self.every:
            raise ValueError(f"--batch {config.batch} is more than the {count} training rows")
        self.batches = glue.batches(examples, batch=config.batch, seed=config.seed)
        self.steps = config.epochs * self.every
        self.tx = optimizers.create(config.optimizer, self.steps, arguments)
        rank = arguments["rank"] if config.optimizer == "lora" else None
        self.start, self.logits = model(folder, shape, max(1, self.task.classes), config.seed, rank)
        self.predict = jax.jit(self.logits)
        params = jax.eval_shape(self.params)
        self.state = State(*mesh.abstract_state(mesh.parse(None), self.tx, params))

    def params(self) -> Any:
        return self.start

    def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Cross-entropy of classes; of a score, the squared error."""
        if not self.task.classes:
            return jnp.mean((logits[:, 0] - labels) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def validate(self, params: Any) -> dict[str, float]:
        labels, batch = self.validation["labels"], self.config.batch
        slices = (slice(i, i + batch) for i in range(0, len(labels), batch))
        parts = ({name: x[some] for name, x in self.validation.items()} for some in slices)
        logits = np.concatenate([self.predict(params, part) for part in parts])
        loss = float(self.loss(jnp.asarray(logits), jnp.asarray(labels)))
        return {"validation_loss": loss} | glue.score(self.task, labels, logits)

    def compile(self) -> Any:
        """A step; its dropout depends on seed and step alone."""

        def step(number: int, state: State, batch: Batch) -> tuple[State, training.Logged]:
            dropout = jax.random.fold_in(jax.random.key(self.config.seed), number)
            loss = lambda params: self.loss(self.logits(params, batch, dropout), batch["labels"])
            return self.updated(state, *jax.value_and_grad(loss)(state.params))

        return jax.jit(step, donate_argnums=1)


prepare = Finetuning


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
    folder: Path, shape: Any, classes: int, seed: int, rank: int | None
) -> tuple[Any, Callable[..., jax.Array]]:
    """What is trained, as it is at first, and the logits from it, a batch and a key of dropout.

    With a `rank` that is what LoRA trains.
    """
    rngs = nnx.Rngs(seed)
    module = bert.Bert(shape, classes, rngs)
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, bert.read_weights(folder, nnx.to_pure_dict(state)))
    nnx.update(module, state)
    trained = nnx.Param
    if rank is not None:
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


if __name__ == "__main__":
    sys.exit(main())
