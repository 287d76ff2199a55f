"""On which mesh axes a leaf lies, and where that puts the state of its matrix.

A state array is sharded along m as the leaf's axes that make m are, along n likewise, and along r
over the other axes of the mesh, those of data-parallel devices included: basis P(a, rest), moment
P(rest, b), both divided by all devices.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sumo_optax._leaf import AXIS_NAMES
from sumo_optax._paths import PyTree

Entry = str | tuple[str, ...] | None  # mesh axes of one array axis
Spec = tuple[Entry, ...]


def placed(arrays: list[jax.Array], leaf: Any, view: Any, words: list[str]) -> list[jax.Array]:
    """State arrays where the leaf says, an array on a mesh or one whose type has a sharding.

    A word names the axes of a state array of one matrix: m, n, M and N for blocks of these, or any
    other letter.
    """
    sharding = _sharding(leaf)
    if sharding is None:
        return arrays
    put = jax.device_put if _is_concrete(leaf) else jax.sharding.reshard
    specs = [
        _state_spec(tuple(sharding.spec), view, word, sharding.mesh, x.shape)
        for x, word in zip(arrays, words, strict=True)
    ]
    return [
        put(x, NamedSharding(sharding.mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]


def renamed(tree: PyTree, params: PyTree, views: list[Any], words: list[str]) -> PyTree:
    """State arrays in wrappers that name the axes of the parameter, as Flax NNX's variables do.

    The state's axes are others, and so must be their names, in every field that has them.
    """
    stops = lambda x: bool(_names(x)) or isinstance(x, optax.MaskedNode)
    wrappers = jax.tree.leaves(params, is_leaf=stops)
    if not any(map(_names, wrappers)):
        return tree
    nodes, treedef = jax.tree.flatten(tree, is_leaf=stops)
    each = iter(zip(views, words, strict=True))
    for i, (wrapper, node) in enumerate(zip(wrappers, nodes, strict=True)):
        if isinstance(wrapper, optax.MaskedNode):
            continue
        view, word = next(each)
        of = lambda names, view=view, word=word: (
            () if view is None else tuple(_state_spec(names, view, word))
        )
        if fields := _names(wrapper):
            nodes[i] = node.copy(**{field: of(names) for field, names in fields.items()})
    return treedef.unflatten(nodes)


def _names(x: Any) -> dict[str, Spec]:
    """What a variable calls its axes, by the field that says so."""
    found = x.get_metadata() if hasattr(x, "get_metadata") else {}
    return {
        field: tuple(found[field])
        for field in AXIS_NAMES
        if isinstance(found.get(field), Iterable) and found[field]
    }


def mesh_sizes(x: Any) -> tuple[int, ...]:
    """Of the axes of an array's mesh."""
    return jax.typeof(x).sharding.mesh.axis_sizes


def in_auto_mode(
    step: Callable[..., Any], leaves: list[Any], state: list[list[jax.Array]]
) -> Callable[..., Any]:
    """A group's step for a mesh with explicit axes: the compiler shards inside; types come out."""
    sharding_of = lambda x: jax.typeof(jax.tree.leaves(x)[0]).sharding
    if AxisType.Explicit not in sharding_of(leaves).mesh.axis_types:
        return step
    specs = lambda xs: [sharding_of(x).spec for x in xs]
    out = (specs(leaves), list(map(specs, state)), PartitionSpec())
    return jax.sharding.auto_axes(step, out_sharding=out)


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def _sharding(leaf: Any) -> NamedSharding | None:
    if _is_concrete(leaf):
        sharding = leaf.sharding
        on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
        return sharding if on_mesh else None
    sharding = jax.typeof(leaf).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _state_spec(
    spec: Spec | PartitionSpec, view: Any, word: str, mesh: Any = None, shape: Any = ()
) -> PartitionSpec:
    """The spec of a state array, from that of its leaf.

    Axes that are merged into one keep the mesh axes of the first of them alone. Those of the leaf's
    mesh axes that this leaves out divide the array too: along r where they can, else along batch
    axes, which loops take apart, else along m or n. So do the other axes of the `mesh`, but for m
    and n: a product with the gradient would lie over them too.
    """
    spec = (*spec, *[None] * (len(view.leaf_shape) - len(spec)))
    sides = {"m": spec[view.m_axes[0]], "n": spec[view.n_axes[0]]}
    if mesh is not None:
        sides |= {x.upper(): entry for x, entry in sides.items()}
    entries = [*(spec[a] for a in view.batch_axes), *(sides.get(x) for x in word)]
    if mesh is None or len(word) < 2:
        return PartitionSpec(*entries)
    batch = len(view.batch_axes)
    along_r = [k + batch for k, side in enumerate(word) if side not in sides]
    along_sides = [k + batch for k, side in enumerate(word) if side in sides]
    order = [*along_r, *range(batch)]
    own = _names_of(spec)
    entries = tuple(_fitted(entries, own, shape, mesh, [*order, *along_sides]))
    rest = [axis for axis in _dividing(mesh) if axis not in own]
    return _fitted(entries, rest, shape, mesh, order)


def _names_of(spec: Spec) -> list[str]:
    return [axis for e in spec if e for axis in ((e,) if isinstance(e, str) else e)]


def _dividing(mesh: Any) -> list[str]:
    """The axes of a mesh that divide state: all, or of mixed ones those that are explicit."""
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    ]
    return explicit or list(mesh.axis_names)


def as_fits(fn: Callable[..., PyTree], *arrays: Any) -> PyTree:
    """`fn` on a mesh with any kind of axes. What it gives lies like the first array.

    Mesh axes that do not divide the axis they were on go to the first that they divide.
    """
    sharding = jax.typeof(arrays[0]).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(*arrays)
    shapes = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    spec = tuple(sharding.spec)
    lies = lambda x: _fitted(spec, _names_of(spec), x.shape, sharding.mesh, range(len(x.shape)))
    return jax.sharding.auto_axes(fn, out_sharding=jax.tree.map(lies, shapes))(*arrays)


def _fitted(
    entries: Sequence[Entry], axes: list[str], shape: Any, mesh: Any, order: Iterable[int]
) -> PartitionSpec:
    """The entries that divide their axes; the rest of the mesh `axes` where it fits."""
    parts = lambda axes: math.prod(mesh.shape[a] for a in axes)
    taken = [e if isinstance(e, tuple) else () if e is None else (e,) for e in entries]
    taken = [
        axes if size % parts(axes) == 0 else () for axes, size in zip(taken, shape, strict=True)
    ]
    for axis in axes:
        if any(axis in of_side for of_side in taken):
            continue
        for k in order:
            if shape[k] % parts((*taken[k], axis)) == 0:
                taken[k] = (*taken[k], axis)
                break
    unwrapped = [axes[0] if len(axes) == 1 else axes or None for axes in taken]
    return PartitionSpec(*unwrapped)
