"""Any optimizer by its name, all with the same schedule and the same clipping."""

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from common.command_line import choose
from common.options import optional

import sumo_optax

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# name: learning rate, and that of the Adam for leaves that are no matrices; the first was swept for
# `tiny` by benchmarks/convergence.py.
LEARNING_RATES = {
    "sumo": (1.5e-2, 5e-3),
    "online_subspace_descent": (5e-3, 5e-3),
    "mofasgd": (7e-3, 5e-3),
    "galore": (5e-3, 5e-3),
    "muon": (2e-2, 5e-3),
    "adamw": (3e-3, 3e-3),
}

# Those that read no more than projected gradients between refreshes, and the form in which they do.
SUBSPACE_GRADIENTS: dict[str, dict[str, Any]] = {
    "sumo": {"basis": "randomized_svd", "side": "long", "residual": None, "refresh_every": 200},
    "mofasgd": {},
}


NONE = "this optimizer has none"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Of the optimizer that is chosen; --help has the defaults of that one."""

    learning_rate: Annotated[float | None, optional("FLOAT", NONE)] = None
    """Peak of the schedule."""
    adam_learning_rate: Annotated[float | None, optional("FLOAT", NONE)] = None
    """The same for the Adam that trains embeddings, head, norms and biases."""
    rank: Annotated[int | float | None, optional("INT|FLOAT", NONE)] = None
    """Rank of the subspace, or a fraction of each matrix's short side, such as 0.25."""
    refresh_every: Annotated[int | None, optional("INT", "10 with sumo, 200 with galore")] = None
    """Steps between two refreshes of the subspace."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint=""),
    ] = ()
    """Any other arguments of the optimizer, such as momentum=0.95 residual=None."""

    def named(self) -> dict[str, Any]:
        """Those with a flag of their own."""
        names = (field.name for field in dataclasses.fields(Arguments) if field.name != "set")
        return {name: getattr(self, name) for name in names}


def schedule(peak: float, steps: int) -> optax.Schedule:
    """A tenth of the steps up to the peak, the others down a cosine to a tenth of it."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, 0.1 * peak)


def learning_rates(options: Mapping[str, Any], steps: int) -> list[float]:
    """Those of all steps."""
    rates = jax.vmap(schedule(options["learning_rate"], steps))(np.arange(steps))
    return np.asarray(rates).tolist()


def is_matrix(path: jax.tree_util.KeyPath) -> bool:
    """Whether a leaf is one of the projections of a block, and not its bias."""
    *_, module, leaf = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return module in MATRICES and leaf == "kernel"


def adamw(learning_rate, *, weight_decay):
    """AdamW for every leaf."""
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def muon(learning_rate, *, beta=0.95, adam_learning_rate, weight_decay):
    """Muon for the projections, AdamW for the rest."""

    def dimension_numbers(params):
        spec = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree.map_with_path(lambda path, _: spec if is_matrix(path) else None, params)

    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_learning_rate=adam_learning_rate,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
    )


def integer(name: str, rank: int | float) -> int:
    """The rank, for what knows no fractions."""
    if not isinstance(rank, int):
        raise ValueError(f"{name} takes an integer as its --rank, got {rank}")
    return rank


def galore(learning_rate, *, rank, refresh_every=200, adam_learning_rate, weight_decay):
    """GaLore for the projections, AdamW for the rest."""

    def labels(params):
        return jax.tree.map_with_path(label, params)

    def label(path, leaf):
        if not is_matrix(path):
            return "adamw"
        if leaf.ndim != 2:
            raise ValueError(
                "galore of optax cannot train stacked blocks; leave out --scan-layers or choose"
                " another --optimizer"
            )
        return "galore"

    return optax.partition(
        {
            "galore": optax.contrib.galore(
                learning_rate,
                rank=integer("galore of optax", rank),
                update_proj_gap=refresh_every,
                weight_decay=weight_decay,
            ),
            "adamw": optax.adamw(adam_learning_rate, weight_decay=weight_decay),
        },
        labels,
    )


OPTAX = {"galore": galore, "muon": muon, "adamw": adamw}


def find(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function that makes the optimizer of this name."""
    choose("unknown optimizer", name, LEARNING_RATES)
    return OPTAX.get(name) or getattr(sumo_optax, name)


def parse(settings: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE, each value as Python reads it or else as a word."""
    options = {}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set needs NAME=VALUE, got {setting!r}")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return options


def complete(
    name: str,
    given: Arguments,
    *,
    rank: int | float,
    rates: Mapping[str, tuple[float, float]] = LEARNING_RATES,
    subspace_gradients: bool = False,
) -> dict[str, Any]:
    """What is given or set, and defaults for the rest; refuses what the optimizer does not have."""
    accepted = inspect.signature(find(name)).parameters
    chosen = {option: value for option, value in given.named().items() if value is not None}
    settings = parse(itertools.chain.from_iterable(given.set))
    for option in chosen:
        if option not in accepted:
            raise ValueError(f"{name} has no --{option.replace('_', '-')}; leave it out")
    for option in settings:
        choose(f"{name} has nothing to --set that is called", option, accepted)
    learning_rate, adam_learning_rate = rates[name]
    defaults = {
        "learning_rate": learning_rate,
        "adam_learning_rate": adam_learning_rate,
        "rank": rank,
        "weight_decay": 0.0,
    }
    if subspace_gradients:
        if name not in SUBSPACE_GRADIENTS:
            names = " and ".join(SUBSPACE_GRADIENTS)
            raise ValueError(f"{name} has no --subspace-gradients; {names} have")
        defaults |= SUBSPACE_GRADIENTS[name]
    known = {option: value for option, value in defaults.items() if option in accepted}
    return known | chosen | settings


def shown(options: Mapping[str, Any]) -> Arguments:
    """These as defaults, for --help to show."""
    names = Arguments().named()
    return Arguments(**{name: value for name, value in options.items() if name in names})


def create(
    name: str,
    steps: int,
    options: Mapping[str, Any],
    clip: Callable[[float], optax.GradientTransformation] = optax.clip_by_global_norm,
) -> optax.GradientTransformation:
    """An optimizer after clipping to a norm of 1; its learning rates follow the schedule."""
    arguments = {
        option: schedule(value, steps) if option.endswith("learning_rate") else value
        for option, value in options.items()
    }
    return optax.chain(clip(1.0), find(name)(**arguments))
