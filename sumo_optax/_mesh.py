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
    """`x` divided over all devices: along its axis `r`, or else along its other side.

    Mesh axes are added one by one: all at once is often more than the compiler can do without
    making the whole array on every device.
    """
    mesh = mesh_of(x)
    if mesh is None:
        return x
    axes: dict[int, tuple[str, ...]] = {r: (), -3 - r: ()}
    for name in mesh.axis_names:
        for k, names in axes.items():
            if x.shape[k] % math.prod(mesh.shape[a] for a in (*names, name)) == 0:
                axes[k] = (*names, name)
                x = _constrained(x, mesh, {k: a for k, a in axes.items() if a}, else_=None)
                break
    return x


def whole(x: jax.Array, r: int) -> jax.Array:
    """`x` on no device in parts along its axis `r`; the compiler decides on its other axes."""
    mesh = mesh_of(x)
    return x if mesh is None else _constrained(x, mesh, {r: None}, else_=P.UNCONSTRAINED)


def over_devices(fn: Callable[..., jax.Array], *stacks: jax.Array) -> jax.Array:
    """`fn` of stacks (B, ...), each device taking some of the matrices."""
    mesh = mesh_of(stacks[0])
    size = len(stacks[0])
    if mesh is None:
        return fn(*stacks)
    if size == 1:
        return jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(*stacks)
    along = lambda x, axes: _constrained(x, mesh, {0: axes}, else_=P.UNCONSTRAINED)
    stages = [mesh.axis_names[:k] for k in range(1, len(mesh.axis_names))]
    padded = [jnp.pad(x, [(0, -size % mesh.size), *[(0, 0)] * (x.ndim - 1)]) for x in stacks]
    padded = [functools.reduce(along, stages, x) for x in padded]
    spec = P(mesh.axis_names)
    of = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return functools.reduce(along, stages[::-1], of(*padded))[:size]


def _constrained(x: jax.Array, mesh: Any, axes: dict[int, Any], *, else_: Any) -> jax.Array:
    entries = [else_] * x.ndim
    for axis, names in axes.items():
        entries[axis] = names
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*entries)))
