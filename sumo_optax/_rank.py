"""The rank of a matrix: a number, a fraction of its short side, or what a function of it says."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sumo_optax._paths import PyTree, named_leaves, path_string, whole_of
from sumo_optax._view import View

Rank = int | float | Callable[[str, tuple[int, ...]], int | float]

_MULTIPLE = 8  # of which a part of a side is one: hardware's tiles are multiples of 8
_NUMBERS = "an integer of at least 1 or a float in (0, 1]"


def check_rank(rank: Any) -> None:
    """Refuses what is no rank of any matrix; what a function gives is seen when it is called."""
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"rank must be {_NUMBERS}, known when the optimizer is made, got an array; with"
            " optax.inject_hyperparams put 'rank' among its static_args"
        )
    if not callable(rank):
        _number(rank, "rank", ", or a function of a leaf's path and shape")


def with_ranks(views: list[View | None], rank: Rank, tree: PyTree) -> list[View | None]:
    """The views of a tree's leaves with the rank of each; of layers alone, that of all of them."""
    whole = named_leaves(whole_of(tree))

    def ranked(path, view):
        if not callable(rank):
            return view._replace(r=_resolved(_number(rank, "rank"), view))
        name = path_string(path)
        given = rank(name, tuple(jnp.shape(whole[path])))
        return view._replace(r=_resolved(_number(given, f"the rank of {name}"), view))

    paths = named_leaves(tree)
    return [v if v is None else ranked(path, v) for path, v in zip(paths, views, strict=True)]


def _resolved(rank: int | float, view: View) -> int:
    short = min(view.m, view.n)
    if isinstance(rank, int):
        return min(rank, short)
    # Products such as 0.56 * 100 are above the whole number that they stand for.
    parts = math.ceil(round(rank * short / _MULTIPLE, 6))
    return min(_MULTIPLE * max(1, parts), short)


def _number(value: Any, name: str, or_else: str = "") -> int | float:
    """A Python int or float."""
    allowed = f"{name} must be {_NUMBERS}{or_else}, got {value!r}"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(allowed)
    if isinstance(value, (float, np.floating)):
        number, fits = float(value), 0 < value <= 1
    else:
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(allowed) from None
        fits = number >= 1
    if not fits:
        raise ValueError(allowed)
    return number
