"""How a low-rank optimizer is doing, from its state."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from sumo_optax._in_subspace import FIRST_MOMENTS
from sumo_optax._linalg import orthonormal_columns, unit_scale
from sumo_optax._measured import MeasuredState
from sumo_optax._paths import PyTree, named_leaves, nodes_of, path_string
from sumo_optax._report import low_rank_states

# What is said of all matrices together: the mean, or the worst.
_SUMMARY = {
    "captured": jnp.mean,
    "rotation": jnp.mean,
    "steps_since_refresh": jnp.max,
    "condition_number": jnp.max,
    "effective_rank": jnp.mean,
}


class SubspaceMetrics(NamedTuple):
    """Result of `subspace_metrics`.

    `summary` has a scalar for each metric. `leaves` has a dictionary of metrics for the path of
    each matrix.
    """

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

    For an optimizer with ``metrics=True`` it also returns these. G is the last gradient, Q the
    basis before it and Q' the one after it (orthonormalised if needed):

    - ``captured``: :math:`\|Q^\top G\|^2 / \|G\|^2`, from 0 to 1, the part of the gradient's energy
      in the basis before it. It is 0 before the first basis and 1 for a gradient of 0. A projected
      gradient leaves it unchanged.
    - ``rotation``: :math:`\|(I - Q Q^\top) Q'\|_F / \sqrt r` at the last move of the basis: the
      root mean square sine of the r principal angles between both bases. It is 0 for the same
      subspace and 1 for an orthogonal one.
    - ``steps_since_refresh``: 0 if the basis moved at the last step.

    A step that is skipped changes none of them. The summary has the mean over all matrices of
    ``captured``, ``rotation`` and ``effective_rank``, the largest ``condition_number`` and
    ``steps_since_refresh``, and the sum of ``skipped``.

    Args:
      state: the state of an optimizer of this library, alone or inside optax's combinators.

    Returns:
      The :class:`SubspaceMetrics`. Its ``summary`` has a scalar for each metric, and its ``leaves``
      have a dictionary of arrays of shape (\*batch,) for the path of each matrix. The moment of
      :func:`scale_in_subspace` is ``mu`` or ``trace`` of its inner state. Without these there is no
      condition number and no effective rank.

    Raises:
      ValueError: `state` contains no state of this library's optimizers.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jnp.eye(16, 8)}}
      >>> tx = sumo_optax.scale_by_sumo(rank=4, metrics=True)
      >>> _, state = jax.jit(tx.update)(params, tx.init(params))
      >>> metrics = sumo_optax.subspace_metrics(state)
      >>> sorted(metrics.leaves["dense/kernel"])
      ['captured', 'condition_number', 'effective_rank', 'rotation', 'steps_since_refresh']
      >>> int(metrics.summary["steps_since_refresh"]), int(metrics.summary["skipped"])
      (0, 0)

    References:
      Effective rank: Roy and Vetterli, *The effective rank*, EUSIPCO 2007, section 2.
    """
    ours = low_rank_states(state)
    if not ours:
        raise ValueError("this state contains no optimizer of sumo_optax, so it has no subspace")
    leaves: dict[str, dict[str, jax.Array]] = {}
    for one in ours:
        for path, name, moment in _moments(one):
            spectrum = _spectrum if name == "singular_values" else _spectrum_of_matrix
            condition_number, effective_rank = _on_any_mesh(spectrum)(moment)
            leaves[path] = {"condition_number": condition_number, "effective_rank": effective_rank}
    for one in nodes_of(state, MeasuredState):
        for name in MeasuredState._fields[1:]:
            for path, x in named_leaves(getattr(one, name)).items():
                leaves.setdefault(path_string(path), {})[name] = x
    summary = {}
    for name, over in _SUMMARY.items():
        values = [x[name].ravel() for x in leaves.values() if name in x]
        if values:
            summary[name] = over(jnp.concatenate(values))
    summary["skipped"] = jnp.sum(jnp.stack([one.skipped for one in ours]))
    return SubspaceMetrics(summary, leaves)


def _moments(one: Any) -> Iterator[tuple[str, str, jax.Array]]:
    """Path, name and array of each matrix's moment, or of its singular values."""
    bases = named_leaves(one.basis)
    for path, x in named_leaves(one).items():
        owner = next((i for i in range(1, len(path) + 1) if path[i:] in bases), None)
        if owner is not None and path[owner - 1] in {"moment", "singular_values", *FIRST_MOMENTS}:
            yield path_string(path[owner:]), path[owner - 1], x


def _spectrum_of_matrix(M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """That of M (..., r, n) is that of M W (r x r), W a basis of its rows."""
    M = unit_scale(M.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        return _spectrum(jnp.linalg.svd(M @ orthonormal_columns(M.mT), compute_uv=False))


def _spectrum(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Condition number and effective rank, from singular values (..., r), the largest first."""
    s = s.astype(jnp.float32)
    largest = s[..., 0]
    p = s / jnp.where(largest > 0, jnp.sum(s, -1), 1)[..., None]
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)
    least = jnp.maximum(s[..., -1], jnp.finfo(s.dtype).eps * largest)
    return (
        jnp.where(largest > 0, largest / jnp.where(largest > 0, least, 1), 1),
        jnp.where(largest > 0, jnp.exp(entropy), 0),
    )


def _on_any_mesh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with two small results, on every device, also where axes are explicit."""

    def on_any(x):
        if AxisType.Explicit not in jax.typeof(x).sharding.mesh.axis_types:
            return fn(x)
        return jax.sharding.auto_axes(fn, out_sharding=(PartitionSpec(),) * 2)(x)

    return on_any
