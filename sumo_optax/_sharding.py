"""Where optimizer state lies on a mesh, for `jax.jit(out_shardings=...)` and for checkpoints."""

from collections.abc import Collection
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sumo_optax._paths import PyTree, named_leaves, path_string


def state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    param_shardings: PyTree,
    *,
    mesh_axes: Collection[str] | None = None,
) -> PyTree:
    """Returns the sharding of every array of an optimizer's state, from those of the parameters.

    Let m be the projected side of a matrix and n the other one. The mesh axes a lie along m, b
    along n, and c along neither. The basis has the spec P(a, (b, c)) and the moment P((a, c), b),
    if the devices along r divide r. Batch axes (layers, experts) keep their sharding. Every device,
    also along data-parallel axes, therefore holds its share of the state. States of optax's own
    transformations have the sharding of their parameter. Counters are replicated.

    Args:
      tx: any transformation that consists of those of this library and of optax, with combinators
        (``chain``, ``partition``, ``masked``, ``MultiSteps``, ``inject_hyperparams``).
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      param_shardings: tree like `params` of ``jax.sharding.NamedSharding``, all of one mesh,
        which may be a ``jax.sharding.AbstractMesh`` of devices that do not exist.
      mesh_axes: names of the mesh axes that c may contain, by default all of the mesh.

    Returns:
      Tree of ``NamedSharding`` like ``tx.init(params)``.

    Raises:
      TypeError: a sharding is not a ``NamedSharding``.
      ValueError: the shardings have several meshes, or the mesh has no axis of that name.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"dense": {"kernel": jnp.ones((16, 8))}}
      >>> shardings = {"dense": {"kernel": NamedSharding(mesh, P("x", None))}}
      >>> tx = sumo_optax.scale_by_sumo(4)
      >>> state_sharding = sumo_optax.state_shardings(tx, params, shardings)
      >>> state_sharding.moment["dense"]["kernel"].spec == P(None, "x")
      True
      >>> state = jax.jit(tx.init, out_shardings=state_sharding)(params)
    """
    state = abstract_state(tx, params, param_shardings, mesh_axes=mesh_axes)
    return jax.tree.map(lambda x: x.sharding, state)


def abstract_state(
    tx: optax.GradientTransformation,
    params: PyTree,
    param_shardings: PyTree,
    *,
    mesh_axes: Collection[str] | None = None,
) -> PyTree:
    """Returns shape, dtype and sharding of every array of an optimizer's state, for Orbax.

    Orbax restores a checkpoint onto it. Arguments and errors are those of :func:`state_shardings`.

    Returns:
      Tree of ``jax.ShapeDtypeStruct`` like ``tx.init(params)``.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"dense": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
      >>> shardings = {"dense": {"kernel": NamedSharding(mesh, P(None, "x"))}}
      >>> state = sumo_optax.abstract_state(sumo_optax.scale_by_sumo(4), params, shardings)
      >>> basis = state.basis["dense"]["kernel"]
      >>> basis.shape, basis.sharding.spec == P("x", None)
      ((8, 4), True)
    """
    mesh = _mesh_of(param_shardings)
    if mesh is None:
        return jax.eval_shape(tx.init, params)
    # Types carry shardings on a mesh with explicit axes, so there `init` says where its state lies.
    explicit = _explicit(mesh, _of_parameters(param_shardings) | _known(mesh_axes, mesh))
    typed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(explicit, s.spec)
        ),
        params,
        param_shardings,
    )
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, typed)
    spec = lambda x: PartitionSpec() if x.sharding is None else x.sharding.spec
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))),
        state,
    )


def _mesh_of(param_shardings: PyTree) -> Any:
    """The one mesh of all shardings; None if there are none."""
    shardings = named_leaves(param_shardings)
    for path, sharding in shardings.items():
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"param_shardings must hold jax.sharding.NamedSharding, got {sharding!r} at"
                f" {path_string(path)}"
            )
    meshes = {sharding.mesh for sharding in shardings.values()}
    if len(meshes) > 1:
        raise ValueError(f"param_shardings must be of one mesh, got {len(meshes)}: {meshes}")
    return next(iter(meshes), None)


def _explicit(mesh: Any, names: Collection[str]) -> AbstractMesh:
    """Of its axes those of such names, all explicit."""
    kept = {name: size for name, size in mesh.shape.items() if name in names}
    kinds = (AxisType.Explicit,) * len(kept)
    return AbstractMesh(tuple(kept.values()), tuple(kept), axis_types=kinds)


def _of_parameters(param_shardings: PyTree) -> set[str]:
    """The names of mesh axes in their specs."""
    specs = [tuple(sharding.spec) for sharding in jax.tree.leaves(param_shardings)]
    return set(jax.tree.leaves(specs))


def _known(mesh_axes: Collection[str] | None, mesh: Any) -> set[str]:
    if unknown := set(mesh_axes or ()) - set(mesh.axis_names):
        raise ValueError(f"mesh_axes must be among {mesh.axis_names}, got {sorted(unknown)}")
    return set(mesh.axis_names if mesh_axes is None else mesh_axes)
