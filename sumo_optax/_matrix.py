"""A parameter leaf seen as a batch of matrices and back; lifting a one-matrix rule to a whole tree.

The only file that knows of batches, transposes, dtypes and leaves that are no matrices.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax._axes import (
    MatrixAxes,
    PyTree,
    WeightDimensionNumbers,
    named_leaves,
    path_string,
    resolve,
)

MATRIX, FALLBACK = "matrix", "fallback"


class View(NamedTuple):
    """A leaf seen as (*batch, m, n) with m >= n."""

    leaf_shape: tuple[int, ...]
    axes: tuple[int, ...]  # permutation of the leaf's axes: batch, then rows, then columns
    batch: tuple[int, ...]
    m: int
    n: int

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        return leaf.transpose(self.axes).reshape(*self.batch, self.m, self.n)

    def to_leaf(self, matrices: jax.Array) -> jax.Array:
        permuted = tuple(self.leaf_shape[a] for a in self.axes)
        return matrices.reshape(permuted).transpose(
            sorted(range(len(permuted)), key=lambda i: self.axes[i])
        )


def matrix_view(shape: tuple[int, ...], axes: MatrixAxes) -> View:
    rows, columns = axes
    size = lambda axes: math.prod(shape[a] for a in axes)
    if size(rows) < size(columns):
        rows, columns = columns, rows
    batch = tuple(a for a in range(len(shape)) if a not in (*rows, *columns))
    return View(
        shape, (*batch, *rows, *columns), tuple(shape[a] for a in batch), size(rows), size(columns)
    )


class Rule(NamedTuple):
    """An optimizer for one matrix m x n, m >= n. Its state is a tuple of arrays.

    init(m, n, dtype, key) -> state
    due(t, state) -> bool: whether `step` refreshes; any matrix of a batch makes all of them do so,
      since under `vmap` a predicate of its own would turn `lax.cond` into doing both
    step(G, state, t, due, key) -> D, state; key depends on the leaf and t alone
    """

    init: Callable[..., tuple[jax.Array, ...]]
    due: Callable[..., jax.Array]
    step: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def lift(
    rule: Rule,
    state_type: Any,
    *,
    fallback: optax.GradientTransformation,
    weight_dimension_numbers: WeightDimensionNumbers | None,
    state_dtype: Any,
    seed: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that runs `rule` on the matrices of a tree, `fallback` on the rest.

    `state_type(count, *fields, fallback)` is a NamedTuple; each field is a tree like the parameters
    with one array of the rule's state, batch axes in front, for a matrix and a
    `MaskedNode` for any other leaf.
    """
    fallback = optax.with_extra_args_support(fallback)
    keep = lambda x, dtype: x.astype(dtype if state_dtype is None else state_dtype)

    def key_of(path, t):
        leaf = zlib.crc32(path_string(path).encode())
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), leaf), t)

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        specs = resolve(weight_dimension_numbers, params)
        t = jnp.zeros([], jnp.int32)
        states = []
        for path, leaf, spec in zip(named_leaves(params), leaves, specs, strict=True):
            if spec is None:
                continue
            view = matrix_view(jnp.shape(leaf), spec)
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            one = rule.init(view.m, view.n, dtype, key_of(path, t))
            states.append([keep(jnp.broadcast_to(x, view.batch + x.shape), dtype) for x in one])
        fields = _unzip(treedef, specs, states, count=len(state_type._fields) - 2)
        return state_type(t, *fields, fallback.init(_without_matrices(treedef, leaves, specs)))

    def update(updates, state, params=None, **extra_args):
        leaves, treedef = jax.tree.flatten(updates)
        specs = resolve(weight_dimension_numbers, updates)
        t = state.count
        columns = [treedef.flatten_up_to(field) for field in state[1:-1]]
        outputs, states = list(leaves), []
        for i, (path, leaf, spec) in enumerate(
            zip(named_leaves(updates), leaves, specs, strict=True)
        ):
            if spec is None:
                continue
            view = matrix_view(jnp.shape(leaf), spec)
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            old = tuple(column[i] for column in columns)
            matrices = view.to_matrices(leaf.astype(dtype))
            one = tuple(x.astype(dtype) for x in old)
            D, new = _step_batch(rule, matrices, one, t, key_of(path, t))
            outputs[i] = view.to_leaf(D).astype(leaf.dtype)
            states.append([x.astype(o.dtype) for x, o in zip(new, old, strict=True)])
        fields = _unzip(treedef, specs, states, count=len(columns))
        others, fallback_state = fallback.update(
            _without_matrices(treedef, leaves, specs),
            state.fallback,
            None
            if params is None
            else _without_matrices(treedef, treedef.flatten_up_to(params), specs),
            **extra_args,
        )
        others = treedef.flatten_up_to(others)
        outputs = [
            o if s is not None else x for o, x, s in zip(outputs, others, specs, strict=True)
        ]
        count = optax.safe_increment(t)
        return treedef.unflatten(outputs), state_type(count, *fields, fallback_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _step_batch(rule: Rule, G: jax.Array, state, t, key):
    batch_axes = G.ndim - 2
    due = lambda *state: rule.due(t, state)
    step = lambda G, *state: rule.step(G, state, t, any_due, key)
    for _ in range(batch_axes):
        due, step = jax.vmap(due), jax.vmap(step)
    any_due = jnp.any(due(*state))
    return step(G, *state)


def _without_matrices(treedef, leaves, specs) -> PyTree:
    return treedef.unflatten(
        [x if s is None else optax.MaskedNode() for x, s in zip(leaves, specs, strict=True)]
    )


def _unzip(treedef, specs, states, count: int) -> list[PyTree]:
    """The states of the matrices, in order, as one tree for every field."""
    fields = []
    for field in range(count):
        arrays = iter(states)
        fields.append(
            treedef.unflatten(
                [optax.MaskedNode() if s is None else next(arrays)[field] for s in specs]
            )
        )
    return fields


def descend(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    weight_decay_mask: Any,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    adam_weight_decay: jax.typing.ArrayLike,
    weight_dimension_numbers: WeightDimensionNumbers | None,
) -> optax.GradientTransformationExtraArgs:
    """Decoupled weight decay and learning rate, for matrices and for the fallback's leaves."""

    def labels(params):
        treedef = jax.tree.structure(params)
        specs = resolve(weight_dimension_numbers, params)
        return treedef.unflatten([FALLBACK if s is None else MATRIX for s in specs])

    part = lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay, weight_decay_mask), optax.scale_by_learning_rate(rate)
    )
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return optax.partition(
        {MATRIX: part(learning_rate, weight_decay), FALLBACK: part(adam_rate, adam_weight_decay)},
        labels,
    )
