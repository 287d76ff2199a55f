"""Leaves grouped into stacks of matrices; a rule for a stack made a transformation of a tree.

The only file that knows of groups, orientation, dtypes and leaves that are no matrices.
"""

import functools
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from sumo_optax._gradient import (
    ProjectedGradient,
    ProjectedGradients,
    Update,
    WholeGradients,
    pieces_of,
    shaped,
    stack_of,
)
from sumo_optax._linalg import at_least_float32, choose

MATRIX, FALLBACK = "matrix", "fallback"

# Numbers in the state of a group, of which a step holds several times as many for a moment.
_LARGEST_STACK = 2**26


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
        return shaped(leaf.transpose(self.stored_axes), (*self.batch, *sides))

    def to_leaf(self, stored: jax.Array) -> jax.Array:
        axes = self.stored_axes
        permuted = shaped(stored, [self.leaf_shape[a] for a in axes])
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
    """An optimizer for a stack of B matrices m x n. Its state is a tuple of trees of arrays.

    init(m, n, dtype, key) -> the state of one matrix
    due(t, state, phase) -> (B,): which matrices have a new basis in this step
    step(G, state, t, due, keys) -> Update, state; due is None where G is projected, which allows no
      new basis; keys() gives (B,) keys that depend on the leaf and t alone
    axes(m, n) -> a tree like the state with the names of each array's axes, as "mr" or "rn"
    side: which side of the matrix is m
    stagger: whether leaves have a phase, from 0 to 1, each; else it is 0
    """

    init: Callable[..., tuple[PyTree, ...]]
    due: Callable[..., jax.Array]
    step: Callable[..., tuple[Update, tuple[PyTree, ...]]]
    axes: Callable[[int, int], tuple[PyTree, ...]]
    side: Side = "long"
    stagger: bool = False

    def words(self, view: View) -> list[str]:
        return jax.tree.leaves(self.axes(view.m, view.n))

    def structure(self) -> Any:
        """Of a state, also where there is no matrix."""
        return jax.tree.structure(self.axes(1, 1))


class Group(NamedTuple):
    """Leaves whose matrices are one stack."""

    view: View
    dtype: jnp.dtype
    projected: bool
    phase: float
    spec: jax.sharding.PartitionSpec | None  # on a mesh with explicit axes
    role: str  # where the compiler shards
    members: list[int]  # among the matrices of the tree


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

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        views = matrix_views(params, weight_dimension_numbers, rule.side)
        key = jax.random.key(seed)
        states, words = [], []
        for path, leaf, view in zip(named_leaves(params), leaves, views, strict=True):
            if view is None:
                states.append(None)
                words.append(None)
                continue
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            key_of_leaf = jax.random.fold_in(jax.random.fold_in(key, _hash(path)), 0)
            one = rule.init(view.m, view.n, dtype, key_of_leaf)
            one = _stacked(one, view.batch, dtype if state_dtype is None else state_dtype)
            words.append(rule.words(view))
            states.append(_layout.placed(jax.tree.leaves(one), leaf, view, words[-1]))
        trees = []
        for i in range(rule.structure().num_leaves):
            of_leaf = lambda x, i=i: optax.MaskedNode() if x is None else x[i]
            tree = treedef.unflatten(list(map(of_leaf, states)))
            names = ["" if x is None else x[i] for x in words]
            trees.append(_layout.renamed(tree, params, views, names))
        others = fallback.init(_without_matrices(treedef, leaves, views))
        t = jnp.zeros([], jnp.int32)
        return state_type(t, *rule.structure().unflatten(trees), others, jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_is_projected)
        shapes = treedef.unflatten(
            [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_projected(x) else x for x in leaves]
        )
        paths = list(named_leaves(shapes))
        views = matrix_views(shapes, weight_dimension_numbers, rule.side)
        for path, G, view in zip(paths, leaves, views, strict=True):
            _check_projected(path, G, view, params)
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

        outputs = treedef.flatten_up_to(others)
        trees = rule.structure().flatten_up_to(tuple(state[1:-2]))
        columns = [jax.tree.leaves(tree) for tree in trees]
        matrices = [i for i, view in enumerate(views) if view is not None]
        key = jax.random.key(seed)
        # pyrefly: ignore [missing-attribute]
        precision = jax.config.jax_default_matmul_precision or "default"
        of = lambda things, group: [things[matrices[k]] for k in group.members]
        members = [(paths[i], leaves[i], views[i]) for i in matrices]
        sizes = [sum(x.size for x in arrays) for arrays in zip(*columns, strict=True)]
        for group in _groups(rule, members, sizes):
            step = _group_step(rule, group, of(paths, group), skip_nonfinite, precision)
            words, leaves_of_group = rule.words(group.view), of(leaves, group)
            step = _layout.in_auto_mode(step, group.spec, group.view, words, len(group.members))
            old = [[column[k] for k in group.members] for column in columns]
            # One group after the other, since each has stacks of its own to hold.
            old, skipped = jax.lax.optimization_barrier((old, skipped))
            Ds, new, bad = jax.lax.optimization_barrier(
                step(leaves_of_group, old, state.count, key)
            )
            skipped += bad
            for j, k in enumerate(group.members):
                outputs[matrices[k]] = Ds[j]
                for column, arrays in zip(columns, new, strict=True):
                    column[k] = arrays[j]
        trees = [
            jax.tree.unflatten(jax.tree.structure(tree), column)
            for tree, column in zip(trees, columns, strict=True)
        ]
        fields = rule.structure().unflatten(trees)
        skipped = jnp.maximum(skipped, state.skipped)  # the largest number is not passed
        new_state = state_type(optax.safe_increment(state.count), *fields, fallback_state, skipped)
        return treedef.unflatten(outputs), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _groups(rule: Rule, matrices: list[tuple[Path, Any, Any]], sizes: list[int]) -> list[Group]:
    """Leaves of one shape go together where they lie alike on any mesh, up to a size of state.

    With explicit axes their types say so. Where the compiler alone shards, leaves of one role do:
    those whose paths are the same but for numbers of layers.
    """
    groups: dict[tuple, Group] = {}
    counts: Counter[tuple] = Counter()
    for k, (path, G, view) in enumerate(matrices):
        [array, *_] = jax.tree.leaves(G)
        spec = _layout.explicit_spec(array)
        role = re.sub(r"\d+", "*", path_string(path)) if _layout.compiler_shards(array) else ""
        phase = k / len(matrices) if rule.stagger else 0.0
        traits = (view, G.dtype, _is_projected(G), phase, spec, role)
        before = counts[traits]
        counts[traits] += 1
        part = before // max(1, _LARGEST_STACK // max(1, sizes[k]))
        groups.setdefault((traits, part), Group(*traits, [])).members.append(k)
    return list(groups.values())


def _group_step(
    rule: Rule, group: Group, paths: list[Path], skip_nonfinite: bool, precision: Any
) -> Callable[..., tuple[list[jax.Array], list[list[jax.Array]], jax.Array]]:
    """A step of a group: updates, new states, and how many matrices were skipped.

    A matrix whose state would not be finite is skipped. A NaN or Inf anywhere in G makes it so,
    since QᵀG and the like read all of G: a look at the small state is a look at G.
    """
    view = group.view
    batches = [view.batch or (1,)] * len(paths)
    hashes = np.repeat([_hash(path) for path in paths], math.prod(view.batch))

    def step(leaves, states, t, key):
        G = (_projected if group.projected else _whole)(view, leaves, batches, precision, paths)
        dtype = jnp.promote_types(group.dtype, jnp.float32)
        stacks = [_cast(stack_of(arrays, axes=len(view.batch)), dtype) for arrays in states]
        old = rule.structure().unflatten(stacks)
        key_of = lambda path_hash: jax.random.fold_in(jax.random.fold_in(key, path_hash), t)
        keys = lambda: jax.vmap(key_of)(hashes)
        # Small matrices want full float32 products, which GPUs and TPUs do not give by default.
        with jax.default_matmul_precision("highest"):
            due = None if group.projected else rule.due(t, old, group.phase)
            D, new = rule.step(G, old, t, due, keys)
        good, bad = None, jnp.zeros([], jnp.int32)
        if skip_nonfinite:
            good = _are_finite(new)
            new, bad = choose(good, new, old), jnp.sum(~good, dtype=jnp.int32)
            good = good[:, None, None]
            # Or the compiler may multiply all updates out first, and keep them till it knows.
            D = D._replace(right=_or_zero(good, D.right))
        outputs = [view.to_leaf(x) for x in G.updates(D, good)]
        new_states = [
            [shaped(x, o.shape).astype(o.dtype) for x, o in zip(pieces, arrays, strict=True)]
            for pieces, arrays in zip(
                (pieces_of(stack, batches) for stack in jax.tree.leaves(new)), states, strict=True
            )
        ]
        return outputs, new_states, bad

    return step


def _whole(view: View, leaves, batches, precision, paths) -> WholeGradients:
    matrices = [view.as_stored(G) for G in leaves]
    stored = [shaped(G, (*batches[0], *G.shape[-2:])) for G in matrices]
    return WholeGradients(batches, view.wide, stored[0].dtype, precision, stored)


def _projected(view: View, leaves, batches, precision, paths) -> ProjectedGradients:
    """Those that are held are of matrices with m >= n."""
    stack = lambda arrays: (
        None if arrays[0] is None else at_least_float32(stack_of(arrays, axes=len(view.batch)))
    )
    left, right = stack([G.left for G in leaves]), stack([G.right for G in leaves])
    if view.m < view.n:
        turned = lambda x: None if x is None else x.mT
        left, right = turned(right), turned(left)
    where, shape = path_string(paths[0]), (view.m, view.n)
    return ProjectedGradients(
        batches, view.wide, leaves[0].dtype, precision, left, right, shape, where
    )


def _hash(path: Path) -> np.uint32:
    return np.uint32(zlib.crc32(path_string(path).encode()))


def _are_finite(state: PyTree) -> jax.Array:
    """Of which matrices a state is, (B,): 0 times NaN or Inf is NaN, and a sum is fast."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    sums = [jnp.sum(0 * x, axis=tuple(range(1, x.ndim))) for x in floats]
    return functools.reduce(jnp.add, sums) == 0


def _is_projected(x: Any) -> bool:
    return isinstance(x, ProjectedGradient)


def _check_projected(path: Path, G: Any, view: View | None, params: PyTree) -> None:
    if not _is_projected(G):
        return
    where = f"the gradient of {path_string(path)} is projected,"
    if view is None:
        raise ValueError(f"{where} but by weight_dimension_numbers that is no matrix")
    if params is None:
        raise ValueError(f"{where} and so `update` needs the parameters")


def _stacked(tree: PyTree, batch: tuple[int, ...], dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, batch + x.shape), _cast(tree, dtype))


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point arrays as `dtype`; counters as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


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
