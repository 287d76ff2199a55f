"""Small arrays divided over the devices of a mesh whose axes the compiler shards.

Where a parameter lies is not known then. What is made of it, r x n and m x r, is told where to be:
between products with gradients divided along r, in such a product whole along r, and for work on
whole matrices along the stack. On one device, and under a `shard_map`, nothing is done.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def mesh_of(x: Any) -> Any:
    """The mesh over which the compiler shards, None where there is none."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto} else None


def divided(x: jax.Array, r: int) -> jax.Array:
    """`x` divided over all devices: along its axis `r`, or else along its other side."""
    mesh = mesh_of(x)
    if mesh is None:
        return x
    return _constrained(x, mesh, _along_sides(x, mesh, mesh.axis_names, r), else_=None)


def whole(x: jax.Array, r: int) -> jax.Array:
    """`x` on no device in parts along its axis `r`; the compiler decides on its other axes."""
    mesh = mesh_of(x)
    return x if mesh is None else _constrained(x, mesh, {r: None}, else_=P.UNCONSTRAINED)


def over_devices(fn: Callable[..., Any], *stacks: jax.Array) -> Any:
    """`fn` of stacks (B, ...), a stack or several, each device taking some of the matrices.

    Mesh axes go from the sides to the stack one by one, the innermost first: each is then one
    all-to-all.
    """
    mesh = mesh_of(stacks[0])
    size = len(stacks[0])
    if mesh is None:
        return fn(*stacks)
    if size == 1:
        return jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(*stacks)
    names = mesh.axis_names

    def moved(x: jax.Array, k: int) -> jax.Array:
        axes = {0: names[:k:-1]} | _along_sides(x, mesh, names[: k + 1], -2)
        return _constrained(x, mesh, axes, else_=None)

    order = range(len(names) - 1, -1, -1)
    padded = [jnp.pad(x, [(0, -size % mesh.size), *[(0, 0)] * (x.ndim - 1)]) for x in stacks]
    padded = [functools.reduce(moved, order, x) for x in padded]
    spec = P(names[::-1])
    of = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    back = lambda x: functools.reduce(moved, reversed(order), x)[:size]
    return jax.tree.map(back, of(*padded))


def _along_sides(x: jax.Array, mesh: Any, names: tuple[str, ...], r: int) -> dict[int, Any]:
    """Mesh axes on the axis `r` of `x` as far as they divide it, then on the other of the two."""
    axes: dict[int, tuple[str, ...]] = {r: (), -3 - r: ()}
    for name in names:
        for k, taken in axes.items():
            if x.shape[k] % math.prod(mesh.shape[a] for a in (*taken, name)) == 0:
                axes[k] = (*taken, name)
                break
    return {k: taken for k, taken in axes.items() if taken}


def _constrained(x: jax.Array, mesh: Any, axes: dict[int, Any], *, else_: Any) -> jax.Array:
    entries = [else_] * x.ndim
    for axis, names in axes.items():
        entries[axis] = names
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*entries)))
