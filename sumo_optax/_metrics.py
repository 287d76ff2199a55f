"""How a low-rank optimizer is doing, from its state; and the wrapper that keeps what is past.

The optimizers themselves carry nothing for it: what only two steps together tell (rotation,
captured energy, steps since a refresh) is measured by `with_subspace_metrics`, around them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from sumo_optax import _check, _layout
from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._gradient import WholeGradients
from sumo_optax._in_subspace import FIRST_MOMENTS, SubspaceState
from sumo_optax._linalg import frobenius_norm, orthonormal_columns, unit_scale
from sumo_optax._mofasgd import MofasgdState
from sumo_optax._paths import PyTree, named_leaves, path_string
from sumo_optax._report import low_rank_states
from sumo_optax._subspace import captured_energy
from sumo_optax._sumo import SumoState
from sumo_optax._view import View, matrix_views

# What is said of all matrices together: the mean, or the worst.
_SUMMARY = {
    "captured": jnp.mean,
    "rotation": jnp.mean,
    "steps_since_refresh": jnp.max,
    "condition_number": jnp.max,
    "effective_rank": jnp.mean,
}


class MeasuredState(NamedTuple):
    """State of `with_subspace_metrics`.

    Each list has an entry for each low-rank state in `inner`: a tree like its basis.
    """

    inner: PyTree  # state of the wrapped transformation
    captured: list[PyTree]  # of the last gradient, shape (*batch,), float32
    rotation: list[PyTree]  # when the basis last moved, shape (*batch,), float32
    steps_since_refresh: list[PyTree]  # shape (*batch,), int32


class SubspaceMetrics(NamedTuple):
    """What `subspace_metrics` returns: plain dictionaries of arrays, by the metrics' names."""

    summary: dict[str, jax.Array]  # over all matrices, shape ()
    leaves: dict[str, dict[str, jax.Array]]  # by the leaf's path, shape (*batch,)


def subspace_metrics(state: PyTree) -> SubspaceMetrics:
    r"""Computes how well an optimizer's subspaces follow the gradients.

    It is a pure function of the state, for use inside ``jit`` at any step. Let :math:`\sigma` be
    the singular values of the moment M in descending order. Then it returns

    - ``condition_number``: :math:`\sigma_1 / \max(\sigma_r, \epsilon \sigma_1)`, which is at most
      :math:`1 / \epsilon = 8.4 \cdot 10^6`, the limit of float32. It is 1 for a moment of 0.
    - ``effective_rank``: :math:`\exp(-\sum_i p_i \ln p_i)` with :math:`p_i = \sigma_i / \sum_j
      \sigma_j`, from 1 to r. It is 0 for a moment of 0.
    - ``skipped``: the number of updates skipped so far because they were not finite. Only the
      summary has it.

    Inside :func:`with_subspace_metrics` it also returns these, with the last gradient G, the basis
    Q before it and the basis Q' after it (orthonormalised if needed):

    - ``captured``: :math:`\|Q^\top G\|^2 / \|G\|^2`, from 0 to 1, the part of the gradient's energy
      in the basis before it. It is 0 before the first basis and 1 for a gradient of 0. A gradient
      that is not finite leaves it unchanged.
    - ``rotation``: :math:`\|(I - Q Q^\top) Q'\|_F / \sqrt r` at the last move of the basis: the
      root mean square sine of the r principal angles between both bases. It is 0 for the same
      subspace and 1 for an orthogonal one.
    - ``steps_since_refresh``: 0 if the basis moved at the last step.

    The summary has the mean over all matrices of ``captured``, ``rotation`` and ``effective_rank``,
    the largest ``condition_number`` and ``steps_since_refresh``, and the sum of ``skipped``.

    Args:
      state: the state of an optimizer of this library, alone or inside optax's combinators.

    Returns:
      A :class:`SubspaceMetrics`: ``summary`` with a scalar for each metric, ``leaves`` with a
      dictionary of arrays of shape (\*batch,) for each matrix's path. The moment of
      :func:`scale_in_subspace` is ``mu`` or ``trace`` of its inner state. Without these there is no
      condition number and no effective rank.

    Raises:
      ValueError: `state` contains no state of this library's optimizers, or no matrix.

    Examples:
      >>> import jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jnp.eye(16, 8)}}
      >>> tx = sumo_optax.with_subspace_metrics(sumo_optax.scale_by_sumo(rank=4))
      >>> _, state = tx.update(params, tx.init(params))
      >>> metrics = sumo_optax.subspace_metrics(state)
      >>> sorted(metrics.leaves["dense/kernel"])
      ['captured', 'condition_number', 'effective_rank', 'rotation', 'steps_since_refresh']
      >>> int(metrics.summary["steps_since_refresh"]), int(metrics.summary["skipped"])
      (0, 0)

    References:
      Effective rank: Roy and Vetterli, *The effective rank*, EUSIPCO 2007, section 2.
    """
    ours = _found(low_rank_states(state))
    leaves: dict[str, dict[str, jax.Array]] = {}
    for one in ours:
        for path, s in _moments(one):
            condition_number, effective_rank = _on_any_mesh(_spectrum, 2)(s)
            leaves[path] = {"condition_number": condition_number, "effective_rank": effective_rank}
    is_measured = lambda x: isinstance(x, MeasuredState)
    for measured in filter(is_measured, jax.tree.leaves(state, is_leaf=is_measured)):
        for name in MeasuredState._fields[1:]:
            for tree in getattr(measured, name):
                for path, x in named_leaves(tree).items():
                    leaves.setdefault(path_string(path), {})[name] = x
    summary = {}
    for name, over in _SUMMARY.items():
        values = [x[name].ravel() for x in leaves.values() if name in x]
        if values:
            summary[name] = over(jnp.concatenate(values))
    summary["skipped"] = jnp.sum(jnp.stack([one.skipped for one in ours]))
    return SubspaceMetrics(summary, leaves)


def with_subspace_metrics(
    tx: optax.GradientTransformation,
    *,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures at every step what :func:`subspace_metrics` needs from two steps.

    The updates are those of `tx`, and the state of `tx` is ``.inner`` of the new state. A step
    takes three more products for each matrix: the basis with the gradient, and twice the old basis
    with the new one. An optimizer without this wrapper computes and stores nothing for the metrics.

    Args:
      tx: an optimizer of this library, alone or inside optax's combinators.
      weight_dimension_numbers: that of `tx`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`MeasuredState`.

    Raises:
      ValueError: at init, the state of `tx` contains no state of this library, or a basis does not
        fit its leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jnp.eye(16, 8)}}
      >>> tx = sumo_optax.with_subspace_metrics(sumo_optax.sumo(3e-3, rank=4))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(3):
      ...     _, state = update(params, state, params)
      >>> float(sumo_optax.subspace_metrics(state).summary["captured"]) > 0.4
      True
    """
    _check.transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        inner = tx.init(params)
        views = matrix_views(params, weight_dimension_numbers)
        by_path = dict(zip(named_leaves(params), views, strict=True))
        bases = []
        for one in _found(low_rank_states(inner)):
            for path, Q in named_leaves(one.basis).items():
                _matrices_of(path_string(path), by_path.get(path), Q)  # or refuses
            bases.append(one.basis)

        def zeros(dtype):
            trees = jax.tree.map(lambda Q: jnp.zeros(Q.shape[:-2], dtype), bases)
            words = [""] * len(views)
            return [_layout.renamed(tree, params, views, words) for tree in trees]

        return MeasuredState(inner, zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32))

    def update(updates, state, params=None, **extra_args):
        outputs, inner = tx.update(updates, state.inner, params, **extra_args)
        paths = named_leaves(updates)
        views = matrix_views(updates, weight_dimension_numbers)
        by_path = dict(zip(paths, zip(paths.values(), views, strict=True), strict=True))
        last = zip(*map(jax.tree.leaves, state[1:]), strict=True)
        measured = []
        for old, new in zip(low_rank_states(state.inner), low_rank_states(inner), strict=True):
            bases = zip(named_leaves(old.basis).items(), jax.tree.leaves(new.basis), strict=True)
            for (path, Q_old), Q in bases:
                gradient, view = by_path[path]
                to_matrices = _matrices_of(path_string(path), view, Q)
                movement = _movement(to_matrices, mend=isinstance(old, SubspaceState))
                measured.append(_on_any_mesh(movement, 3)(gradient, Q_old, Q, next(last)))
        treedef = jax.tree.structure(state.captured)
        columns = zip(*measured, strict=True) if measured else ([], [], [])
        return outputs, MeasuredState(inner, *map(treedef.unflatten, columns))

    return optax.GradientTransformationExtraArgs(init, update)


def _found(ours: list[Any]) -> list[Any]:
    if not ours:
        raise ValueError("this state contains no optimizer of sumo_optax, so it has no subspace")
    return ours


def _matrices_of(path: str, view: View | None, Q: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Leaf to matrices, batch first, with the side in front that Q is a basis of."""
    if view is None or view.batch != Q.shape[:-2] or Q.shape[-2] not in (view.m, view.n):
        raise ValueError(
            f"the basis of {path} has shape {Q.shape}, which does not fit the matrix"
            f" {view and (*view.batch, view.m, view.n)}; give weight_dimension_numbers as to the"
            " optimizer"
        )
    of_n = Q.shape[-2] != view.m
    to_matrices = view.to_matrices
    return lambda leaf: to_matrices(leaf).mT if of_n else to_matrices(leaf)


def _movement(
    to_matrices: Callable[[jax.Array], jax.Array], mend: bool
) -> Callable[..., tuple[jax.Array, ...]]:
    """Captured energy, rotation and steps since a refresh of a leaf, from those before the step."""

    def movement(gradient, Q_old, Q, last):
        batch, stack = Q.shape[:-2], lambda x: x.reshape(-1, *x.shape[-2:])
        G = stack(to_matrices(gradient.astype(jnp.float32)))
        moved = jnp.any(Q_old != Q, axis=(-2, -1))
        Q_old, Q = (stack(x.astype(jnp.float32)) for x in (Q_old, Q))
        if mend:  # online PCA keeps its basis near an orthonormal one only
            Q_old, Q = orthonormal_columns(Q_old), orthonormal_columns(Q)
        with jax.default_matmul_precision("highest"):
            outside = Q - Q_old @ (Q_old.mT @ Q)
        rotation = frobenius_norm(outside) / Q.shape[-1] ** 0.5
        G_hat = Q_old.mT @ G
        # A NaN or Inf anywhere in G is one in Ĝ.
        finite = jnp.sum(0 * G_hat, axis=(-2, -1), keepdims=True) == 0
        captured = jnp.where(finite, captured_energy(WholeGradients.of([G]), G_hat), jnp.nan)
        captured, rotation = captured.reshape(batch), rotation.reshape(batch)
        return (
            jnp.where(jnp.isfinite(captured), captured, last[0]),
            jnp.where(moved, rotation, last[1]),
            jnp.where(moved, 0, last[2] + 1),
        )

    return movement


def _moments(one: Any) -> Iterator[tuple[str, jax.Array]]:
    """Path and singular values of each matrix's moment."""
    if isinstance(one, MofasgdState):
        for path, s in named_leaves(one.singular_values).items():
            yield path_string(path), s.astype(jnp.float32)
        return
    bases = named_leaves(one.basis)
    values = _on_any_mesh(_singular_values, 1)
    if isinstance(one, SumoState):
        for path, M in named_leaves(one.moment).items():
            yield path_string(path), values(M)
        return
    for path, x in named_leaves(one.inner).items():
        owner = next((i for i in range(1, len(path)) if path[i:] in bases), None)
        if owner is not None and path[owner - 1] in FIRST_MOMENTS:
            yield path_string(path[owner:]), values(x)


def _singular_values(M: jax.Array) -> jax.Array:
    """Of M (..., r, n) over its largest entry: those of M W (r x r), W a basis of its rows."""
    M = unit_scale(M.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.svd(M @ orthonormal_columns(M.mT), compute_uv=False)


def _spectrum(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Condition number and effective rank, from singular values (..., r), the largest first."""
    largest = s[..., 0]
    p = s / jnp.where(largest > 0, jnp.sum(s, -1), 1)[..., None]
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)
    least = jnp.maximum(s[..., -1], jnp.finfo(s.dtype).eps * largest)
    return (
        jnp.where(largest > 0, largest / jnp.where(largest > 0, least, 1), 1),
        jnp.where(largest > 0, jnp.exp(entropy), 0),
    )


def _on_any_mesh(fn: Callable[..., Any], results: int) -> Callable[..., Any]:
    """`fn` with small results, on every device, also where axes are explicit."""

    def on_any(*args):
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
        if not any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
            return fn(*args)
        spec = PartitionSpec()
        return jax.sharding.auto_axes(fn, out_sharding=spec if results == 1 else (spec,) * results)(
            *args
        )

    return on_any
