"""Whether gradients and parameters fit a state: one sentence with the path where they do not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sumo_optax._group import Rule, is_projected
from sumo_optax._paths import Path, PyTree, named_leaves, nodes_of, path_string
from sumo_optax._view import View

_CHECK = "; sumo_optax.check_state(state, jax.eval_shape(tx.init, params)) says what differs"


def check_state_type(state: Any, state_type: Any) -> None:
    if not isinstance(state, state_type):
        raise TypeError(
            f"the state must be the {state_type.__name__} that this optimizer's init makes, got"
            f" {type(state).__name__}; sumo_optax.convert_state converts other states"
        )


def check_gradients(updates: PyTree, held: PyTree, params: PyTree | None) -> None:
    """Against a tree of the state that is like the parameters, and the parameters' shapes."""
    is_leaf = lambda x: x is None or is_projected(x) or isinstance(x, optax.MaskedNode)
    grads, known = named_leaves(updates, is_leaf), named_leaves(held, is_leaf)
    for path, x in known.items():
        if x is not None and grads.get(path) is None:
            raise ValueError(
                f"the gradient of {path_string(path)} is {'None' if path in grads else 'missing'}:"
                " it must be an array; optax.masked and optax.partition leave parameters out"
            )
    for path, G in grads.items():
        if G is not None and known.get(path) is None:
            raise ValueError(
                f"there is a gradient of {path_string(path)}, which the state was not made for"
                f"{_CHECK}"
            )
    for path, x in named_leaves(params, is_leaf).items():
        G = grads.get(path)
        if hasattr(G, "shape") and hasattr(x, "shape") and G.shape != x.shape:
            raise ValueError(
                f"the gradient of {path_string(path)} has shape {G.shape}, the parameter {x.shape}"
            )


def trees_of(rule: Rule, fields: tuple[PyTree, ...]) -> list[PyTree]:
    """The fields of a state as trees like the parameters, one for each of the rule's arrays."""
    try:
        return rule.structure().flatten_up_to(fields)
    except ValueError as error:
        raise ValueError(f"the state is that of another inner optimizer{_CHECK}") from error


def check_matrices(
    rule: Rule, paths: list[Path], views: list[View | None], trees: list[PyTree]
) -> None:
    """Each matrix has arrays of its shape and rank, and no other leaf has any."""
    shapes = functools.cache(functools.partial(_shapes, rule))
    columns = [named_leaves(tree) for tree in trees]
    for path, view in zip(paths, views, strict=True):
        held = [tuple(column[path].shape) for column in columns if path in column]
        if (view is None) == (not held):
            of_one = lambda v: [v.batch + x for x in shapes(v.m, v.n, v.r)]
            expected = [] if view is None else of_one(view)
            if held == expected:
                continue
            raise ValueError(
                f"the state of {path_string(path)} has arrays of shapes {held}, its gradient of"
                f" shape {view and view.leaf_shape} needs {expected}: it was made for another"
                f" shape, rank or optimizer{_CHECK}"
            )
        raise ValueError(
            f"{path_string(path)} {'is not' if view is None else 'is'} a matrix here, but the"
            f" init that made the state read it as {'a' if view is None else 'no'} matrix: pass"
            " weight_dimension_numbers, for instance sumo_optax.flax_dimension_numbers(params)"
        )


def check_fallback(updates: PyTree, state: PyTree) -> None:
    """Adam's moments have the shapes of their gradients."""
    grads = named_leaves(updates)
    for adam in nodes_of(state, optax.ScaleByAdamState):
        for path, mu in named_leaves(adam.mu).items():
            if path in grads and jnp.shape(grads[path]) != mu.shape:
                raise ValueError(
                    f"the gradient of {path_string(path)} has shape {jnp.shape(grads[path])}, the"
                    f" state was made for {mu.shape}{_CHECK}"
                )


def _shapes(rule: Rule, m: int, n: int, r: int) -> list[tuple[int, ...]]:
    of_one = lambda: rule.init(m, n, r, jnp.float32, jax.random.key(0))
    return [x.shape for x in jax.tree.leaves(jax.eval_shape(of_one))]
