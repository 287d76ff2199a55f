"""Loss over bytes of state: what each optimizer reaches with what it holds for the matrices.

python benchmarks/frontier.py                                 # the preset `tiny`: a day on one core
python benchmarks/frontier.py --only sumo "muon, int4"        # some
python benchmarks/frontier.py --data books --text "a folder of books"
python benchmarks/frontier.py --sweep                         # rates too: twice as long
python benchmarks/frontier.py --draw                          # table and figure of the record

All seeds of an entry train in one program. A run that is in the record is not made again. In few
bits, an optimizer of optax is inside of `quantize_state`, with all of its state; one of ours has
its `state_dtype`, for the matrices alone.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, Literal

import convergence
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pretrain
import record
import sweep
import tyro
from common import optimizers
from common import text as corpus
from common.llama import Llama
from flax import nnx
from matplotlib.figure import Figure
from peers import on_matrices

import sumo_optax

RUNS = sweep.Record("frontier", ("text", "arguments", "entry", "learning_rate", "seed"))


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer of examples/common/optimizers.py or of this file, as it is compared."""

    optimizer: str
    rate: float
    settings: str = ""
    divisor: int | None = None  # the rank is the width over it

    def set(self, setting: str) -> "Entry":
        return dataclasses.replace(self, settings=f"{self.settings} {setting}".strip())


ADAM_RATE = 5e-3  # for all but the matrices
WHOLE = "residual=orthogonal consistent_rms=2"
IN_FLOATS = {
    "adamw": Entry("adamw_on_matrices", 3e-3),
    "lion": Entry("lion", 5e-4),
    "adafactor": Entry("adafactor", 3e-3),
    "muon": Entry("muon_in_bits", 3e-2, "beta=0.8"),
    "apollo, rank d/4": Entry("apollo", 5e-3, divisor=4),
    "apollo-mini": Entry("apollo_mini", 5e-3),
    "fira, rank d/4": Entry("fira", 5e-3, divisor=4),
    "galore, rank d/4": Entry("galore_on_matrices", 5e-3, divisor=4),
    "sumo, rank d/4": Entry("sumo", 3e-3, divisor=4),
    "sumo, whole, rank d/4": Entry("sumo", 3e-3, WHOLE, 4),
    "sumo, whole, rank d/16": Entry("sumo", 3e-3, WHOLE, 16),
    "sumo, whole, rank d/64": Entry("sumo", 3e-3, WHOLE, 64),
}
# The lines of the picture: more of them are not told apart.
DRAWN = (
    "adamw",
    "muon",
    "adafactor",
    "sumo, rank d/4",
    "sumo, whole, rank d/4",
    "sumo, whole, rank d/64",
)
# Of which states in few bits are compared.
ROUNDED = {x for x in IN_FLOATS if x.startswith(("adamw", "lion", "muon", "sumo"))}


def study() -> dict[str, Entry]:
    """By name: each in float32, and its state in few bits."""
    found = {}
    for name, entry in IN_FLOATS.items():
        ours = entry.optimizer == "sumo"
        found[name] = entry
        for bits in (8, 4) if name in ROUNDED else ():
            setting = f"state_dtype=int{bits}" if ours else f"bits={bits}"
            found[f"{name}, int{bits}"] = entry.set(setting)
    return found


STUDY = study()


def few_bits(
    tx: optax.GradientTransformation, bits: Literal[4, 8] | None
) -> optax.GradientTransformation:
    return tx if bits is None else sumo_optax.quantize_state(tx, bits)


def adamw(learning_rate, *, adam_learning_rate, weight_decay, bits=None):
    tx = optax.adamw(learning_rate, weight_decay=weight_decay)
    return few_bits(on_matrices(tx, adam_learning_rate, weight_decay), bits)


def lion(learning_rate, *, adam_learning_rate, weight_decay, bits=None):
    tx = optax.lion(learning_rate, weight_decay=weight_decay)
    return few_bits(on_matrices(tx, adam_learning_rate, weight_decay), bits)


def adafactor(learning_rate, *, adam_learning_rate, weight_decay):
    tx = optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=32,
        multiply_by_parameter_scale=False,
        weight_decay_rate=weight_decay or None,
    )
    return on_matrices(tx, adam_learning_rate, weight_decay)


def galore(learning_rate, *, rank, adam_learning_rate, weight_decay):
    """In our form, which takes stacked layers: GaLore's scale and interval, a basis by SVD."""
    adam = sumo_optax.scale_in_subspace(
        optax.scale_by_adam(),
        rank,
        basis="svd",
        side="short",
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params
        ),
    )
    decayed = optax.add_decayed_weights(weight_decay)
    tx = optax.chain(adam, decayed, optax.scale_by_learning_rate(learning_rate))
    return on_matrices(tx, adam_learning_rate, weight_decay)


def muon(learning_rate, *, beta, adam_learning_rate, weight_decay, bits=None):
    tx = optimizers.muon(
        learning_rate,
        beta=beta,
        adam_learning_rate=adam_learning_rate,
        weight_decay=weight_decay,
    )
    return few_bits(tx, bits)


def register() -> None:
    """Makes examples/pretrain.py know what is compared."""
    others: dict[str, Any] = {
        "adamw_on_matrices": adamw,
        "lion": lion,
        "adafactor": adafactor,
        "galore_on_matrices": galore,
        "apollo": peers.apollo,
        "apollo_mini": peers.apollo_mini,
        "fira": peers.fira,
        "muon_in_bits": muon,
    }
    optimizers.OPTAX.update(others)
    optimizers.LEARNING_RATES.update(dict.fromkeys(others, (math.nan, 5e-3)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the preset `tiny` with every optimizer, in float32 and in few bits."""

    only: tuple[str, ...] = tuple(STUDY)
    """Which of the study's."""
    data: str | None = None
    """A text file or a folder, by default Python's standard library."""
    text: str = "Python's standard library"
    """What the record calls it."""
    pretrain: str = ""
    """More arguments of examples/pretrain.py, as in --pretrain="--width 64"."""
    seeds: int = 3
    """How many, from 0."""
    sweep: bool = False
    """Walk to each one's best learning rate; otherwise all have the rates of this file."""
    rate: float | None = None
    """A rate for all that are named by --only, in place of that."""
    lock: Path | None = None
    """A file that a process holds while it trains: several can compile at once for one device."""
    draw: bool = False
    """Train nothing: the table and the figure of what is recorded."""


class Runs:
    """The training runs of one entry: all rates and seeds are lanes of one program."""

    def __init__(self, config: Config, name: str):
        self.entry, self.lock = STUDY[name], config.lock
        self.seeds = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        argv = ["--optimizer", self.entry.optimizer, *config.pretrain.split()]
        argv += ["--data", config.data] if config.data else []
        argv += ["--set", *self.entry.settings.split()] if self.entry.settings else []
        self.options = options = pretrain.parse(argv)
        of_seed = lambda seed: SimpleNamespace(**vars(options) | {"seed": seed})
        loaded = [corpus.load(of_seed(seed), Path()) for seed in range(config.seeds)]
        tokenizer, _, validation = loaded[0]
        options.vocab = tokenizer.vocab
        of_lane = lambda batches: np.stack(list(itertools.islice(batches, options.steps)))
        self.batches = np.stack([of_lane(batches) for _, batches, _ in loaded])
        parts = len(validation) // options.batch
        self.validation = validation[: parts * options.batch].reshape(parts, options.batch, -1)
        of_seeds = jax.vmap(self.trained, in_axes=(None, 0, 0, None))
        self.train = jax.jit(jax.vmap(of_seeds, in_axes=(0, None, None, None)))

    def optimizer(self, rate: float | jax.Array) -> optax.GradientTransformation:
        """After clipping; its rates follow the schedule of the examples."""
        rank = max(1, self.options.width // (self.entry.divisor or 4))
        given = optimizers.complete(self.options, {"rank": rank})
        unit = optimizers.schedule(1.0, self.options.steps)
        peaks = {"learning_rate": rate, "adam_learning_rate": ADAM_RATE}
        scheduled = {x: lambda count, peak=peak: peak * unit(count) for x, peak in peaks.items()}
        tx = optimizers.find(self.entry.optimizer)(**given | scheduled)
        return optax.chain(optax.clip_by_global_norm(1.0), tx)

    def create(self, key: jax.Array) -> Llama:
        return Llama(self.options, nnx.Rngs(key))

    def params(self, key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(self.create(key), nnx.Param))

    def trained(self, rate, key, batches, validation):
        """The validation loss of one seed."""
        tx, graph = self.optimizer(rate), nnx.graphdef(nnx.eval_shape(self.create, key))

        def loss(params, windows):
            logits = nnx.merge(graph, params)(windows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

        def step(carry, windows):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, windows)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        params = self.params(key)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return jax.lax.map(lambda windows: loss(params, windows), validation).mean()

    def held(self) -> dict[str, Any]:
        """Bytes for the matrices, and how many parameters these have."""
        params = jax.eval_shape(self.params, self.seeds[0])
        leaves = sumo_optax.describe(self.optimizer(1.0), params).leaves
        matrices = [
            x for x in leaves if x.path.startswith("layers/") and x.path.endswith("/kernel")
        ]
        return {
            "steps": self.options.steps,
            "numbers": sum(math.prod(x.shape) for x in matrices),
            "matrix_bytes": sum(x.state_bytes for x in matrices),
            "machine": record.machine(),
        }

    def at(self, rates: Sequence[float]) -> list[list[dict[str, Any]]]:
        """For each rate a row for each seed."""
        given = jnp.array(rates), self.seeds, self.batches, self.validation
        compiled = self.train.lower(*given).compile()
        with record.locked(self.lock) if self.lock else contextlib.nullcontext():
            losses = jax.block_until_ready(compiled(*given))
        row = lambda loss: {"validation_loss": float(loss)} | self.held()
        return [[row(loss) for loss in of_rate] for of_rate in losses]


def losses(
    config: Config, name: str, runs: Callable[[], Runs], rates: Sequence[float]
) -> list[float]:
    """The final validation loss at each rate, the seeds' mean; infinite if one has diverged."""
    keys = [
        [(config.text, config.pretrain, name, x, i) for i in range(config.seeds)] for x in rates
    ]
    if not set(itertools.chain(*keys)) <= RUNS.rows().keys():
        made = runs().at(rates)
        RUNS.add(dict(zip(itertools.chain(*keys), itertools.chain(*made), strict=True)))
    found = [[RUNS.rows()[key]["validation_loss"] for key in of_rate] for of_rate in keys]
    print(name, *zip(rates, found, strict=True), flush=True)
    return [mean(x) if all(map(math.isfinite, x)) else math.inf for x in found]


def make(config: Config) -> None:
    """Makes all runs that are missing."""
    register()
    for name in config.only:
        if name not in STUDY:
            raise SystemExit(f"error: no entry {name!r}; there are {', '.join(STUDY)}")
        runs = functools.cache(functools.partial(Runs, config, name))
        at = functools.partial(losses, config, name, runs)
        guess = config.rate or STUDY[name].rate
        if config.sweep:
            walk(at, convergence.RATES.index(guess))
        else:
            at([guess])


def walk(at: Callable[[Sequence[float]], list[float]], best: int) -> None:
    """Moves along the rates until those beside the best are worse."""
    while True:
        found = at(convergence.RATES[best - 1 : best + 2])
        step = found.index(min(found)) - 1
        if step == 0:
            return
        best += step


def summarize() -> list[dict[str, Any]]:
    """A row for each text, model and entry, at its best rate: the least state first."""
    found: dict[Any, dict[float, list[dict[str, Any]]]] = {}
    for (*key, rate, _), row in RUNS.rows().items():
        found.setdefault(tuple(key), {}).setdefault(rate, []).append(row)
    rows = []
    for (text, arguments, name), by_rate in found.items():
        most = max(map(len, by_rate.values()))
        of = {
            rate: [x["validation_loss"] for x in runs]
            for rate, runs in by_rate.items()
            if len(runs) == most
        }
        rate = min(of, key=lambda rate: mean(of[rate]))
        held = by_rate[rate][0]
        row = {
            "text": text,
            "arguments": arguments,
            "entry": name,
            "learning_rate": rate,
            "loss": mean(of[rate]),
            "spread": max(of[rate]) - min(of[rate]),
            "seeds": most,
            "matrix_bytes": held["matrix_bytes"],
            "bytes": held["matrix_bytes"] / held["numbers"],
        }
        rows.append(row)
    rows.sort(key=lambda row: row["bytes"])
    return [row | {"edge": "yes" if is_on_edge(row, rows) else ""} for row in rows]


def is_on_edge(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether all that hold no more have a higher loss."""
    alike = [x for x in rows if (x["text"], x["arguments"]) == (row["text"], row["arguments"])]
    return all(x is row or x["bytes"] > row["bytes"] or x["loss"] > row["loss"] for x in alike)


def studies(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of each text and model."""
    keys = dict.fromkeys((row["text"], row["arguments"]) for row in rows)
    return {key: [x for x in rows if (x["text"], x["arguments"]) == key] for key in sorted(keys)}


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each text and model."""
    columns = {
        "optimizer": "{entry}",
        "bytes a parameter": "{bytes:.3f}",
        "validation loss": "{loss:.4f}",
        "spread": "{spread:.4f}",
        "seeds": "{seeds}",
        "learning rate": "{learning_rate:g}",
        "least for its bytes": "{edge}",
    }
    parts = []
    for (text, arguments), of_study in studies(rows).items():
        title = f"{text}, `{arguments}`" if arguments else text
        parts.append(f"**{title}**\n\n{record.table(of_study, columns)}")
    return "\n\n".join(parts)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss over bytes, a line for each optimizer from float32 to 4 bits, and the edge below all."""
    parts = studies(rows)
    gain = lambda edge, k: edge[k - 1]["loss"] - edge[k]["loss"]
    figure = Figure(figsize=(9, 4.5 * len(parts)), layout="constrained")
    for axes, ((text, _), of_study) in zip(
        figure.subplots(len(parts), squeeze=False)[:, 0], parts.items(), strict=True
    ):
        for k, name in enumerate(DRAWN):
            line = [x for x in of_study if x["entry"].split(", int")[0] == name]
            columns = [x["bytes"] for x in line], [x["loss"] for x in line]
            if line:
                axes.plot(*columns, "o-", markersize=5, label=name, color=f"C{k}")
        edge = [x for x in of_study if x["edge"]]
        columns = [x["bytes"] for x in edge], [x["loss"] for x in edge]
        axes.step(*columns, where="post", color="gray", lw=1, ls=":")
        for x in (edge[k] for k in range(len(edge)) if k == 0 or gain(edge, k) > 0.005):
            at = {"xytext": (4, -10), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(x["entry"], (x["bytes"], x["loss"]), color="gray", **at)
        axes.set(xscale="log", title=text, ylabel="validation loss, nats per token")
        axes.set(xlabel="bytes of state for each parameter of a matrix")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    if not config.draw:
        make(config)
    rows = summarize()
    draw(rows, record.RESULTS / "frontier.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
