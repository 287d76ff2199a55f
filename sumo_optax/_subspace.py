"""A basis Q (m x r) of a gradient's dominant left subspace: its start and its moves."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sumo_optax._gradient import WholeGradients
from sumo_optax._linalg import choose, frobenius_norm, orthonormal_columns, product

Basis = Literal["tracking", "randomized_svd", "svd", "random"]

# Of a randomised refresh: iterations, two products each, and how much of its start is random.
_ITERATIONS = 2
_RANDOM_PART = 0.3


def start(m: int, r: int, dtype: jnp.dtype, key: jax.Array, basis: Basis) -> jax.Array:
    """The basis before the first gradient, (m, r).

    Tracking starts from a random subspace, which it then improves. Elsewhere there is no basis yet,
    which is Q = 0.
    """
    return _random_basis(m, r, dtype, key) if basis == "tracking" else jnp.zeros((m, r), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # `init` is seldom under a jit of its own
def _random_basis(m: int, r: int, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    Y = jax.random.normal(key, (m, r), dtype)
    return orthonormal_columns(Y, Y / m**0.5)


def is_refresh_due(t: jax.Array, Q: jax.Array, refresh_every: int, phase: float) -> jax.Array:
    """Which matrices get a new basis in step t, (B,).

    All do in every step that is a multiple of `refresh_every`, or at the part `phase`, from 0 to 1,
    of each such interval. A matrix without a basis (Q = 0) always does.
    """
    return ((t - int(phase * refresh_every)) % refresh_every == 0) | is_missing(Q)


def is_missing(Q: jax.Array) -> jax.Array:
    """Which bases, (B,), are not made yet: their first column is 0, which no basis has."""
    return ~jnp.any(Q[..., 0], axis=-1)


def refreshed(refresh_due: jax.Array | None, move: Callable[[], Any], stay: Any) -> Any:
    """What `move` gives for the matrices whose refresh is due, `stay` for the others.

    `move` runs only in steps in which some matrix is due. `refresh_due` is None for projected
    gradients, from which no basis can be made.
    """
    if refresh_due is None:
        return stay
    return jax.lax.cond(
        jnp.any(refresh_due), lambda: choose(refresh_due, move(), stay), lambda: stay
    )


def refresh(G: WholeGradients, Q: jax.Array, keys: jax.Array, basis: Basis) -> jax.Array:
    """New bases (B, m, r) from the gradients G and the old ones, which a zero G leaves be."""
    m, r = Q.shape[-2:]
    if basis == "randomized_svd":
        Q_new = _subspace_iteration(G, Q, keys)
    elif basis == "svd":
        Q_new = G.left_singular_vectors(r)
    else:
        Q_new = jax.vmap(functools.partial(_random_basis, m, r, Q.dtype))(keys)
    return jnp.where(G.are_zero(), Q, Q_new)


def track(G: WholeGradients, Q: jax.Array, rows: jax.Array) -> jax.Array:
    """The columns of G seen from the row space of `rows` (B, r, n), singular values 0 or about 1.

    Half a step of subspace iteration, whose other half made the rows: one product with G. A
    direction in which there is nothing to see stays as it was in Q.
    """
    return orthonormal_columns(G.right_product(rows.mT), completion=Q)


def _subspace_iteration(G: WholeGradients, Q: jax.Array, keys: jax.Array) -> jax.Array:
    """Warm, from the old basis and some of a random one; cold, Q = 0, from the random one alone.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4, without oversampling: choosing r of
    more columns costs an SVD, and another iteration captures as much.
    """
    m, r = Q.shape[-2:]
    omega = jax.vmap(lambda key: jax.random.normal(key, (m, r), Q.dtype))(keys) / m**0.5
    Y = Q + _RANDOM_PART * omega
    for _ in range(_ITERATIONS):
        Y = G.right_product(orthonormal_columns(G.left_product(Y).mT))
    return orthonormal_columns(Y, completion=omega)


def captured_energy(G: WholeGradients, G_hat: jax.Array) -> jax.Array:
    """||Ĝ||² / ||G||², the part of the gradient in the subspace; 1 for G of 0; shape (B, 1, 1)."""
    whole = G.norms(scale=G_hat)
    inside = frobenius_norm(G_hat)
    return jnp.where(whole > 0, inside / jnp.where(whole > 0, whole, 1), 1) ** 2


def transport(Q_new: jax.Array, Q_old: jax.Array, M: jax.Array) -> jax.Array:
    """The moment M (B, r, n) in the new basis: (Q_newᵀ Q_old) M."""
    return product(product(Q_new.mT, Q_old), M)


def online_pca_gradient(
    G: WholeGradients, P: jax.Array, G_hat: jax.Array, penalty: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The gradient in P of ||PPᵀg - g||² + penalty ||PᵀP - I||², g = G / ||G||; and ||G||.

    P is (B, m, r). With Ĝ = PᵀG, X = gᵀP and S = PᵀP it is
    2 (g X (S - 2I) + P XᵀX) + 4 penalty P (S - I): one product with G.
    """
    norm = G.norms(scale=G_hat)
    divisor = jnp.where(norm > 0, norm, 1)
    Xt = G_hat / divisor
    gX = G.right_product(Xt.mT) / divisor
    S = product(P.mT, P)
    I = jnp.eye(S.shape[-1], dtype=S.dtype)[None]
    pull = 2 * product(Xt, Xt.mT) + 4 * penalty * (S - I)
    return product(gX, 2 * S - 4 * I) + product(P, pull), norm
