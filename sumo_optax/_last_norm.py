"""Clipping where the gradients of a step are never there together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check


class LastNormState(NamedTuple):
    """State of `clip_by_last_norm`."""

    squared: jax.Array  # float32 scalar: ||g||² of the last gradients


def clip_by_last_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips gradients by their global norm at the previous step.

    .. math:: g_t \\leftarrow g_t \\min(1, c / \\|g_{t-1}\\|)

    The global norm is known only when all gradients exist, and with :func:`value_and_update` they
    never exist at once. The first step is not clipped.

    Args:
      max_norm: c, above 0.

    Returns:
      An ``optax.GradientTransformation`` with state :class:`LastNormState`.

    Raises:
      ValueError, TypeError: `max_norm` is not a positive number.

    Examples:
      >>> import optax, sumo_optax
      >>> tx = optax.chain(sumo_optax.clip_by_last_norm(1.0), optax.adamw(1e-3))
    """
    _check.number("max_norm", max_norm, above=0)

    def init(params):
        del params
        return LastNormState(jnp.zeros([], jnp.float32))

    def update(updates, state, params=None):
        del params
        norm = jnp.sqrt(state.squared)
        usable = jnp.isfinite(norm) & (norm > 0)
        scale = jnp.where(usable, jnp.minimum(1, max_norm / jnp.where(usable, norm, 1)), 1)
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        squared = sum(map(square, jax.tree.leaves(updates)), start=jnp.zeros([], jnp.float32))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), LastNormState(squared)

    return optax.GradientTransformation(init, update)
