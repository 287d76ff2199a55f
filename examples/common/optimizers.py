"""Any optimizer by its name, all with the same schedule and the same clipping."""

import ast
import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import jax
import optax
import tyro
from common.options import default

import sumo_optax

# name: learning rate, and that of the Adam for leaves that are no matrices; the first was swept for
# `tiny` by benchmarks/convergence.py.
LEARNING_RATES = {
    "sumo": (3e-3, 5e-3),
    "online_subspace_descent": (5e-3, 5e-3),
    "mofasgd": (3e-3, 5e-3),
    "galore": (5e-3, 5e-3),
    "muon": (2e-2, 5e-3),
    "adamw": (3e-3, 3e-3),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What trains it."""

    # One of sumo, online_subspace_descent, mofasgd, galore, muon and adamw; to fine-tune also
    # lora: AdamW on an addend of low rank to each matrix.
    optimizer: str = "sumo"
    # Peak of the schedule.
    learning_rate: Annotated[float | None, default("the optimizer's")] = None
    # That of Adam, for leaves that are no matrices.
    adam_learning_rate: Annotated[float | None, default("the optimizer's")] = None
    # Of the subspace, or a fraction of the matrix's short side.
    rank: Annotated[int | float | None, default("width / 4; 8 to fine-tune")] = None
    # Steps between two refreshes of the subspace.
    refresh_every: Annotated[int | None, default("the optimizer's")] = None
    # Decoupled weight decay.
    weight_decay: Annotated[float | None, default("0")] = None
    # Any other arguments NAME=VALUE of the optimizer, such as momentum=0.95 residual=None.
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()


def schedule(peak: float, steps: int) -> optax.Schedule:
    """A tenth of the steps up to the peak, the others down a cosine to a tenth of it."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, 0.1 * peak)


def is_matrix(path: jax.tree_util.KeyPath) -> bool:
    """Whether a leaf is one of the projections of a block."""
    first, *_, last = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return (first, last) == ("layers", "kernel")


def muon(learning_rate, *, beta=0.95, adam_learning_rate, weight_decay):
    """Muon for the matrices that sumo_optax finds, AdamW for the rest."""
    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_learning_rate=adam_learning_rate,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=sumo_optax.flax_dimension_numbers,
    )


def galore(learning_rate, *, rank, refresh_every=200, adam_learning_rate, weight_decay):
    """GaLore for the projections, AdamW for the rest."""

    def label(path, leaf):
        if is_matrix(path) and leaf.ndim != 2:
            raise ValueError("galore of optax cannot train stacked blocks; leave out --scan-layers")
        return "galore" if is_matrix(path) else "adamw"

    of_matrices = optax.contrib.galore(
        learning_rate,
        rank=integer("galore of optax", rank),
        update_proj_gap=refresh_every,
        weight_decay=weight_decay,
    )
    rest = optax.adamw(adam_learning_rate, weight_decay=weight_decay)
    labels = lambda params: jax.tree.map_with_path(label, params)
    return optax.partition({"galore": of_matrices, "adamw": rest}, labels)


def lora(learning_rate, *, rank, b1=0.9, b2=0.999, eps=1e-8, weight_decay):
    """AdamW; the addends, of this rank, are the model's."""
    integer("lora", rank)
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)


def integer(name: str, rank: int | float) -> int:
    """A rank that must not be a fraction."""
    if not isinstance(rank, int):
        raise ValueError(f"{name} takes an integer as its --rank, got {rank}")
    return rank


OPTAX: dict[str, Any] = {"galore": galore, "muon": muon, "adamw": optax.adamw, "lora": lora}

find: Any = lambda name: OPTAX.get(name) or getattr(sumo_optax, name)


def parse(settings: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE, each value as Python reads it or else as a word."""
    found = {}
    for name, equals, value in (setting.partition("=") for setting in settings):
        if not equals:
            raise ValueError(f"--set needs NAME=VALUE, got {name!r}")
        found[name] = value
        with contextlib.suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(value)
    return found


def complete(
    given: Any,
    defaults: Mapping[str, Any],
    rates: Mapping[str, tuple[float, float]] = LEARNING_RATES,
) -> dict[str, Any]:
    """The optimizer's arguments: what is given or set, and `defaults` and rates for the rest."""
    options = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
    name, settings = options.pop("optimizer"), options.pop("set")
    if name not in rates:
        raise ValueError(f"--optimizer must be one of {', '.join(rates)}, got {name!r}")
    accepted = inspect.signature(find(name)).parameters
    chosen = {option: x for option, x in options.items() if x is not None}
    chosen |= parse(itertools.chain.from_iterable(settings))
    for option in chosen.keys() - accepted:
        raise ValueError(f"{name} has no {option!r}, but {', '.join(accepted)}")
    known = dict(zip(("learning_rate", "adam_learning_rate"), rates[name], strict=True))
    known |= {"weight_decay": 0.0, **defaults}
    return {option: x for option, x in known.items() if option in accepted} | chosen


def create(
    name: str,
    steps: int,
    arguments: Mapping[str, Any],
    clip: Callable[[float], optax.GradientTransformation] = optax.clip_by_global_norm,
) -> optax.GradientTransformation:
    """An optimizer after clipping to a norm of 1; its learning rates follow the schedule."""
    scheduled = {
        option: schedule(value, steps) if option.endswith("learning_rate") else value
        for option, value in arguments.items()
    }
    return optax.chain(clip(1.0), find(name)(**scheduled))
