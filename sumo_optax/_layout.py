"""On which mesh axes a leaf lies, and where that puts the state of its matrix.

A state array is sharded along m as the leaf's axes that make m are, along n likewise, and never
along r: basis P(a, None), moment P(None, b), r x r matrices on every device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sumo_optax._axes import PyTree

Entry = str | tuple[str, ...] | None  # mesh axes of one array axis
Spec = tuple[Entry, ...]

# A matrix of this shape shows which axes of its state run along m and n.
_PROBE = {1_000_003: "m", 1_000_000: "n"}


def along(init: Callable[[int, int], Any]) -> list[str]:
    """For each array of a state, in order, a letter for each axis: m, n, or - for any other."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda: init(*_PROBE)))
    return ["".join(_PROBE.get(size, "-") for size in x.shape) for x in shapes]


def placed(arrays: list[jax.Array], leaf: Any, view: Any, letters: list[str]) -> list[jax.Array]:
    """State arrays where the leaf says, an array on a mesh or one whose type has a sharding."""
    sharding = _sharding(leaf)
    if sharding is None:
        return arrays
    put = jax.device_put if _is_concrete(leaf) else jax.sharding.reshard
    specs = [_state_spec(tuple(sharding.spec), view, word) for word in letters]
    return [
        put(x, NamedSharding(sharding.mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]


def renamed(tree: PyTree, params: PyTree, views: list[Any], word: str) -> PyTree:
    """State arrays in wrappers that name the axes of the parameter, as Flax NNX's variables do.

    The state's axes are others, and so must be their names.
    """
    stops = lambda x: _has_names(x) or isinstance(x, optax.MaskedNode)
    wrappers = jax.tree.leaves(params, is_leaf=stops)
    if not any(map(_has_names, wrappers)):
        return tree
    nodes, treedef = jax.tree.flatten(tree, is_leaf=stops)
    each = iter(views)
    for i, (wrapper, node) in enumerate(zip(wrappers, nodes, strict=True)):
        if isinstance(wrapper, optax.MaskedNode):
            continue
        view = next(each)
        if _has_names(wrapper):
            names = () if view is None else _state_spec(_names(wrapper), view, word)
            nodes[i] = node.copy(out_sharding=tuple(names))
    return treedef.unflatten(nodes)


def in_auto_mode(
    step: Callable[..., tuple[jax.Array, list[jax.Array], jax.Array]],
    G: jax.Array,
    view: Any,
    letters: list[str],
) -> Any:
    """`step` for a mesh with explicit axes: inside, the compiler shards; out of it come types."""
    sharding = jax.typeof(G).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return step
    state = [_state_spec(sharding.spec, view, word) for word in letters]
    return jax.sharding.auto_axes(step, out_sharding=(sharding.spec, state, PartitionSpec()))


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def _sharding(leaf: Any) -> NamedSharding | None:
    if _is_concrete(leaf):
        sharding = leaf.sharding
        on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
        return sharding if on_mesh else None
    sharding = jax.typeof(leaf).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _has_names(x: Any) -> bool:
    return hasattr(x, "get_metadata") and bool(x.get_metadata().get("out_sharding"))


def _names(x: Any) -> Spec:
    return tuple(x.get_metadata()["out_sharding"])


def _state_spec(spec: Sequence[Any], view: Any, word: str) -> PartitionSpec:
    """The spec of a state array, from that of its leaf.

    Axes that are merged into one keep the mesh axes of the first of them alone.
    """
    spec = (*spec, *[None] * (len(view.leaf_shape) - len(spec)))
    entries = {"m": spec[view.m_axes[0]], "n": spec[view.n_axes[0]], "-": None}
    return PartitionSpec(*(spec[a] for a in view.batch_axes), *(entries[x] for x in word))
