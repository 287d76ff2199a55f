"""What an argument may be. Errors say what was given and what is allowed."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sumo_optax._paths import PyTree, named_leaves, path_string


def integer(name: str, value: Any, *, least: int | None = None) -> int:
    allowed = f"{name} must be an integer" + ("" if least is None else f" of at least {least}")
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{allowed}, known when the optimizer is made, got an array;"
            f" with optax.inject_hyperparams put {name!r} among its static_args"
        )
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{allowed}, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{allowed}, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{allowed}, got {value}")
    return number


def seed(value: Any) -> None:
    if not isinstance(value, jax.Array):
        integer("seed", value)


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    optional: bool = False,
) -> None:
    """Checks what is known now: a traced value, or an array, is the caller's business.

    Without bounds the number must be finite.
    """
    if isinstance(value, jax.Array) or (optional and value is None):
        return
    bounds = [(">=", least), (">", above), ("<", below), ("<=", most)]
    wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
    wanted = f"number {wanted}" if wanted else "finite number"
    allowed = f"{name} must be a {wanted}" + (", or None" if optional else "")
    try:
        x = float("no number" if isinstance(value, str | bytes) else value)
    except (TypeError, ValueError):
        raise TypeError(f"{allowed}, got {value!r}") from None
    inside = (
        (math.isfinite(x) or any(bound is not None for _, bound in bounds))
        and (least is None or x >= least)
        and (above is None or x > above)
        and (below is None or x < below)
        and (most is None or x <= most)
    )
    if not inside:
        raise ValueError(f"{allowed}, got {value}")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def scheduled(name: str, value: Any, *, least: float | None = None, optional: bool = False) -> None:
    if callable(value) or (optional and value is None):
        return
    try:
        number(name, value, least=least)
    except TypeError:
        allowed = f"{name} must be a number or a schedule" + (", or None" if optional else "")
        raise TypeError(f"{allowed}, got {value!r}") from None


def state_dtype(value: Any) -> None:
    if value is None:
        return
    allowed = "state_dtype must be a floating-point dtype, int8, int4 or None"
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise ValueError(f"{allowed}, got {value!r}") from None
    if not (jnp.issubdtype(dtype, jnp.floating) or dtype.name in ("int8", "int4")):
        raise ValueError(f"{allowed}, got {value!r}")


def transformation(name: str, value: Any, *, or_else: str = "") -> None:
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        allowed = "an optax transformation" + (f" or {or_else}" if or_else else "")
        raise TypeError(f"{name} must be {allowed}, got {_short(value)}")


def arrays(name: str, tree: PyTree, *, numbers: bool = False) -> None:
    for path, x in named_leaves(tree).items():
        is_number = numbers and isinstance(x, (int, float, complex))
        if not is_number and not (hasattr(x, "dtype") and hasattr(x, "shape")):
            raise TypeError(
                f"{name} must be a tree of arrays, got {_short(x)} at {path_string(path)};"
                " equinox.filter(model, equinox.is_array) leaves the arrays of a module"
            )


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."
