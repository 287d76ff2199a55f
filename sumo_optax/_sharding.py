"""Where optimizer state lies on a mesh, for `jax.jit(out_shardings=...)` and for checkpoints."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sumo_optax._paths import PyTree, named_leaves, path_string


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, param_shardings: PyTree
) -> PyTree:
    """The sharding of every array of an optimizer's state, from those of the parameters.

    With mesh axes a along the side that is projected and b along the other, basis and moment are
    P(a, b), if r is a multiple of the devices along it; what belongs to neither side is on every
    device; batch axes (layers, experts) keep theirs. States of optax's own transformations that
    are like a parameter lie as it does; counters are replicated.

    Args:
      tx: any transformation made of ours and of optax's, combinators (``chain``, ``partition``,
        ``masked``, ``MultiSteps``, ``inject_hyperparams``) included.
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      param_shardings: tree like `params` of ``jax.sharding.NamedSharding``, all of one mesh,
        which may be a ``jax.sharding.AbstractMesh``: of devices that are not here.

    Returns:
      Tree of ``NamedSharding`` like ``tx.init(params)``.

    Raises:
      TypeError: a sharding is no ``NamedSharding``.
      ValueError: the shardings are of several meshes.

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
    return jax.tree.map(lambda x: x.sharding, abstract_state(tx, params, param_shardings))


def abstract_state(
    tx: optax.GradientTransformation, params: PyTree, param_shardings: PyTree
) -> PyTree:
    """Shape, dtype and sharding of every array of an optimizer's state: what Orbax restores onto.

    Args, raises: those of :func:`state_shardings`.

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
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )
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
