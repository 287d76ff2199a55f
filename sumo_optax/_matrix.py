"""A rule for a stack of matrices made a transformation of a tree.

The only file that knows of leaves that are no matrices.
"""

import math
from typing import Any

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
from sumo_optax._paths import Path, PyTree, named_leaves, path_string, whole_of
from sumo_optax._quantize import bits_of, in_few_bits
from sumo_optax._rank import check_rank, with_ranks
from sumo_optax._view import View, matrix_views

MATRIX, FALLBACK = "matrix", "fallback"


def matrix_transformation(
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
    check_rank(rule.rank)
    _check.state_dtype(state_dtype)
    if fallback is not None:
        _check.transformation("fallback", fallback, or_else="None")
    bits = bits_of(state_dtype)
    if bits is not None:
        rule, state_dtype = in_few_bits(rule, bits), None
    fallback = optax.with_extra_args_support(
        optax.scale_by_adam() if fallback is None else fallback
    )

    def views_of(tree):
        views = matrix_views(tree, weight_dimension_numbers, rule.side)
        return with_ranks(views, rule.rank, tree)

    def init(params):
        _check.arrays("params", params, numbers=True)
        leaves, treedef = jax.tree.flatten(params)
        advise(weight_dimension_numbers, params)
        views = views_of(params)
        key = jax.random.key(seed)
        states, words = [], []
        for path, leaf, view in zip(named_leaves(params), leaves, views, strict=True):
            if view is None:
                states.append(None)
                words.append(None)
                continue
            _check_real(path, leaf)
            dtype = wide(leaf.dtype)
            key_of_leaf = jax.random.fold_in(jax.random.fold_in(key, hash_of(path)), 0)
            one = rule.init(view.m, view.n, view.r, dtype, key_of_leaf)
            one = _stacked(one, view.batch, dtype if state_dtype is None else state_dtype)
            words.append(rule.axis_names(view))
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
        _fit.check_state_type(state, state_type)
        trees = _fit.trees_of(rule, state)
        _fit.check_gradients(updates, trees[0], params)
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_projected)
        shapes = treedef.unflatten(
            [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_projected(x) else x for x in leaves]
        )
        paths = list(named_leaves(shapes))
        views = views_of(shapes)
        for path, G, view in zip(paths, leaves, views, strict=True):
            _check_projected(path, G, view, params)
        _fit.check_matrices(rule, paths, views, trees)
        without_matrices = lambda tree: _without_matrices(
            treedef, treedef.flatten_up_to(tree), views
        )
        grads = without_matrices(updates)
        _fit.check_fallback(grads, state.fallback)
        finite = jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)) | (not skip_nonfinite), grads)
        others, fallback_state = fallback.update(
            jax.tree.map(or_zero, finite, grads),
            state.fallback,
            None if params is None else without_matrices(params),
            **extra_args,
        )
        others = jax.tree.map(or_zero, finite, others)
        skipped = state.skipped + sum((~ok).astype(jnp.int32) for ok in jax.tree.leaves(finite))

        outputs = treedef.flatten_up_to(others)
        columns = [jax.tree.leaves(tree) for tree in trees]
        matrices = [i for i, view in enumerate(views) if view is not None]
        key = jax.random.key(seed)
        # pyrefly: ignore [missing-attribute]
        precision = jax.config.jax_default_matmul_precision or "default"
        of = lambda things, group: [things[matrices[k]] for k in group.members]
        given = [leaves[i].dtype for i in matrices]
        for i in matrices:
            if not is_projected(leaves[i]):
                leaves[i] = leaves[i].astype(_at_least_bfloat16(leaves[i].dtype))
        members = [(paths[i], leaves[i], views[i]) for i in matrices]
        largest = lambda arrays: rule.packed * max(x.size for x in arrays)
        sizes = [largest(arrays) for arrays in zip(*columns, strict=True)]
        if rule.whole:
            sizes = [math.prod(leaf.shape) for _, leaf, _ in members]
        phases = _phases(weight_dimension_numbers, shapes) if rule.stagger else {}
        for group in groups_of(rule, members, sizes, phases):
            views_of_group, leaves_of_group = of(views, group), of(leaves, group)
            step = group_step(
                rule, group, of(paths, group), views_of_group, skip_nonfinite, precision
            )
            old = [[column[k] for k in group.members] for column in columns]
            step = _layout.in_auto_mode(step, leaves_of_group, old)
            # The state is not made ready before there are gradients.
            old, leaves_of_group = jax.lax.optimization_barrier((old, leaves_of_group))
            if not group.layer:  # groups of all layers go one after the other
                old, skipped = jax.lax.optimization_barrier((old, skipped))
            Ds, new, bad = jax.lax.optimization_barrier(
                step(leaves_of_group, old, state.count, key)
            )
            skipped += bad
            for j, k in enumerate(group.members):
                outputs[matrices[k]] = Ds[j].astype(given[k])
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


def _check_real(path: Path, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
            f"the matrix {path_string(path)} must be real, got {leaf.dtype}: wrap the optimizer in"
            " optax.contrib.split_real_and_imaginary, or give the leaf to the fallback by"
            " weight_dimension_numbers"
        )


def _at_least_bfloat16(dtype: Any) -> Any:
    """JAX's 8-bit floats do not mix with others; bfloat16 holds all of their numbers."""
    small = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16
    return jnp.bfloat16 if small else dtype


def _stacked(tree: PyTree, batch: tuple[int, ...], dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, batch + x.shape), cast(tree, dtype))


def _without_matrices(treedef, leaves, views) -> PyTree:
    return treedef.unflatten(
        [x if v is None else optax.MaskedNode() for x, v in zip(leaves, views, strict=True)]
    )


def decay_and_scale(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    weight_decay_mask: Any,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    adam_weight_decay: jax.typing.ArrayLike,
    weight_dimension_numbers: WeightDimensionNumbers | None,
) -> optax.GradientTransformationExtraArgs:
    """Decoupled weight decay and learning rate, for matrices and for the fallback's leaves."""

    _check.scheduled("learning_rate", learning_rate)
    _check.scheduled("adam_learning_rate", adam_learning_rate, optional=True)
    _check.scheduled("weight_decay", weight_decay, least=0)
    _check.scheduled("adam_weight_decay", adam_weight_decay, least=0)

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
