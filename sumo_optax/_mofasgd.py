"""MoFaSGD, momentum factorised as a rank-r SVD: arXiv 2507.08091.

Where this differs from the paper and the authors' code:
1. The factors start as the rank-r SVD of the first gradient. The authors' code starts them from the
   SVD of the weights, so that weights leak into the momentum.
2. U and V being orthonormal, what GV and GᵀU add to them is factorised, m x r and n x r, instead of
   [U, GV] and [V, GᵀU], m x 2r and n x 2r. Where 2r exceeds n there is less to add than r columns.
3. Directions whose singular value is lost in rounding give 0, not noise. The factors keep r
   orthonormal columns all the same, the old ones where the momentum has no new.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check, _subspace
from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._linalg import above_rounding, orthonormal_columns, svd
from sumo_optax._matrix import PyTree, Rule, descend, lift


class MofasgdState(NamedTuple):
    """State of `scale_by_mofasgd`.

    The factors of the momentum M = U diag(s) Vᵀ are trees like the parameters, with a `MaskedNode`
    for every leaf that is no matrix. They are float32 (float64 for float64 parameters) unless
    `state_dtype` is given.
    """

    count: jax.Array  # shape (), int32
    basis: PyTree  # U, shape (*batch, m, r), m the longer side
    singular_values: PyTree  # s, shape (*batch, r)
    row_basis: PyTree  # V, shape (*batch, n, r), n the shorter side
    fallback: PyTree  # state of the fallback, which sees a `MaskedNode` for every matrix
    skipped: jax.Array  # updates of a matrix or leaf skipped so far, shape (), int32


def scale_by_mofasgd(
    rank: int = 32,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    inverse_limit: jax.typing.ArrayLike | None = None,
    complement: float = 0.0,
    consistent_rms: jax.typing.ArrayLike | None = 0.2,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    skip_nonfinite: bool = True,
    state_dtype: jax.typing.DTypeLike | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""MoFaSGD: momentum kept as a rank-r SVD, as a transformation of gradients.

    For one matrix with gradient :math:`G` (m x n, m >= n, else its transpose) and momentum
    :math:`M = U \,\mathrm{diag}(s)\, V^\top`:

    .. math::
      \begin{aligned}
      U \,\mathrm{diag}(s)\, V^\top &\leftarrow \mathrm{SVD}_r\left(
        U U^\top G + G V V^\top - U U^\top G V V^\top + \beta M \right) \\
      D &= \rho \sqrt{m} \; U \,\mathrm{diag}(d)\, V^\top + c \, (I - U U^\top) G (I - V V^\top)
      \end{aligned}

    with :math:`d_i = 1`: the update's r singular values are all the same. The full right side of
    the first line is never formed. The state is (m + n + 1) r numbers a matrix.

    Args:
      rank: r, at least 1; a matrix whose short side is smaller has that side as its rank.
      momentum: :math:`\beta`, in [0, 1), or a schedule of it. The authors warm it up, from 0.65 to
        0.85 or from 0.75 to 0.95 over 300 steps.
      inverse_limit: a number > 0 makes :math:`d_i = \min(1 / s_i, \text{limit})`, the form of the
        authors' released configurations.
      complement: c >= 0, the part of the gradient outside both subspaces that is added. 0 spares
        its two further products.
      consistent_rms: :math:`\rho` > 0 above, so that an update's root mean square depends on the
        rank, not on the shape. None for a factor of 1.
      weight_dimension_numbers, fallback, skip_nonfinite, state_dtype, seed: those of
        :func:`scale_by_sumo`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`MofasgdState`. With
      ``optax.inject_hyperparams``, `momentum`, `inverse_limit`, `consistent_rms` and `seed` may
      change from step to step; the other arguments are static.

    Raises:
      ValueError, TypeError: an argument is not as above; at init, a spec does not fit its leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> tx = optax.chain(
      ...     sumo_optax.scale_by_mofasgd(4, momentum=optax.linear_schedule(0.75, 0.95, 300)),
      ...     optax.scale_by_learning_rate(1e-2),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      `arXiv 2507.08091 <https://arxiv.org/abs/2507.08091>`_, Algorithm 1.
    """
    rank = _check.integer("rank", rank, least=1)
    if not callable(momentum):
        _check.number("momentum", momentum, least=0, below=1)
    _check.number("inverse_limit", inverse_limit, above=0, optional=True)
    _check.number("complement", complement, least=0)
    _check.number("consistent_rms", consistent_rms, above=0, optional=True)

    def init(m, n, dtype, key):
        r = min(rank, n)
        return jnp.zeros((m, r), dtype), jnp.zeros(r, dtype), jnp.zeros((n, r), dtype)

    def due(t, state, place):
        _, s, _ = state
        return ~jnp.any(s)

    def step(G, state, t, due, key):
        beta = momentum(t) if callable(momentum) else momentum
        U, s, V = state

        def begun():
            """Matrices without momentum take the gradient's; others of the batch go on."""
            new = _truncated_svd(G, state, key)
            return jax.tree.map(lambda x, y: jnp.where(jnp.any(s), x, y), moved, new)

        moved = _tangent_step(G, state, beta)
        U, s, V = jax.lax.cond(due, begun, lambda: moved)

        d = jnp.where(above_rounding(s), 1.0, 0.0)
        if inverse_limit is not None:
            d *= jnp.minimum(1 / jnp.where(d > 0, s, 1), inverse_limit)
        scale = 1.0 if consistent_rms is None else consistent_rms * max(G.shape) ** 0.5
        D = (scale * U * d) @ V.T
        if complement:
            outside = G - U @ (U.T @ G)
            D += complement * (outside - (outside @ V) @ V.T)
        return D, (U, s, V)

    return lift(
        Rule(init, due, step),
        MofasgdState,
        fallback=fallback,
        weight_dimension_numbers=weight_dimension_numbers,
        skip_nonfinite=skip_nonfinite,
        state_dtype=state_dtype,
        seed=seed,
    )


def _truncated_svd(G: jax.Array, state, key: jax.Array):
    """The rank-r SVD of G, by way of its dominant subspace and an r x r core."""
    U, _, V = state
    U = _subspace.refresh(G, U, key, "randomized_svd")
    rows = G.T @ U
    V = orthonormal_columns(rows, completion=jax.random.normal(key, V.shape) / V.shape[0] ** 0.5)
    W, s, Z = svd(rows.T @ V)
    return U @ W, s, V @ Z


def _tangent_step(G: jax.Array, state, beta: jax.typing.ArrayLike):
    """SVD_r of the projection of G on the tangent space at (U, V), plus beta M.

    With GV = U C + X R and GᵀU = V Cᵀ + Y S, X and Y orthonormal to U and V, the sum is
    [U X] [[C + beta diag(s), Sᵀ], [R, 0]] [V Y]ᵀ.
    """
    U, s, V = state
    GV, GU = G @ V, G.T @ U
    C = U.T @ GV
    X, R = _beyond(GV - U @ C)
    Y, S = _beyond(GU - V @ C.T)
    core = jnp.block([[C + beta * jnp.diag(s), S.T], [R, jnp.zeros_like(R)]])
    W, s, Z = svd(core)
    r = U.shape[1]
    W, s, Z = W[:, :r], s[:r], Z[:, :r]
    found = above_rounding(s)
    return (
        _orthonormal(U @ W[:r] + X @ W[r:], found, U),
        s,
        _orthonormal(V @ Z[:r] + Y @ Z[r:], found, V),
    )


def _beyond(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X, R of y = X R, X with orthonormal columns or, where y has fewer than r directions, 0."""
    X = orthonormal_columns(y)
    return X, X.T @ y


def _orthonormal(columns: jax.Array, found: jax.Array, old: jax.Array) -> jax.Array:
    """Rounding mended; and an old column for each that was not found."""
    return orthonormal_columns(jnp.where(found, columns, 0), completion=old)


def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 32,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    inverse_limit: jax.typing.ArrayLike | None = None,
    complement: float = 0.0,
    consistent_rms: jax.typing.ArrayLike | None = 0.2,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps: jax.typing.ArrayLike = 1e-8,
    adam_weight_decay: jax.typing.ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    skip_nonfinite: bool = True,
    state_dtype: jax.typing.DTypeLike | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""MoFaSGD for matrices and AdamW for all other leaves: a whole optimizer.

    .. math:: W \leftarrow W - \eta \, (D + \lambda W)

    with D of :func:`scale_by_mofasgd`, learning rate :math:`\eta` and weight decay :math:`\lambda`.

    Args:
      learning_rate: a number or an optax schedule.
      rank, momentum, inverse_limit, complement, consistent_rms, weight_dimension_numbers,
        skip_nonfinite, state_dtype, seed: those of :func:`scale_by_mofasgd`.
      weight_decay, weight_decay_mask, adam_b1, adam_b2, adam_eps, adam_weight_decay,
        adam_learning_rate: those of :func:`sumo`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs the parameters.

    Raises:
      ValueError, TypeError: as :func:`scale_by_mofasgd`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> tx = sumo_optax.mofasgd(0.1, rank=4)
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> loss = lambda p: jnp.sum(p["dense"]["kernel"] ** 2) + jnp.sum(p["dense"]["bias"] ** 2)
      >>> for _ in range(10):
      ...     updates, state = update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 136)
      True

    References:
      `arXiv 2507.08091 <https://arxiv.org/abs/2507.08091>`_, Algorithm 1.
    """
    return optax.chain(
        scale_by_mofasgd(
            rank,
            momentum=momentum,
            inverse_limit=inverse_limit,
            complement=complement,
            consistent_rms=consistent_rms,
            weight_dimension_numbers=weight_dimension_numbers,
            fallback=optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
            skip_nonfinite=skip_nonfinite,
            state_dtype=state_dtype,
            seed=seed,
        ),
        descend(
            learning_rate,
            weight_decay,
            weight_decay_mask,
            adam_learning_rate,
            adam_weight_decay,
            weight_dimension_numbers,
        ),
    )
