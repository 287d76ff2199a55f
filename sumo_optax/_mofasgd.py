"""MoFaSGD, momentum factorised as a rank-r SVD: arXiv 2507.08091.

Where this differs from the paper and the authors' code:
1. The factors start as the rank-r SVD of the first gradient. The authors' code starts them from the
   SVD of the weights, so that weights leak into the momentum.
2. U and V being orthonormal, what GV and GᵀU add to them is factorised, m x r and n x r, instead of
   [U, GV] and [V, GᵀU], m x 2r and n x 2r. Where 2r exceeds n there is less to add than r columns.
3. Directions whose singular value is lost in rounding give 0, not noise. The factors keep r
   orthonormal columns all the same, the old ones where the momentum has no new.
4. The momentum is the sum beta M + G of the authors' code. A mean has the same U and V, and so the
   same update with d = 1.
5. The complement has the U and V of before the step, as the authors' code by default. It is what
   the momentum does not see of G, and needs no product with G that the momentum does not. In the
   first step it is what the SVD leaves out.
6. Updates are scaled by `consistent_rms * sqrt(m)`; None is the paper's and the code's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check, _subspace
from sumo_optax._arguments import documented
from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._gradient import Update, WholeGradients
from sumo_optax._group import Rule
from sumo_optax._linalg import above_rounding, orthonormal_columns, product, svd
from sumo_optax._matrix import matrix_transformation, of_tree
from sumo_optax._paths import PyTree
from sumo_optax._rank import Rank
from sumo_optax._with_adamw import with_adamw


class MofasgdState(NamedTuple):
    """State of `scale_by_mofasgd`.

    The factors of the momentum M = U diag(s) Vᵀ are trees like the parameters, with a `MaskedNode`
    for every leaf that is not a matrix. They are float32 (float64 for float64 parameters) unless
    `state_dtype` is given.
    """

    count: jax.Array  # shape (), int32
    basis: PyTree  # U, shape (*batch, m, r), m the longer side
    singular_values: PyTree  # s, shape (*batch, r)
    row_basis: PyTree  # V, shape (*batch, n, r), n the shorter side
    fallback: PyTree  # state of the fallback, which sees a `MaskedNode` for every matrix
    skipped: jax.Array  # updates of a matrix or leaf skipped so far, shape (), int32


@documented()
def scale_by_mofasgd(
    rank: Rank = 0.25,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    inverse_limit: jax.typing.ArrayLike | None = None,
    complement: float = 0.0,
    consistent_rms: jax.typing.ArrayLike | None = 0.5,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    skip_nonfinite: bool = True,
    state_dtype: jax.typing.DTypeLike | None = None,
    metrics: bool = False,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""MoFaSGD: momentum kept as a rank-r SVD, as a transformation of gradients.

    For one matrix with gradient :math:`G` (m x n) and momentum
    :math:`M = U \,\mathrm{diag}(s)\, V^\top`:

    .. math::
      \begin{aligned}
      & U \,\mathrm{diag}(s)\, V^\top \leftarrow \mathrm{SVD}_r\bigl(
        U U^\top G + G V V^\top \\
      & \qquad {} - U U^\top G V V^\top + \beta M \bigr) \\
      & D = \rho \sqrt{\max(m, n)} \; U \,\mathrm{diag}(d)\, V^\top \\
      & \qquad {} + c \, (I - U_- U_-^\top) G (I - V_- V_-^\top)
      \end{aligned}

    with :math:`d_i = 1`, so that all r singular values of the update are equal. :math:`U_-` and
    :math:`V_-` are the factors before the step. The step never computes the m x n matrix
    in brackets. The state has (m + n + 1) r numbers for each matrix.

    Args:
      momentum: :math:`\beta` in [0, 1), or a schedule of it. The authors raise it over 300 steps,
        from 0.65 to 0.85 or from 0.75 to 0.95.
      inverse_limit: a number > 0 sets :math:`d_i = \min(1 / s_i, \text{limit})`, as in the
        configurations that the authors released.
      complement: c >= 0, the factor of the gradient outside both subspaces, which the momentum does
        not see.
      consistent_rms: :math:`\rho` > 0 in the formula above. It makes the root mean square of an
        update depend on the rank and not on the shape. None sets the factor to 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`MofasgdState`. With
      ``optax.inject_hyperparams``, `momentum`, `inverse_limit`, `consistent_rms` and `seed` may
      change from step to step; the other arguments are static.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> tx = optax.chain(
      ...     sumo_optax.scale_by_mofasgd(4, momentum=optax.linear_schedule(0.75, 0.95, 300)),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    References:
      `arXiv 2507.08091 <https://arxiv.org/abs/2507.08091>`_, Algorithm 1.
      ``**sumo_optax.presets.MOFASGD`` gives this algorithm.
    """
    if not callable(momentum):
        _check.number("momentum", momentum, least=0, below=1)
    _check.number("inverse_limit", inverse_limit, above=0, optional=True)
    _check.number("complement", complement, least=0)
    _check.number("consistent_rms", consistent_rms, above=0, optional=True)

    def init(m, n, r, dtype, key):
        return jnp.zeros((m, r), dtype), jnp.zeros(r, dtype), jnp.zeros((n, r), dtype)

    def refresh_due(t, state, phase):
        _, s, _ = state
        return ~jnp.any(s, axis=-1)

    def step(G, state, t, refresh_due, keys):
        beta = momentum(t) if callable(momentum) else momentum
        U, s, V = state

        begin = lambda: _beginning(G, U, V, keys())
        U, V, spare = _subspace.refreshed(refresh_due, begin, (U, V, V))
        seen = _Seen.of(G, U, V)
        U, s, V = _tangent_step(seen, s[:, None], beta, spare)

        d = jnp.where(above_rounding(s), 1.0, 0.0)
        if inverse_limit is not None:
            d *= jnp.minimum(1 / jnp.where(d > 0, s, 1), inverse_limit)
        scale = 1.0 if consistent_rms is None else consistent_rms * max(G.shape) ** 0.5
        D = Update(U, (scale * V * d).mT)
        if complement:
            D = _with_complement(D, seen, complement)
        return D, (U, s[:, 0], V)

    rule = Rule(init, refresh_due, step, lambda m, n, r: ("mr", "r", "nr"), rank)
    return matrix_transformation(rule, MofasgdState, **of_tree(locals()))


def _beginning(
    G: WholeGradients, U: jax.Array, V: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The dominant subspace of G, from which a step with V = 0 makes G's rank-r SVD."""
    n, r = V.shape[-2:]
    random = jax.vmap(lambda key: jax.random.normal(key, (n, r), V.dtype))(keys)
    return _subspace.refresh(G, U, keys, "randomized_svd"), jnp.zeros_like(V), random / n**0.5


class _Seen(NamedTuple):
    """All that a step sees of G: its products with the U and V of before the step."""

    U: jax.Array
    V: jax.Array
    UG: jax.Array  # UᵀG
    C: jax.Array  # UᵀGV
    beyond: jax.Array  # GV - UC

    @classmethod
    def of(cls, G: WholeGradients, U: jax.Array, V: jax.Array) -> "_Seen":
        GV = G.right_product(V)
        C = product(U.mT, GV)
        return cls(U, V, G.left_product(U), C, GV - product(U, C))


def _with_complement(D: Update, seen: _Seen, c: float) -> Update:
    """D + c (I - UUᵀ) G (I - VVᵀ): c G, and a part of rank 3r."""
    left = jnp.concatenate([D.left, seen.U, seen.beyond], axis=-1)
    right = jnp.concatenate([D.right, -c * seen.UG, -c * seen.V.mT], axis=-2)
    return Update(left, right, jnp.full_like(right[:, :1], c))


def _tangent_step(seen: _Seen, s: jax.Array, beta: jax.typing.ArrayLike, spare: jax.Array):
    """SVD_r of the projection of G on the tangent space at (U, V), plus beta M.

    With GV = U C + X R and GᵀU = V Cᵀ + Y S, X and Y orthonormal to U and V, the sum is
    [U X] [[C + beta diag(s), Sᵀ], [R, 0]] [V Y]ᵀ. Where that has rank less than r, the columns of
    U and those of `spare` take the places left in the new U and V.
    """
    U, V, UG, C, beyond = seen
    X, R = _beyond(beyond)
    Y, S = _beyond(UG.mT - product(V, C.mT))
    I = jnp.eye(s.shape[-1], dtype=s.dtype)[None]
    core = jnp.block([[C + beta * s * I, S.mT], [R, jnp.zeros_like(R)]])
    W, s, Z = svd(core)
    r = U.shape[-1]
    W, s, Z = W[..., :r], s[..., :r], Z[..., :r]
    found = above_rounding(s)
    return (
        _completed(product(U, W[:, :r]) + product(X, W[:, r:]), found, U),
        s,
        _completed(product(V, Z[:, :r]) + product(Y, Z[:, r:]), found, spare),
    )


def _beyond(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X, R of y = X R, X with orthonormal columns or, where y has fewer than r directions, 0."""
    X = orthonormal_columns(y)
    return X, product(X.mT, y)


def _completed(columns: jax.Array, found: jax.Array, spare: jax.Array) -> jax.Array:
    """Rounding mended; and for each column not found, what a spare one adds to the others."""
    columns, spare = jnp.where(found, columns, 0), jnp.where(found, 0, spare)
    inside = product(columns, product(columns.mT, spare))
    return orthonormal_columns(columns + spare - inside)


@documented(scale_by_mofasgd)
def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 0.25,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    inverse_limit: jax.typing.ArrayLike | None = None,
    complement: float = 0.0,
    consistent_rms: jax.typing.ArrayLike | None = 0.5,
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
    metrics: bool = False,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""A complete optimizer: MoFaSGD for matrices and AdamW for all other leaves.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> tx = sumo_optax.mofasgd(0.1, rank=4, adam_learning_rate=0.01)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> bool(jnp.all(updates["dense"]["kernel"] < 0))
      True

    References:
      `arXiv 2507.08091 <https://arxiv.org/abs/2507.08091>`_, Algorithm 1.
    """
    return with_adamw(scale_by_mofasgd, **locals())
