"""A rule for a stack of matrices made a transformation of a tree.

The only file that knows of leaves that are no matrices.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check, _fit, _layout
from sumo_optax._axes import WeightDimensionNumbers, advise, resolve
from sumo_optax._group import (
    Rule,
    cast,
    group_step,
    groups_of,
    hash_of,
    is_projected,
    or_zero,
)
from sumo_optax._linalg import wide
from sumo_optax._measured import MeasuredState, measured
from sumo_optax._paths import Path, PyTree, named_leaves, path_string, whole_of
from sumo_optax._quantize import bits_of, in_few_bits
from sumo_optax._rank import check_rank, with_ranks
from sumo_optax._view import View, matrix_views

# The arguments of `matrix_transformation` that every optimizer has.
_OF_TREE = (
    "fallback",
    "weight_dimension_numbers",
    "skip_nonfinite",
    "state_dtype",
    "metrics",
    "seed",
)


def of_tree(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of an optimizer's arguments those that are not its rule's."""
    return {name: arguments[name] for name in _OF_TREE}


def matrix_transformation(
    rule: Rule,
    state_type: Any,
    *,
    fallback: optax.GradientTransformation | None,
    weight_dimension_numbers: WeightDimensionNumbers | None,
    skip_nonfinite: bool,
    state_dtype: Any,
    metrics: bool,
    seed: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that runs `rule` on the matrices of a tree, `fallback` on the rest.

    `state_type(count, *fields, fallback, skipped)` is a NamedTuple; a field is the rule's, with a
    tree like the parameters for every array: batch axes in front for a matrix, a `MaskedNode` for
    any other leaf. With `metrics` it is the `inner` of a `MeasuredState`.
    """
    check_rank(rule.rank)
    rule, dtype = _with_state(rule, state_dtype, metrics)
    others = optax.scale_by_adam() if fallback is None else fallback
    _check.transformation("fallback", others, or_else="None")
    _check.seed(seed)
    others = optax.with_extra_args_support(others)

    def views_of(tree):
        views = matrix_views(tree, weight_dimension_numbers, rule.side)
        return with_ranks(views, rule.rank, tree)

    def init(params):
        _check.arrays("params", params, numbers=True)
        advise(weight_dimension_numbers, params)
        views = views_of(params)
        fields = _initial_fields(rule, params, views, dtype, jax.random.key(seed))
        leaves, treedef = jax.tree.flatten(params)
        of_others = others.init(_without_matrices(treedef, leaves, views))
        count, skipped = (jnp.zeros([], jnp.int32) for _ in range(2))  # each may be donated
        return _packed(state_type, metrics, count, fields, of_others, skipped)

    def update(updates, state, params=None, **extra_args):
        count, fields, of_others, skipped = _unpacked(state_type, metrics, state)
        trees = _fit.trees_of(rule, fields)
        _fit.check_gradients(updates, trees[0], params)
        grads = _Gradients.of(updates, views_of)
        grads.check(rule, trees, params)
        rest = grads.without_matrices(updates)
        _fit.check_fallback(rest, of_others)
        finite = jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)) | (not skip_nonfinite), rest)
        rest, of_others = others.update(
            jax.tree.map(or_zero, finite, rest),
            of_others,
            None if params is None else grads.without_matrices(params),
            **extra_args,
        )
        rest = jax.tree.map(or_zero, finite, rest)
        so_far = skipped + sum((~ok).astype(jnp.int32) for ok in jax.tree.leaves(finite))
        phases = _phases(weight_dimension_numbers, grads.shapes) if rule.stagger else {}
        Ds, trees, so_far = _matrices_step(
            rule, grads, trees, phases, count, jax.random.key(seed), so_far, skip_nonfinite
        )
        so_far = jnp.maximum(so_far, skipped)  # the largest number is not passed
        fields = rule.structure().unflatten(trees)
        count = optax.safe_increment(count)
        new_state = _packed(state_type, metrics, count, fields, of_others, so_far)
        return grads.with_matrices(rest, Ds), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _with_state(rule: Rule, dtype: Any, metrics: bool) -> tuple[Rule, Any]:
    """The rule with a state as asked for, and the dtype of arrays that it says nothing of."""
    _check.state_dtype(dtype)
    rule = measured(rule) if metrics else rule
    bits = bits_of(dtype)
    return (rule, dtype) if bits is None else (in_few_bits(rule, bits), None)


def _packed(
    state_type: Any, metrics: bool, count: Any, fields: tuple[PyTree, ...], others: Any, bad: Any
) -> Any:
    """A state, with the three last fields of its rule around it where these are metrics."""
    own, kept = (fields[:-3], fields[-3:]) if metrics else (fields, ())
    state = state_type(count, *own, others, bad)
    return MeasuredState(state, *kept) if metrics else state


def _unpacked(
    state_type: Any, metrics: bool, state: Any
) -> tuple[jax.Array, tuple[PyTree, ...], Any, jax.Array]:
    _fit.check_state_type(state, MeasuredState if metrics else state_type)
    inner, *kept = state if metrics else (state,)
    _fit.check_state_type(inner, state_type)
    count, *own, others, skipped = inner
    return count, (*own, *kept), others, skipped


def _initial_fields(
    rule: Rule, params: PyTree, views: list[View | None], state_dtype: Any, key: jax.Array
) -> tuple[PyTree, ...]:
    """Those of a state, where the parameters say that they lie."""
    treedef = jax.tree.structure(params)
    states, words = [], []
    for (path, leaf), view in zip(named_leaves(params).items(), views, strict=True):
        if view is None:
            states.append(None)
            words.append(None)
            continue
        _check_real_floating(path, leaf)
        dtype = wide(leaf.dtype)
        key_of_leaf = jax.random.fold_in(jax.random.fold_in(key, hash_of(path)), 0)
        one = rule.init(view.m, view.n, view.r, dtype, key_of_leaf)
        one = _stacked(one, view.batch, dtype if state_dtype is None else state_dtype)
        words.append(rule.axis_names(view))
        states.append(_layout.placed(jax.tree.leaves(one), leaf, view, words[-1]))
    trees = []
    for i in range(rule.structure().num_leaves):
        of_leaf = lambda x, i=i: optax.MaskedNode() if x is None else x[i]
        names = ["" if x is None else x[i] for x in words]
        tree = treedef.unflatten(list(map(of_leaf, states)))
        trees.append(_layout.renamed(tree, params, views, names))
    return rule.structure().unflatten(trees)


class _Gradients(NamedTuple):
    """The leaves of a tree of gradients, whole or projected, and how each is seen."""

    treedef: Any
    paths: list[Path]
    leaves: list[Any]
    views: list[View | None]
    shapes: PyTree  # like the parameters

    @classmethod
    def of(cls, updates: PyTree, views_of: Any) -> "_Gradients":
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_projected)
        shapes = treedef.unflatten(
            [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_projected(x) else x for x in leaves]
        )
        return cls(treedef, list(named_leaves(shapes)), leaves, views_of(shapes), shapes)

    def check(self, rule: Rule, trees: list[PyTree], params: PyTree) -> None:
        for path, G, view in zip(self.paths, self.leaves, self.views, strict=True):
            _check_projected(path, G, view, params)
        _fit.check_matrices(rule, self.paths, self.views, trees)

    def without_matrices(self, tree: PyTree) -> PyTree:
        return _without_matrices(self.treedef, self.treedef.flatten_up_to(tree), self.views)

    def matrices(self) -> list[tuple[Path, Any, View]]:
        each = zip(self.paths, self.leaves, self.views, strict=True)
        return [(path, _at_least_bfloat16(G), view) for path, G, view in each if view is not None]

    def with_matrices(self, others: PyTree, Ds: list[jax.Array]) -> PyTree:
        """The updates of all leaves, in the gradients' dtypes."""
        outputs = self.treedef.flatten_up_to(others)
        matrices = [i for i, view in enumerate(self.views) if view is not None]
        for i, D in zip(matrices, Ds, strict=True):
            outputs[i] = D.astype(self.leaves[i].dtype)
        return self.treedef.unflatten(outputs)


def _matrices_step(
    rule: Rule,
    grads: _Gradients,
    trees: list[PyTree],
    phases: dict[Path, float],
    t: jax.Array,
    key: jax.Array,
    skipped: jax.Array,
    skip_nonfinite: bool,
) -> tuple[list[jax.Array], list[PyTree], jax.Array]:
    """Updates of the matrices, their new state, and how many updates were skipped so far."""
    matrices = grads.matrices()
    columns = [jax.tree.leaves(tree) for tree in trees]
    if rule.whole:
        sizes = [math.prod(leaf.shape) for _, leaf, _ in matrices]
    else:
        sizes = [rule.packed * max(x.size for x in arrays) for arrays in zip(*columns, strict=True)]
    # pyrefly: ignore [missing-attribute]
    precision = jax.config.jax_default_matmul_precision or "default"
    updates: list[Any] = [None] * len(matrices)
    for group in groups_of(rule, matrices, sizes, phases):
        paths, leaves, views = map(list, zip(*(matrices[k] for k in group.members), strict=True))
        old = [[column[k] for k in group.members] for column in columns]
        step = group_step(rule, group, paths, views, skip_nonfinite, precision)
        step = _layout.in_auto_mode(step, leaves, old)
        # The state is not made ready before there are gradients.
        old, leaves = jax.lax.optimization_barrier((old, leaves))
        if not group.layer:  # groups of all layers go one after the other
            old, skipped = jax.lax.optimization_barrier((old, skipped))
        Ds, new, bad = jax.lax.optimization_barrier(step(leaves, old, t, key))
        skipped += bad
        for j, k in enumerate(group.members):
            updates[k] = Ds[j]
            for column, arrays in zip(columns, new, strict=True):
                column[k] = arrays[j]
    of_tree = zip(trees, columns, strict=True)
    return updates, [jax.tree.structure(x).unflatten(column) for x, column in of_tree], skipped


def _phases(numbers: WeightDimensionNumbers | None, tree: PyTree) -> dict[Path, float]:
    """Of each matrix from 0 to 1, by its place among those of the whole tree."""
    whole = whole_of(tree)
    axes = resolve(numbers, whole)
    matrices = [path for path, spec in zip(named_leaves(whole), axes, strict=True) if spec]
    return {path: k / len(matrices) for k, path in enumerate(matrices)}


def _check_projected(path: Path, G: Any, view: View | None, params: PyTree) -> None:
    if not is_projected(G):
        return
    where = f"the gradient of {path_string(path)} is projected,"
    if view is None:
        raise ValueError(f"{where} but weight_dimension_numbers has no matrix there")
    if params is None:
        raise ValueError(f"{where} so `update` needs the parameters")


def _check_real_floating(path: Path, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
            f"the matrix {path_string(path)} must be real, got {leaf.dtype}: wrap the optimizer in"
            " optax.contrib.split_real_and_imaginary, or give the leaf to the fallback by"
            " weight_dimension_numbers"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"the matrix {path_string(path)} must be floating-point, got {leaf.dtype}:"
            " optax.masked and optax.partition leave parameters out"
        )


def _at_least_bfloat16(G: Any) -> Any:
    """JAX's 8-bit floats do not mix with others; bfloat16 holds all of their numbers."""
    small = jnp.issubdtype(G.dtype, jnp.floating) and jnp.finfo(G.dtype).bits < 16
    return G.astype(jnp.bfloat16) if small and not is_projected(G) else G


def _stacked(tree: PyTree, batch: tuple[int, ...], dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, batch + x.shape), cast(tree, dtype))


def _without_matrices(treedef: Any, leaves: list[Any], views: list[View | None]) -> PyTree:
    return treedef.unflatten(
        [x if v is None else optax.MaskedNode() for x, v in zip(leaves, views, strict=True)]
    )
