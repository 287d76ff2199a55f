"""Leaves grouped into stacks of matrices; one step of a group by a rule for a stack.

Grouping, orientation and dtypes are here. A rule sees stacks (B, m, n) in float32 or better.
"""

import functools
import itertools
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sumo_optax import _layout
from sumo_optax._axes import Path, PyTree, part_of, path_string
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
from sumo_optax._view import Side, View

# Numbers in an array of a group: a step holds ten such stacks for a moment.
_LARGEST_STACK = 2**24


class Rule(NamedTuple):
    """An optimizer for a stack of B matrices m x n. Its state is a tuple of trees of arrays.

    init(m, n, dtype, key) -> the state of one matrix
    due(t, state, phase) -> (B,): which matrices have a new basis in this step
    step(G, state, t, due, keys) -> Update, state; due is None where G is projected, which allows no
      new basis; keys() gives (B,) keys that depend on the leaf and t alone
    axes(m, n) -> a tree like the state with the names of each array's axes, as "mr" or "rn"
    side: which side of the matrix is m
    stagger: whether leaves have a phase, from 0 to 1, each; else it is 0
    drifts: whether a basis moves by little in every step, less than few bits can tell
    packed: how many numbers are in an element of a state array, at the most
    """

    init: Callable[..., tuple[PyTree, ...]]
    due: Callable[..., jax.Array]
    step: Callable[..., tuple[Update, tuple[PyTree, ...]]]
    axes: Callable[[int, int], tuple[PyTree, ...]]
    side: Side = "long"
    stagger: bool = False
    drifts: bool = False
    packed: int = 1

    def words(self, view: View) -> list[str]:
        return jax.tree.leaves(self.axes(view.m, view.n))

    def structure(self) -> Any:
        """Of a state, also where there is no matrix."""
        return jax.tree.structure(self.axes(1, 1))


Step = Callable[..., tuple[list[jax.Array], list[list[jax.Array]], jax.Array]]


class Group(NamedTuple):
    """Leaves whose matrices are one stack."""

    view: View
    dtype: jnp.dtype
    projected: bool
    phase: float
    spec: jax.sharding.PartitionSpec | None  # on a mesh with explicit axes
    role: str  # where the compiler shards
    turns: int  # of a loop over the leaves' first batch axis
    layer: str  # the numbers in the path, where large groups are of one layer each
    members: list[int]  # among the matrices of the tree


def groups_of(
    rule: Rule, matrices: list[tuple[Path, Any, Any]], sizes: list[int], phases: dict[Path, float]
) -> list[Group]:
    """Leaves of one shape go together where they lie alike on any mesh, up to a size of state.

    `phases` are of staggered refreshes, `sizes` of the largest array in each leaf's state.

    With explicit axes their types say so. Where the compiler alone shards, leaves of one role do:
    those whose paths are the same but for numbers of layers.
    """
    alike: dict[Any, list[int]] = {}
    for k, (path, G, view) in enumerate(matrices):
        [array, *_] = jax.tree.leaves(G)
        spec = _layout.explicit_spec(array)
        role = re.sub(r"\d+", "*", path_string(path)) if _layout.compiler_shards(array) else ""
        phase = phases.get(path, 0.0)
        turns = 1 if is_projected(G) else _turns(view, sizes[k], _layout.devices(array))
        traits = (view, G.dtype, is_projected(G), phase, spec, role, turns)
        alike.setdefault((part_of(path), traits), []).append(k)
    layer = lambda k: " ".join(re.findall(r"\d+", path_string(matrices[k][0])))
    groups = []
    for (_, traits), members in alike.items():
        size = sizes[members[0]] // traits[-1]
        if size * len(members) <= _LARGEST_STACK:
            groups.append(Group._make((*traits, "", members)))
            continue
        most = max(1, _LARGEST_STACK // max(1, size))
        for number, same in itertools.groupby(members, layer):
            same = list(same)
            parts = [same[i : i + most] for i in range(0, len(same), most)]
            groups += [Group._make((*traits, number, part)) for part in parts]
    return groups


def _turns(view: View, size: int, devices: int) -> int:
    """How often a loop goes over stacked layers, so that a few leaves may share it.

    Layers may lie on several devices, each of which has to have some of every turn.
    """
    layers = view.batch[0] if view.batch else 1
    most = max(1, layers // math.gcd(layers, devices))
    fits = lambda turns: size // turns // devices <= _LARGEST_STACK // 4
    return next((turns for turns in range(1, most) if most % turns == 0 and fits(turns)), most)


def group_step(
    rule: Rule, group: Group, paths: list[Path], skip_nonfinite: bool, precision: Any
) -> Step:
    """A step of a group: updates, new states, and how many matrices were skipped."""
    if group.turns == 1:
        return _stack_step(rule, group, group.view, paths, skip_nonfinite, precision)
    axis, turns = group.view.batch_axes[0], group.turns
    shape = list(group.view.leaf_shape)
    shape[axis] //= turns
    view = group.view._replace(leaf_shape=tuple(shape))
    one = _stack_step(rule, group, view, paths, skip_nonfinite, precision)

    def step(leaves, states, t, key):
        each = lambda f, *trees: jax.tree.map(
            f, ([axis] * len(leaves), jax.tree.map(lambda x: 0, states)), *trees
        )
        # Layers `turns` apart go together: where a mesh divides layers, each device has some.
        split = lambda axis, x: x.reshape(*x.shape[:axis], -1, turns, *x.shape[axis + 1 :])

        def turn(i, carry):
            leaves, states, bad = carry
            at = lambda axis, x: jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)
            put = lambda axis, x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, axis + 1)
            Ds, new, more = one(*each(at, (leaves, states)), t, key)
            # Updates take the place of the gradients: no stack of either is made anew.
            return *each(put, (leaves, states), (Ds, new)), bad + more

        carry = (*each(split, (leaves, states)), jnp.zeros([], jnp.int32))
        Ds, new, bad = jax.lax.fori_loop(0, turns, turn, carry)
        whole = lambda axis, x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return *each(whole, (Ds, new)), bad

    return step


def _stack_step(
    rule: Rule, group: Group, view: View, paths: list[Path], skip_nonfinite: bool, precision: Any
) -> Step:
    """That of a stack, as a whole.

    A matrix whose state would not be finite is skipped. A NaN or Inf anywhere in G makes it so,
    since QᵀG and the like read all of G: a look at the small state is a look at G.
    """
    batches = [view.batch or (1,)] * len(paths)
    hashes = np.repeat([hash_of(path) for path in paths], math.prod(view.batch))

    def step(leaves, states, t, key):
        G = (_projected if group.projected else _whole)(view, leaves, batches, precision, paths)
        dtype = jnp.promote_types(group.dtype, jnp.float32)
        stacks = [cast(stack_of(arrays, axes=len(view.batch)), dtype) for arrays in states]
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
            D = D._replace(right=or_zero(good, D.right))
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


def hash_of(path: Path) -> np.uint32:
    return np.uint32(zlib.crc32(path_string(path).encode()))


def _are_finite(state: PyTree) -> jax.Array:
    """Of which matrices a state is, (B,): 0 times NaN or Inf is NaN, and a sum is fast."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    sums = [jnp.sum(0 * x, axis=tuple(range(1, x.ndim))) for x in floats]
    return functools.reduce(jnp.add, sums) == 0


def is_projected(x: Any) -> bool:
    return isinstance(x, ProjectedGradient)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point arrays as `dtype`; counters as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def or_zero(good: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(good, x, jnp.zeros_like(x))
