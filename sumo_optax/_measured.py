"""How a basis moves, measured by the rule that moves it, for an optimizer with `metrics=True`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sumo_optax._group import Rule
from sumo_optax._linalg import frobenius_norm, orthonormal_columns, product
from sumo_optax._paths import PyTree
from sumo_optax._subspace import captured_energy


class MeasuredState(NamedTuple):
    """State of an optimizer with ``metrics=True``: its own state, and three trees like its basis.

    They are float32 (float64 for float64 parameters) unless `state_dtype` is given.
    """

    inner: Any  # the state without metrics
    captured: PyTree  # by the basis before the last gradient, shape (*batch,)
    rotation: PyTree  # when the basis last moved, shape (*batch,)
    steps_since_refresh: PyTree  # shape (*batch,), int32


def measured(rule: Rule) -> Rule:
    """The rule with three numbers more in its state, whose first array is the basis."""

    def init(m, n, r, dtype, key):
        kept = [jnp.zeros((), x) for x in (dtype, dtype, jnp.int32)]
        return *rule.init(m, n, r, dtype, key), *kept

    def refresh_due(t, state, phase):
        return rule.refresh_due(t, state[:-3], phase)

    def step(G, state, t, refresh_due, keys):
        *old, captured, rotation, steps = state
        D, new = rule.step(G, tuple(old), t, refresh_due, keys)
        moved = jnp.any(old[0] != new[0], axis=(-2, -1))
        # Online PCA keeps its basis near an orthonormal one only.
        Q_old, Q = map(orthonormal_columns, (old[0], new[0])) if rule.drifts else (old[0], new[0])
        if refresh_due is not None:  # of projected gradients there is no norm
            captured = captured_energy(G, G.left_product(Q_old))[:, 0, 0]
        rotation = jnp.where(moved, _rotation(Q_old, Q), rotation)
        return D, (*new, captured, rotation, jnp.where(moved, 0, steps + 1))

    def state_axes(m, n, r):
        return *rule.state_axes(m, n, r), "", "", ""

    return rule._replace(init=init, refresh_due=refresh_due, step=step, state_axes=state_axes)


def _rotation(Q_old: jax.Array, Q: jax.Array) -> jax.Array:
    """The root mean square sine of the principal angles, (B,)."""
    outside = Q - product(Q_old, product(Q_old.mT, Q))
    return frobenius_norm(outside)[:, 0, 0] / Q.shape[-1] ** 0.5
