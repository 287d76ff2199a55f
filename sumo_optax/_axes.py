"""Which leaves are matrices, over which axes: what a user said, or what the tree shows."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from sumo_optax._conventions import flax_dimension_numbers, readings
from sumo_optax._paths import Path, PyTree, few, named_leaves, path_string, whole_of

MatrixAxes = tuple[tuple[int, ...], tuple[int, ...]]  # of inputs and outputs, from the front
WeightDimensionNumbers = MuonDimensionNumbers | PyTree | Callable[[PyTree], PyTree]


def resolve(
    weight_dimension_numbers: WeightDimensionNumbers | None, params: PyTree
) -> list[MatrixAxes | None]:
    """One entry for every leaf of `params`, in order: its axes as a matrix, or None."""
    whole = whole_of(params)
    leaves, specs = named_leaves(whole), _specs(weight_dimension_numbers, whole)
    axes = {path: _checked(_lookup(specs, path), path, x) for path, x in leaves.items()}
    return [axes[path] for path in named_leaves(params)]


def advise(weight_dimension_numbers: WeightDimensionNumbers | None, params: PyTree) -> None:
    """Warns once of leaves that may be read wrongly; ValueError where that leaves no matrix."""
    leaves = named_leaves(params)
    named = lambda paths: few([f"{path_string(p)} {jnp.shape(leaves[p])}" for p in paths])
    if _is_default(weight_dimension_numbers):
        found = readings(params)
        doubts = [path for path, x in found.items() if x.is_ambiguous]
        doubt = "path and shape do not tell which axes of {} make a matrix"
        short = [path for path, x in found.items() if x.is_short]
    else:
        specs = _specs(weight_dimension_numbers, params)
        covered = lambda path: any(path[:depth] in specs for depth in range(len(path) + 1))
        doubts = [path for path, x in leaves.items() if jnp.ndim(x) > 1 and not covered(path)]
        doubt = "weight_dimension_numbers says nothing about {}"
        short = []
    if doubts and not any(resolve(weight_dimension_numbers, params)):
        raise ValueError(
            f"no leaf is a matrix: {doubt.format(named(doubts))}. Pass weight_dimension_numbers"
            " with optax.contrib.MuonDimensionNumbers or None for each leaf"
        )
    warning = []
    if doubts:
        warning.append(f"{doubt.format(named(doubts))}: the fallback trains them.")
    if short:
        warning.append(
            f"One side of the matrices of {named(short)} is so short that it may be a stack of"
            " layers."
        )
    if warning:
        warning.append("Name their axes in weight_dimension_numbers, or None for the fallback.")
        warnings.warn(" ".join(warning), UserWarning, stacklevel=3)


def _specs(
    weight_dimension_numbers: WeightDimensionNumbers | None, params: PyTree
) -> dict[Path, Any]:
    """What is said at a leaf's path, or at one above it."""
    if isinstance(weight_dimension_numbers, MuonDimensionNumbers):
        spec = weight_dimension_numbers
        return {path: spec for path, x in named_leaves(params).items() if jnp.ndim(x) > 1}
    if _is_default(weight_dimension_numbers):
        axes = {path: x.axes for path, x in readings(params).items()}
        return {path: x and MuonDimensionNumbers(*x) for path, x in axes.items()}
    tree = weight_dimension_numbers
    if callable(tree) and not any(map(_is_numbers, jax.tree.leaves(tree, is_leaf=_is_spec))):
        tree = tree(params)  # a tree may be callable too: a module of Equinox's
    specs = named_leaves(tree, is_leaf=_is_spec)
    for path, spec in specs.items():
        if _is_plain(spec):
            raise TypeError(
                f"weight_dimension_numbers must hold optax.contrib.MuonDimensionNumbers or None,"
                f" got {spec!r} at {path_string(path)}: write MuonDimensionNumbers"
                f"({', '.join(map(repr, spec))}), the axes of inputs, then those of outputs"
            )
    _check_all_used(specs, params)
    return specs


def _is_default(weight_dimension_numbers: Any) -> bool:
    return weight_dimension_numbers is None or weight_dimension_numbers is flax_dimension_numbers


def _is_numbers(x: Any) -> bool:
    return isinstance(x, MuonDimensionNumbers)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (MuonDimensionNumbers, optax.MaskedNode)) or _is_plain(x)


def _is_plain(x: Any) -> bool:
    """Axes that somebody forgot to call MuonDimensionNumbers."""
    is_axis = lambda a: isinstance(a, int) or _is_plain(a)
    return type(x) in (tuple, list) and len(x) > 0 and all(map(is_axis, x))


def _lookup(specs: dict[Path, Any], path: Path) -> MuonDimensionNumbers | None:
    """The spec at the leaf's path or at the nearest one above it: the tree may be a prefix."""
    for depth in range(len(path), -1, -1):
        if path[:depth] in specs:
            spec = specs[path[:depth]]
            return None if isinstance(spec, optax.MaskedNode) else spec
    return None


def _check_all_used(specs: dict[Path, Any], params: PyTree) -> None:
    """Every spec must be at or above a leaf, a None or a node masked by an outer transformation."""
    places = named_leaves(params, is_leaf=_is_spec)
    if not places:
        return
    for path, spec in specs.items():
        if spec is None or isinstance(spec, optax.MaskedNode):
            continue
        if not any(place[: len(path)] == path for place in places):
            seen = ", ".join(path_string(p) for p in places)
            raise ValueError(
                f"weight_dimension_numbers has {spec} at {path_string(path)}, which matches no"
                f" parameter; the parameters are: {seen}"
            )


def _checked(spec: Any, path: Path, leaf: Any) -> MatrixAxes | None:
    """The spec with both fields as tuples of axes counted from the front."""
    if spec is None:
        return None
    shape = jnp.shape(leaf)
    where = f"at {path_string(path)} with shape {shape}"
    if not isinstance(spec, MuonDimensionNumbers):
        raise TypeError(
            f"weight_dimension_numbers must hold optax.contrib.MuonDimensionNumbers or None,"
            f" got {spec!r} {where}"
        )
    fields = []
    for field in spec:
        axes = (field,) if isinstance(field, int) else tuple(field)
        if not axes or any(not -len(shape) <= a < len(shape) for a in axes):
            raise ValueError(
                f"{spec} {where} names an axis out of range: axes are"
                f" {-len(shape)} to {len(shape) - 1}, at least one in each field"
            )
        fields.append(tuple(a % len(shape) for a in axes))
    named = fields[0] + fields[1]
    if len(set(named)) != len(named):
        raise ValueError(f"{spec} {where} names an axis twice")
    if not math.prod(shape[a] for a in named):
        return None  # nothing to train
    return fields[0], fields[1]
