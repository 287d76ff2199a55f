"""A parameter leaf seen as a batch of matrices and back; lifting a one-matrix rule to a whole tree.

The only file that knows of batches, transposes, dtypes and leaves that are no matrices.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _layout
from sumo_optax._axes import (
    MatrixAxes,
    Path,
    PyTree,
    WeightDimensionNumbers,
    named_leaves,
    path_string,
    resolve,
)
from sumo_optax._gradient import ProjectedGradient, Update, WholeGradient

MATRIX, FALLBACK = "matrix", "fallback"


Side = Literal["long", "short"]


class View(NamedTuple):
    """A leaf seen as (*batch, m, n); `wide` where its own order is n before m."""

    leaf_shape: tuple[int, ...]
    batch_axes: tuple[int, ...]  # of the leaf
    m_axes: tuple[int, ...]
    n_axes: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        return self.batch_axes + self.m_axes + self.n_axes

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.leaf_shape[a] for a in self.batch_axes)

    @property
    def m(self) -> int:
        return math.prod(self.leaf_shape[a] for a in self.m_axes)

    @property
    def n(self) -> int:
        return math.prod(self.leaf_shape[a] for a in self.n_axes)

    @property
    def wide(self) -> bool:
        return self.n_axes < self.m_axes

    @property
    def stored_axes(self) -> tuple[int, ...]:
        sides = self.n_axes + self.m_axes if self.wide else self.m_axes + self.n_axes
        return self.batch_axes + sides

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        return self.as_stored(leaf).mT if self.wide else self.as_stored(leaf)

    def as_stored(self, leaf: jax.Array) -> jax.Array:
        """(*batch, m, n), where wide (*batch, n, m): most often the leaf as it is."""
        sides = (self.n, self.m) if self.wide else (self.m, self.n)
        return leaf.transpose(self.stored_axes).reshape(*self.batch, *sides)

    def to_leaf(self, stored: jax.Array) -> jax.Array:
        axes = self.stored_axes
        permuted = stored.reshape([self.leaf_shape[a] for a in axes])
        return permuted.transpose(sorted(range(len(axes)), key=lambda i: axes[i]))


def matrix_view(shape: tuple[int, ...], axes: MatrixAxes, side: Side = "long") -> View:
    """With m the long or the short side, the rows where both are as long."""
    rows, columns = axes
    size = lambda axes: math.prod(shape[a] for a in axes)
    if size(rows) != size(columns) and (size(rows) < size(columns)) == (side == "long"):
        rows, columns = columns, rows
    batch = tuple(a for a in range(len(shape)) if a not in (*rows, *columns))
    return View(shape, batch, rows, columns)


def matrix_views(
    tree: PyTree, numbers: WeightDimensionNumbers | None, side: Side = "long"
) -> list[View | None]:
    """For each leaf how it is a matrix, or None."""
    return [
        None if axes is None else matrix_view(jnp.shape(x), axes, side)
        for x, axes in zip(jax.tree.leaves(tree), resolve(numbers, tree), strict=True)
    ]


class Rule(NamedTuple):
    """An optimizer for one matrix m x n. Its state is a tuple of arrays or trees of arrays.

    init(m, n, dtype, key) -> state, a tree of one structure for all matrices
    due(t, state, place) -> bool: whether `step` refreshes; any matrix of a batch makes all of them
      do so, since under `vmap` a predicate of its own would turn `lax.cond` into doing both; place,
      from 0 to 1, is where the leaf stands among all
    step(G, state, t, due, key) -> Update, state; key() depends on the leaf and t alone
    needs_whole: what makes `step` read more of G than a `ProjectedGradient` has, "" if nothing
      does; with such a G, due is False, the Python constant
    side: which side of the matrix is m
    """

    init: Callable[..., tuple[PyTree, ...]]
    due: Callable[..., jax.Array]
    step: Callable[..., tuple[Update, tuple[PyTree, ...]]]
    needs_whole: str = ""
    side: Side = "long"


def refreshed(due: jax.Array | bool, move: Callable[[], PyTree], stay: PyTree) -> PyTree:
    """What `move` gives where a refresh is due. With a projected gradient there is no refresh."""
    return stay if due is False else jax.lax.cond(due, move, lambda: stay)


def lift(
    rule: Rule,
    state_type: Any,
    *,
    fallback: optax.GradientTransformation | None,
    weight_dimension_numbers: WeightDimensionNumbers | None,
    skip_nonfinite: bool,
    state_dtype: Any,
    seed: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that runs `rule` on the matrices of a tree, `fallback` on the rest.

    `state_type(count, *fields, fallback, skipped)` is a NamedTuple; a field is the rule's, with a
    tree like the parameters for every array: batch axes in front for a matrix, a `MaskedNode` for
    any other leaf.
    """
    fallback = optax.with_extra_args_support(
        optax.scale_by_adam() if fallback is None else fallback
    )

    def key_of(path):
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path_string(path).encode()))

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        views = matrix_views(params, weight_dimension_numbers, rule.side)
        structure, letters = _state_structure(rule)
        t = jnp.zeros([], jnp.int32)
        states = []
        for path, leaf, view in zip(named_leaves(params), leaves, views, strict=True):
            if view is None:
                continue
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            one = rule.init(view.m, view.n, dtype, jax.random.fold_in(key_of(path), t))
            one = _stacked(one, view.batch, dtype if state_dtype is None else state_dtype)
            states.append(_layout.placed(structure.flatten_up_to(one), leaf, view, letters))
        trees = []
        for i, word in enumerate(letters):
            arrays = iter(states)
            tree = treedef.unflatten(
                [optax.MaskedNode() if view is None else next(arrays)[i] for view in views]
            )
            trees.append(_layout.renamed(tree, params, views, word))
        others = fallback.init(_without_matrices(treedef, leaves, views))
        return state_type(t, *structure.unflatten(trees), others, jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_is_projected)
        shapes = treedef.unflatten(
            [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_projected(x) else x for x in leaves]
        )
        views = matrix_views(shapes, weight_dimension_numbers, rule.side)
        for path, G, view in zip(named_leaves(shapes), leaves, views, strict=True):
            _check_projected(path, G, view, rule, params)
        t = state.count
        without_matrices = lambda tree: _without_matrices(
            treedef, treedef.flatten_up_to(tree), views
        )
        grads = without_matrices(updates)
        finite = jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)) | (not skip_nonfinite), grads)
        others, fallback_state = fallback.update(
            jax.tree.map(_or_zero, finite, grads),
            state.fallback,
            None if params is None else without_matrices(params),
            **extra_args,
        )
        others = jax.tree.map(_or_zero, finite, others)
        skipped = state.skipped + sum(~ok for ok in jax.tree.leaves(finite))

        structure, letters = _state_structure(rule)
        trees = structure.flatten_up_to(tuple(state[1:-2]))
        old_states = zip(*map(jax.tree.leaves, trees), strict=True)
        outputs, states = treedef.flatten_up_to(others), []
        count = sum(view is not None for view in views)
        likes = leaves if params is None else treedef.flatten_up_to(params)
        for i, (path, G, view) in enumerate(zip(named_leaves(shapes), leaves, views, strict=True)):
            if view is None:
                continue
            place = len(states) / count
            step = functools.partial(_step_leaf, rule, structure, view, skip_nonfinite, place)
            step = _layout.in_auto_mode(step, likes[i] if _is_projected(G) else G, view, letters)
            outputs[i], new_state, bad = step(G, next(old_states), t, key_of(path))
            skipped += bad
            states.append(new_state)
        if states:
            trees = [
                jax.tree.unflatten(jax.tree.structure(tree), column)
                for tree, column in zip(trees, zip(*states, strict=True), strict=True)
            ]
        fields = structure.unflatten(trees)
        skipped = jnp.maximum(skipped, state.skipped)  # the largest number is not passed
        new_state = state_type(optax.safe_increment(t), *fields, fallback_state, skipped)
        return treedef.unflatten(outputs), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _state_structure(rule: Rule) -> tuple[Any, list[str]]:
    """The tree of a matrix's state, also where there is no matrix; and its arrays' axes."""
    probe = lambda m, n: rule.init(m, n, jnp.float32, jax.random.key(0))
    return jax.tree.structure(jax.eval_shape(lambda: probe(1, 1))), _layout.along(probe)


def _step_leaf(
    rule: Rule, structure, view: View, skip_nonfinite: bool, place: float, G, state, t, key
):
    """A step of a leaf: the update, the arrays of its state, and how many matrices were skipped."""
    dtype = jnp.promote_types(G.dtype, jnp.float32)
    old = structure.unflatten(state)
    if _is_projected(G):  # which is of a matrix with m >= n
        shape = max(view.m, view.n), min(view.m, view.n)
        matrices = dataclasses.replace(_cast(G, dtype), shape=shape)
        matrices = matrices if view.m >= view.n else matrices.T
    else:
        matrices = WholeGradient(view.as_stored(G.astype(dtype)), view.wide)
    step = functools.partial(_step_batch, rule, view, skip_nonfinite, place)
    D, new, bad = step(matrices, _cast(old, dtype), t, key)
    new = jax.tree.map(lambda x, o: x.astype(o.dtype), new, old)
    return view.to_leaf(D).astype(G.dtype), jax.tree.leaves(new), jnp.sum(bad, dtype=jnp.int32)


def _is_projected(x: Any) -> bool:
    return isinstance(x, ProjectedGradient)


def _check_projected(path: Path, G: Any, view: Any, rule: Rule, params: PyTree) -> None:
    if not _is_projected(G):
        return
    where = f"the gradient of {path_string(path)} is projected,"
    if view is None:
        raise ValueError(f"{where} but by weight_dimension_numbers that is no matrix")
    if rule.needs_whole:
        raise ValueError(f"{where} but {rule.needs_whole} needs whole gradients")
    if params is None:
        raise ValueError(f"{where} and so `update` needs the parameters")


def _stacked(tree: PyTree, batch: tuple[int, ...], dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, batch + x.shape), _cast(tree, dtype))


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point arrays as `dtype`; counters as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _step_batch(rule: Rule, view: View, skip_nonfinite: bool, place: float, G, state, t, key):
    """A step of every matrix of a leaf, D or Dᵀ; and which were skipped, their state not finite.

    A NaN or Inf anywhere in G makes it not so, since QᵀG and the like read all of G: a look at the
    small state is a look at G. 0 times NaN or Inf is NaN; a sum is faster than a logical reduction.
    """
    due = lambda *state: rule.due(t, state, place)

    def step(G, *old):
        D, new = rule.step(G, old, t, any_due, lambda: jax.random.fold_in(key, t))
        if not skip_nonfinite:
            return D.of(G, transposed=view.wide), new, jnp.zeros([], bool)
        good = jnp.all(jnp.stack([jnp.sum(0 * x) for x in jax.tree.leaves(new)]) == 0)
        # Or the compiler may multiply all updates out first, and keep them till it knows.
        D = D._replace(right=_or_zero(good, D.right)).of(G, transposed=view.wide)
        new = jax.tree.map(lambda x, o: jnp.where(good, x, o), new, old)
        return _or_zero(good, D), new, ~good

    for _ in view.batch_axes:
        due, step = jax.vmap(due), _for_each(step)
    any_due = False if _is_projected(G) else jnp.any(due(*state))
    return step(G, *state)


def _for_each(step: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`step` over the first axis of its arguments.

    On one CPU as a loop: no slower there, while XLA (jaxlib 0.10) can stop for good in a program
    with several batched products, all of its threads waiting for each other.
    """
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        return lambda *arguments: jax.lax.map(lambda one: step(*one), arguments)
    return jax.vmap(step)


def _or_zero(good: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(good, x, jnp.zeros_like(x))


def _without_matrices(treedef, leaves, views) -> PyTree:
    return treedef.unflatten(
        [x if v is None else optax.MaskedNode() for x, v in zip(leaves, views, strict=True)]
    )


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
