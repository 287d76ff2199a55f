"""Leaves grouped into stacks of matrices; one step of a group by a rule for a stack.

Grouping, orientation and dtypes are here. A rule sees stacks (B, m, n) in float32 or better.
"""

import functools
import itertools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sumo_optax import _layout
from sumo_optax._gradient import (
    ProjectedGradient,
    ProjectedGradients,
    Update,
    WholeGradients,
    in_turns,
    pieces_of,
    shaped,
    stack_of,
)
from sumo_optax._linalg import at_least_float32, choose, wide
from sumo_optax._paths import Path, PyTree, part_of, path_string
from sumo_optax._rank import Rank
from sumo_optax._view import Side, View

# Numbers in an array of a group: a step holds ten such stacks for a moment.
_LARGEST_STACK = 2**24


class Rule(NamedTuple):
    """An optimizer for a stack of B matrices m x n. Its state is a tuple of trees of arrays.

    init(m, n, r, dtype, key) -> the state of one matrix
    refresh_due(t, state, phase) -> (B,): which matrices have a new basis in this step
    step(G, state, t, refresh_due, keys) -> Update, state; refresh_due is None where G is projected:
      no new basis can be made then; keys() gives (B,) keys that depend on the leaf and t alone
    state_axes(m, n, r) -> a tree like the state: the names of each array's axes, as "mr" or "rn"
    rank: from which each leaf has its r, at most the short side
    side: which side of the matrix is m
    stagger: whether leaves have a phase, from 0 to 1, each; else it is 0
    drifts: whether a basis moves by little in every step, less than few bits can tell
    packed: how many numbers are in an element of a state array, at the most
    whole: whether a step has arrays m x n besides the update
    """

    init: Callable[..., tuple[PyTree, ...]]
    refresh_due: Callable[..., jax.Array]
    step: Callable[..., tuple[Update, tuple[PyTree, ...]]]
    state_axes: Callable[[int, int, int], tuple[PyTree, ...]]
    rank: Rank
    side: Side = "long"
    stagger: bool = False
    drifts: bool = False
    packed: int = 1
    whole: bool = False

    def axis_names(self, view: View) -> list[str]:
        return jax.tree.leaves(self.state_axes(view.m, view.n, view.r))

    def structure(self) -> Any:
        """Of a state, also where there is no matrix."""
        return jax.tree.structure(self.state_axes(1, 1, 1))


Step = Callable[..., tuple[list[jax.Array], list[list[jax.Array]], jax.Array]]


class Group(NamedTuple):
    """Leaves whose matrices are one stack."""

    batch: tuple[int, ...]  # of a leaf
    m: int
    n: int
    r: int
    dtype: jnp.dtype
    projected: bool
    phase: float
    turns: int  # of a loop over the leaves' first batch axis
    devices: int  # on several each product has such a loop, elsewhere the whole step has
    layer: str  # the numbers in the path, where large groups are of one layer each
    members: list[int]  # among the matrices of the tree


def groups_of(
    rule: Rule, matrices: list[tuple[Path, Any, Any]], sizes: list[int], phases: dict[Path, float]
) -> list[Group]:
    """Leaves of one shape and rank go together, however they lie, up to a size of state.

    `phases` are of staggered refreshes, `sizes` of the largest array in each leaf's state.
    """
    alike: dict[Any, list[int]] = {}
    for k, (path, G, view) in enumerate(matrices):
        projected, phase = is_projected(G), phases.get(path, 0.0)
        mesh = _layout.mesh_sizes(jax.tree.leaves(G)[0])
        turns = 1 if projected else _turns(view, sizes[k], mesh)
        sizes_of_one = (view.batch, view.m, view.n, view.r)
        traits = (*sizes_of_one, G.dtype, projected, phase, turns, math.prod(mesh))
        alike.setdefault((part_of(path), traits), []).append(k)
    layer = lambda k: " ".join(re.findall(r"\d+", path_string(matrices[k][0])))
    groups = []
    for (_, traits), members in alike.items():
        *_, turns, devices = traits
        size = sizes[members[0]] // (turns if devices == 1 else devices)
        if size * len(members) <= _LARGEST_STACK:
            groups.append(Group._make((*traits, "", members)))
            continue
        most = max(1, _LARGEST_STACK // max(1, size))
        for number, same in itertools.groupby(members, layer):
            same = list(same)
            parts = [same[i : i + most] for i in range(0, len(same), most)]
            groups += [Group._make((*traits, number, part)) for part in parts]
    return groups


def _turns(view: View, size: int, mesh: Sequence[int]) -> int:
    """How often a loop goes over stacked layers, so that a few leaves may share it.

    Every device has some layers of a turn, where axes of the mesh could divide the layers.
    """
    layers = view.batch[0] if view.batch else 1
    subsets = itertools.chain(*(itertools.combinations(mesh, k) for k in range(len(mesh) + 1)))
    together = max(n for n in map(math.prod, subsets) if layers % n == 0)
    most = max(1, layers // together)
    fits = lambda turns: size // turns <= _LARGEST_STACK // 4
    return next((turns for turns in range(1, most) if most % turns == 0 and fits(turns)), most)


def group_step(
    rule: Rule,
    group: Group,
    paths: list[Path],
    views: list[View],
    skip_nonfinite: bool,
    precision: Any,
) -> Step:
    """A step of a group: updates, new states, and how many matrices were skipped."""
    of = functools.partial(_stack_step, rule, group, paths, skip_nonfinite, precision)
    if group.turns == 1 or group.devices > 1:
        return of(views)
    turns, first = group.turns, [view.batch_axes[0] for view in views]
    one = of([view.part(turns) for view in views])

    def step(leaves, states, t, key):
        def turn(over):
            leaves, states, _ = over
            Ds, new, bad = one(leaves, states, t, key)
            return Ds, new, bad[None]

        # Updates take the place of the gradients: no stack of either is made anew.
        over = (leaves, states, jnp.zeros(turns, jnp.int32))
        axes = (first, jax.tree.map(lambda x: 0, states), 0)
        Ds, new, bad = in_turns(turn, turns, over, axes=axes)
        return Ds, new, jnp.sum(bad, dtype=jnp.int32)

    return step


def _stack_step(
    rule: Rule,
    group: Group,
    paths: list[Path],
    skip_nonfinite: bool,
    precision: Any,
    views: list[View],
) -> Step:
    """A step of a whole stack.

    A matrix is skipped where its new state has a NaN or Inf. The products that make the state read
    all of G, so a NaN or Inf anywhere in G reaches it, and G itself need not be searched.
    """
    batches = [view.batch or (1,) for view in views]
    axes = len(group.batch)
    hashes = np.concatenate(
        [[hash_of(path)] * math.prod(view.batch) for path, view in zip(paths, views, strict=True)]
    )

    def gradients(leaves) -> ProjectedGradients | WholeGradients:
        common = (batches, [view.wide for view in views], leaves[0].dtype, precision)
        if group.projected:
            where = path_string(paths[0])
            left, right = _held(leaves, axes, turned=group.m < group.n)
            nothing = [None] * len(leaves)
            return ProjectedGradients(*common, nothing, left, right, (group.m, group.n), where)
        stored = [view.as_stored(G) for view, G in zip(views, leaves, strict=True)]
        stored = [shaped(G, (*batches[0], *G.shape[-2:])) for G in stored]
        turns = group.turns if group.devices > 1 else 1
        return WholeGradients(*common, stored, turns=turns)

    def step(leaves, states, t, key):
        G = gradients(leaves)
        dtype = wide(group.dtype)
        stacks = [cast(stack_of(arrays, axes=axes), dtype) for arrays in states]
        old = rule.structure().unflatten(stacks)
        key_of = lambda path_hash: jax.random.fold_in(jax.random.fold_in(key, path_hash), t)
        keys = lambda: jax.vmap(key_of)(hashes)
        # Small matrices want full float32 products, which GPUs and TPUs do not give by default.
        with jax.default_matmul_precision("highest"):
            refresh_due = None if group.projected else rule.refresh_due(t, old, group.phase)
            D, new = rule.step(G, old, t, refresh_due, keys)
        good, bad = None, jnp.zeros([], jnp.int32)
        if skip_nonfinite:
            good = _are_finite(new)
            new, bad = choose(good, new, old), jnp.sum(~good, dtype=jnp.int32)
            good = good[:, None, None]
            # Else the compiler may compute all updates first and hold them until it knows `good`.
            D = D._replace(right=or_zero(good, D.right))
        outputs = [view.to_leaf(x) for view, x in zip(views, G.updates(D, good), strict=True)]
        new_states = [
            [shaped(x, o.shape).astype(o.dtype) for x, o in zip(pieces, arrays, strict=True)]
            for pieces, arrays in zip(
                (pieces_of(stack, batches) for stack in jax.tree.leaves(new)), states, strict=True
            )
        ]
        return outputs, new_states, bad

    return step


def _held(
    leaves: list[ProjectedGradient], axes: int, *, turned: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    """QᵀG and GV of a stack, as far as they are held: those are of matrices with m >= n."""
    stack = lambda arrays: (
        None if arrays[0] is None else at_least_float32(stack_of(arrays, axes=axes))
    )
    left, right = stack([G.left for G in leaves]), stack([G.right for G in leaves])
    transpose = lambda x: None if x is None else x.mT
    return (transpose(right), transpose(left)) if turned else (left, right)


def hash_of(path: Path) -> np.uint32:
    return np.uint32(zlib.crc32(path_string(path).encode()))


def _are_finite(state: PyTree) -> jax.Array:
    """Which matrices have a finite state, (B,): 0 times NaN or Inf is NaN, and a sum is fast."""
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
    # A zero like any other may become an array of them that many share, held all through the step.
    zero = jax.lax.optimization_barrier(jnp.zeros([], jnp.result_type(x)))
    return jnp.where(good, x, zero)
