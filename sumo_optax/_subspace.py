"""A basis Q (m x r) of the gradient's dominant left subspace: how it starts, when it moves, how."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sumo_optax._gradient import WholeGradient, left_product, right_product
from sumo_optax._linalg import frobenius_norm, orthonormal_columns, unit_scale

Basis = Literal["tracking", "randomized_svd", "svd", "random"]

# Of a randomised refresh: iterations, two products each, and how much of its start is random.
_ITERATIONS = 2
_RANDOM_PART = 0.3


def check_basis(basis: str) -> None:
    if basis not in get_args(Basis):
        raise ValueError(f"basis must be one of {get_args(Basis)}, got {basis!r}")


def start(m: int, r: int, dtype: jnp.dtype, key: jax.Array, basis: Basis) -> jax.Array:
    """What there is before the first gradient: for tracking any subspace will do, else none, 0."""
    return _random_basis(m, r, dtype, key) if basis == "tracking" else jnp.zeros((m, r), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # `init` is seldom under a jit of its own
def _random_basis(m: int, r: int, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    Y = jax.random.normal(key, (m, r), dtype)
    return orthonormal_columns(Y, Y / m**0.5)


def is_due(t: jax.Array, Q: jax.Array, refresh_every: int, place: float) -> jax.Array:
    """Every `refresh_every` steps, and for as long as no gradient has given a basis yet (Q = 0).

    A matrix at a `place` from 0 to 1 is due at that part of the interval.
    """
    return ((t - int(place * refresh_every)) % refresh_every == 0) | is_missing(Q)


def is_missing(Q: jax.Array) -> jax.Array:
    """Whether no gradient has given a basis yet: one column tells, since a basis has none of 0."""
    return ~jnp.any(Q[:, 0])


def refresh(G: WholeGradient, Q: jax.Array, key: jax.Array, basis: Basis) -> jax.Array:
    """A new basis (m x r) from the gradient G (m x n) and the old one, which a zero G leaves be."""
    m, r = Q.shape
    if basis == "randomized_svd":
        Q_new = _subspace_iteration(G, Q, key)
    elif basis == "svd":
        Q_new = jnp.linalg.svd(unit_scale(G.matrix), full_matrices=False)[0][:, :r]
    else:
        Q_new = _random_basis(m, r, G.dtype, key)
    return jnp.where(jnp.any(G.stored), Q_new, Q)


def track(G: WholeGradient, Q: jax.Array, rows: jax.Array) -> jax.Array:
    """The columns of G seen from the row space of `rows` (r x n, singular values 0 or about 1).

    Half a step of subspace iteration, whose other half made the rows: one product with G. A
    direction in which there is nothing to see stays as it was in Q.
    """
    return orthonormal_columns(right_product(G, rows.T), completion=Q)


def _subspace_iteration(G: WholeGradient, Q: jax.Array, key: jax.Array) -> jax.Array:
    """Warm, from the old basis and some of a random one; cold, Q = 0, from the random one alone.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4, without oversampling: choosing r of
    more columns costs an SVD, and another iteration captures as much.
    """
    omega = jax.random.normal(key, Q.shape, G.dtype) / Q.shape[0] ** 0.5
    Y = Q + _RANDOM_PART * omega
    for _ in range(_ITERATIONS):
        Y = right_product(G, orthonormal_columns(left_product(Y, G).T, passes=1))
    return orthonormal_columns(Y, completion=omega)


def captured_energy(G: jax.Array, G_hat: jax.Array) -> jax.Array:
    """||Ĝ||² / ||G||², the part of the gradient in the subspace; 1 for G, or Gᵀ, of 0."""
    whole = frobenius_norm(G, scale=G_hat)
    inside = frobenius_norm(G_hat, scale=G_hat)
    return jnp.where(whole > 0, inside / jnp.where(whole > 0, whole, 1), 1) ** 2


def transport(Q_new: jax.Array, Q_old: jax.Array, M: jax.Array) -> jax.Array:
    """The moment M (r x n) in the new basis: (Q_newᵀ Q_old) M."""
    return (Q_new.T @ Q_old) @ M


def online_pca_gradient(
    G: WholeGradient, P: jax.Array, G_hat: jax.Array, penalty: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The gradient in P (m x r) of ||PPᵀg - g||² + penalty ||PᵀP - I||², g = G / ||G||; and ||G||.

    With Ĝ = PᵀG, X = gᵀP and S = PᵀP it is 2 (g X (S - 2I) + P XᵀX) + 4 penalty P (S - I): one
    product with G.
    """
    norm = G.norm(scale=G_hat)
    divisor = jnp.where(norm > 0, norm, 1)
    Xt = G_hat / divisor
    gX = right_product(G, Xt.T) / divisor
    S = P.T @ P
    I = jnp.eye(S.shape[0], dtype=S.dtype)
    return gX @ (2 * S - 4 * I) + P @ (2 * Xt @ Xt.T + 4 * penalty * (S - I)), norm
