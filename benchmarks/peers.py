"""Low-rank optimizers that no package for JAX has: APOLLO, APOLLO-Mini and Fira.

APOLLO is arXiv 2412.05270, algorithm 1; Fira is arXiv 2410.01623, algorithm 1. Both hold Adam's
moments of R = PᵀG for a gradient G of m x n with m <= n (a taller one is transposed), and read
from them how Adam would scale each column.

The papers write Adam without its bias correction. Their published code multiplies by the correction
after the limiter, adds 1e-6 to the root of the second moment, and 1e-8 to a norm that divides; here
it is the same.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from common import optimizers

B1, B2, EPS, NORM_EPS = 0.9, 0.999, 1e-6, 1e-8
GROWTH = 1.01  # of a norm from step to step, at most
REFRESH_EVERY = 200


class PeerState(NamedTuple):
    """Trees like the parameters, but for `count`."""

    count: jax.typing.ArrayLike
    basis: Any  # m x r; None where it is drawn from a seed
    mu: Any  # r x n
    nu: Any  # r x n
    norm: Any  # of what was limited at the last step


def limited(X: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X with a norm of at most GROWTH times the last one, and its norm."""
    norm = jnp.linalg.norm(X)
    most = jnp.where(last > 0, GROWTH * last, jnp.inf)
    factor = jnp.where(norm > most, most / norm, 1.0)
    return factor * X, factor * norm


def random_projection(seed: int, leaf: int, renewals: Any, shape: tuple[int, int]) -> jax.Array:
    """m x r, of variance 1 / r."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), leaf), renewals)
    return jax.random.normal(key, shape) / math.sqrt(shape[1])


def top_left_vectors(G: jax.Array, rank: int) -> jax.Array:
    return jnp.linalg.svd(G, full_matrices=False)[0][:, :rank]


def per_matrix(rank: int, keeps_basis: bool, step: Callable[..., Any]) -> Any:
    """A transformation from `step(G, basis, mu, nu, norm, count, leaf)` for one matrix, m <= n.

    Further axes of a leaf, before its last two, are those of a stack of matrices.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def init_leaf(path, p):
        if p.ndim < 2:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"peers train matrices alone, got {name} of shape {p.shape}")
        *layers, m, n = *p.shape[:-2], *sorted(p.shape[-2:])
        moment = lambda: jnp.zeros((*layers, min(rank, m), n))
        basis = jnp.zeros((*layers, m, min(rank, m))) if keeps_basis else None
        return basis, moment(), moment(), jnp.zeros(layers)

    def init(params):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        columns = zip(*(init_leaf(path, p) for path, p in leaves), strict=True)
        return PeerState(jnp.zeros([], jnp.int32), *map(treedef.unflatten, columns))

    def step_leaf(leaf, G, count, *state):
        tall = G.shape[-2] > G.shape[-1]
        one = lambda *given: step(*given, count, leaf)
        for _ in G.shape[:-2]:
            one = jax.vmap(one)
        D, *new = one((G.mT if tall else G).astype(jnp.float32), *state)
        return (D.mT if tall else D).astype(G.dtype), *new

    def update(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        rows = zip(leaves, *map(treedef.flatten_up_to, state[1:]), strict=True)
        new = [step_leaf(leaf, G, state.count, *row) for leaf, (G, *row) in enumerate(rows)]
        directions, *trees = map(treedef.unflatten, zip(*new, strict=True))
        return directions, PeerState(optax.safe_increment(state.count), *trees)

    return optax.GradientTransformation(init, update)


def adam(R: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's direction before its bias correction, and the moments."""
    mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
    return mu / (jnp.sqrt(nu) + EPS), mu, nu


def bias_correction(count: jax.Array) -> jax.Array:
    t = (count + 1).astype(jnp.float32)
    return jnp.sqrt(1 - B2**t) / (1 - B1**t)


def scaling(N: jax.Array, R: jax.Array, axis: int | None) -> jax.Array:
    """How much larger Adam's direction is than the gradient, of each column or of all."""
    return jnp.linalg.norm(N, axis=axis) / (jnp.linalg.norm(R, axis=axis) + NORM_EPS)


def scale_by_apollo(
    rank: int,
    scale_type: Literal["channel", "tensor"] = "channel",
    alpha: float = 1.0,
    refresh_every: int = REFRESH_EVERY,
    seed: int = 0,
) -> optax.GradientTransformation:
    """D = α G diag(s): the gradient, scaled as Adam scales a random projection of it."""
    axis = 0 if scale_type == "channel" else None

    def step(G, basis, mu, nu, norm, count, leaf):
        shape = G.shape[0], mu.shape[0]
        R = random_projection(seed, leaf, count // refresh_every, shape).T @ G
        N, mu, nu = adam(R, mu, nu)
        D, norm = limited(scaling(N, R, axis) * G, norm)
        return alpha * bias_correction(count) * D, basis, mu, nu, norm

    return per_matrix(rank, False, step)


def scale_by_apollo_mini(
    refresh_every: int = REFRESH_EVERY, seed: int = 0
) -> optax.GradientTransformation:
    """APOLLO of rank 1 with one scale for a matrix; α = √128 makes up for so low a rank."""
    return scale_by_apollo(1, "tensor", math.sqrt(128), refresh_every, seed)


def scale_by_fira(rank: int, refresh_every: int = REFRESH_EVERY) -> optax.GradientTransformation:
    """D = P N + (G - P R) diag(s): GaLore's Adam, and what is outside its subspace scaled alike."""

    def step(G, basis, mu, nu, norm, count, leaf):
        del leaf
        newest = lambda: top_left_vectors(G, basis.shape[1])
        basis = jax.lax.cond(count % refresh_every == 0, newest, lambda: basis)
        R = basis.T @ G
        N, mu, nu = adam(R, mu, nu)
        outside, norm = limited(scaling(N, R, 0) * (G - basis @ R), norm)
        return bias_correction(count) * (basis @ N + outside), basis, mu, nu, norm

    return per_matrix(rank, True, step)


def on_matrices(tx, adam_learning_rate, weight_decay) -> optax.GradientTransformation:
    """`tx` for the projections, AdamW for the rest."""
    label = lambda path, _: "matrix" if optimizers.is_matrix(path) else "adamw"
    rest = optax.adamw(adam_learning_rate, weight_decay=weight_decay)
    return optax.partition(
        {"matrix": tx, "adamw": rest}, lambda params: jax.tree.map_with_path(label, params)
    )


def complete(scale_by, learning_rate, adam_learning_rate, weight_decay):
    tx = optax.chain(
        scale_by,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return on_matrices(tx, adam_learning_rate, weight_decay)


def apollo(learning_rate, *, rank, adam_learning_rate, weight_decay):
    return complete(scale_by_apollo(rank), learning_rate, adam_learning_rate, weight_decay)


def apollo_mini(learning_rate, *, adam_learning_rate, weight_decay):
    return complete(scale_by_apollo_mini(), learning_rate, adam_learning_rate, weight_decay)


def fira(learning_rate, *, rank, adam_learning_rate, weight_decay):
    return complete(scale_by_fira(rank), learning_rate, adam_learning_rate, weight_decay)
