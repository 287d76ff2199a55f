"""SUMO, subspace-aware moment orthogonalisation: arXiv 2505.24749, Algorithm 1.

Where this differs from the paper, or fills in what it leaves open:
1. The basis sits on the shorter side, or with side="long" on the longer one, as in the algorithm,
   which assumes m >= n.
2. Updates are scaled by `consistent_rms * sqrt(max(m, n))`, as the text says and the listing omits.
3. Four residuals: the listing's raw one, none, one scaled like the subspace's own step, and one
   that is in the polar factor, which is then that of a whole matrix.
4. The first limited norm, and one that follows a zero update, is not limited: there is nothing to
   compare it with.
5. The basis may also follow the gradient a little at a time ("tracking"), without refreshes: the
   next one is that of G Oᵀ, subspace iteration from the rows of the moment, whose basis is O.
6. The subspace is stale where ||QᵀG||² <= ς ||G||², which does not depend on the gradient's scale;
   the paper compares ||QᵀG|| with a number. The basis moves at the step after: QᵀG is known only
   once the step has begun, and with a new basis it would have to be computed again.
7. Where no gradient has given a basis yet, the next one does, whatever the interval.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check, _subspace
from sumo_optax._arguments import documented
from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._gradient import Update, WholeGradients
from sumo_optax._group import Rule
from sumo_optax._linalg import (
    PolarMethod,
    check_polar_method,
    column_norms,
    largest_entry,
    polar_factor,
)
from sumo_optax._matrix import matrix_transformation, of_tree
from sumo_optax._paths import PyTree
from sumo_optax._rank import Rank
from sumo_optax._view import Side
from sumo_optax._with_adamw import with_adamw

Residual = Literal["gradient", "scaled", "orthogonal"] | None


class SumoState(NamedTuple):
    """State of `scale_by_sumo`.

    Basis, moment and norm are trees like the parameters, with a `MaskedNode` for every leaf that is
    not a matrix. They are float32 (float64 for float64 parameters) unless `state_dtype` is given.
    With ``"int8"`` and ``"int4"``, basis and moment are nodes of two such trees, ``values`` and
    ``largest``.
    """

    count: jax.Array  # shape (), int32
    basis: PyTree  # Q, shape (*batch, m, r), m the side that is projected
    moment: PyTree  # M, shape (*batch, r, n), n the other side
    update_norm: PyTree  # of what `norm_growth_limit` limits, shape (*batch,)
    captured: PyTree  # ||QᵀG||² / ||G||² of the last G; 1 without `refresh_below`; shape (*batch,)
    fallback: PyTree  # state of the fallback, which sees a `MaskedNode` for every matrix
    skipped: jax.Array  # updates of a matrix or leaf skipped so far, shape (), int32


@documented()
def scale_by_sumo(
    rank: Rank = 0.25,
    *,
    refresh_every: int | None = None,
    stagger: bool = False,
    refresh_below: float | None = None,
    momentum: jax.typing.ArrayLike = 0.8,
    nesterov: bool = True,
    residual: Residual = "scaled",
    norm_growth_limit: jax.typing.ArrayLike | None = 1.1,
    consistent_rms: jax.typing.ArrayLike | None = 1.0,
    polar: PolarMethod = "auto",
    basis: _subspace.Basis = "tracking",
    side: Side = "short",
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    skip_nonfinite: bool = True,
    state_dtype: jax.typing.DTypeLike | None = None,
    metrics: bool = False,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SUMO: subspace-aware moment orthogonalisation, as a transformation of gradients.

    For one matrix with gradient :math:`G` (m x n, where m is the projected side, transposed if
    needed), basis :math:`Q` (m x r, orthonormal) and moment :math:`M` (r x n):

    .. math::
      \begin{aligned}
      \hat G &= Q^\top G \\
      M &\leftarrow \mu M + \hat G \\
      O &= \mathrm{polar}(M) \\
      D &= s \, Q O + \text{residual}, \quad s = \rho \sqrt{\max(m, n)}
      \end{aligned}

    With `nesterov`, the default, :math:`O = \mathrm{polar}(\mu M + \hat G)`. Every `refresh_every`
    steps the basis moves, :math:`Q \leftarrow Q'`, and the moment moves with it,
    :math:`M \leftarrow Q'^\top Q M`. The state has (m + n) r + 2 numbers for each matrix.

    Args:
      refresh_every: number of steps between two moves of the basis, at least 1. The default is 10
        with ``basis="tracking"`` and 200 otherwise.
      stagger: whether each leaf moves its basis at its own step, spread evenly over the interval.
        After the first step, no step then moves all bases.
      refresh_below: :math:`\varsigma` in [0, 1]. The basis also moves at the step after one with
        :math:`\|Q^\top G\|^2 \le \varsigma \|G\|^2`.
      momentum: :math:`\mu`, in [0, 1).
      nesterov: whether the step looks ahead by one gradient.
      residual: use of the part of the gradient outside the subspace, :math:`R = G - Q \hat G`.
        ``"gradient"`` adds R itself, as Algorithm 1 does. ``"scaled"`` gives each column of R the
        step size of the subspace, :math:`s R_j \|O_j\| / \|\hat G_j\|`. ``"orthogonal"`` takes the
        polar factor of both together, :math:`D = s \, \mathrm{polar}(R + Q M)` or, with Nesterov,
        :math:`s \, \mathrm{polar}(G + \mu Q M)`: it trained best at every rank, and its products of
        m x n matrices cost what Muon's do. None adds nothing, so that updates have rank r.
      norm_growth_limit: :math:`\gamma` > 0. The norm of O, or of the scaled residual if there is
        one, is at most :math:`\gamma` times that of the previous step. None sets no limit, nor does
        ``residual="orthogonal"``, where the norm is the root of the rank.
      consistent_rms: :math:`\rho` > 0 in the formula above. It makes the root mean square of an
        update depend on the rank and not on the shape. None sets s = 1.
      polar: method of the polar factor; see :func:`polar_factor`.
      basis: where the basis moves. ``"tracking"`` moves it to :math:`\mathrm{orth}(G O^\top)` after
        the step, with one product. ``"randomized_svd"`` and ``"svd"`` move it to the dominant left
        subspace of the gradient before the step. ``"random"`` moves it to a random subspace.
      side: the projected side of the matrix; the rows if both sides are equally long. A basis of
        the ``"short"`` side holds more of it and goes stale more slowly. The ``"long"`` side, that
        of the paper, has smaller moments and cheaper polar factors.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`SumoState`. With
      ``optax.inject_hyperparams``, `momentum`, `norm_growth_limit`, `consistent_rms` and `seed` may
      change from step to step; the other arguments are static.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     sumo_optax.scale_by_sumo(rank=4),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      `arXiv 2505.24749 <https://arxiv.org/abs/2505.24749>`_, Algorithm 1.
      ``**sumo_optax.presets.SUMO`` gives this algorithm, with a randomised SVD for the basis;
      ``basis="svd"`` gives it exactly. The scaled residual is that of Fira, `arXiv 2410.01623
      <https://arxiv.org/abs/2410.01623>`_, section 4.
    """
    if refresh_every is None:
        refresh_every = 10 if basis == "tracking" else 200
    refresh_every = _check.integer("refresh_every", refresh_every, least=1)
    _check.number("refresh_below", refresh_below, least=0, most=1, optional=True)
    _check.number("momentum", momentum, least=0, below=1)
    _check.number("norm_growth_limit", norm_growth_limit, above=0, optional=True)
    _check.number("consistent_rms", consistent_rms, above=0, optional=True)
    _check.choice("residual", residual, (*get_args(get_args(Residual)[0]), None))
    check_polar_method(polar)
    _check.choice("basis", basis, get_args(_subspace.Basis))
    _check.choice("side", side, get_args(Side))

    arguments = locals()
    of_stack = _Sumo(*(arguments[name] for name in _Sumo._fields))
    rule = of_stack.rule(rank, side, stagger)
    return matrix_transformation(rule, SumoState, **of_tree(arguments))


class _Sumo(NamedTuple):
    """The algorithm for a stack of matrices, with the arguments of `scale_by_sumo`."""

    refresh_every: int
    refresh_below: float | None
    momentum: jax.typing.ArrayLike
    nesterov: bool
    residual: Residual
    norm_growth_limit: jax.typing.ArrayLike | None
    consistent_rms: jax.typing.ArrayLike | None
    polar: PolarMethod
    basis: _subspace.Basis

    def rule(self, rank: Rank, side: Side, stagger: bool) -> Rule:
        axes = lambda m, n, r: ("mr", "rn", "", "")
        whole = self.residual == "orthogonal"
        return Rule(self.init, self.refresh_due, self.step, axes, rank, side, stagger, whole=whole)

    def init(self, m, n, r, dtype, key):
        Q = _subspace.start(m, r, dtype, key, self.basis)
        return Q, jnp.zeros((r, n), dtype), jnp.zeros((), dtype), jnp.ones((), dtype)

    def refresh_due(self, t, state, phase):
        Q, _, _, captured = state
        due = _subspace.is_refresh_due(t, Q, self.refresh_every, phase)
        return due if self.refresh_below is None else due | (captured <= self.refresh_below)

    def step(self, G, state, t, refresh_due, keys):
        Q, M, last_norm, captured = state
        mu, tracking = self.momentum, self.basis == "tracking"

        def moved(Q, M, new_basis):
            def move():
                Q_new = new_basis()
                return Q_new, _subspace.transport(Q_new, Q, M)

            always = self.refresh_every == 1
            return move() if always else _subspace.refreshed(refresh_due, move, (Q, M))

        # Block 1: the subspace, and the moment carried into it.
        if not tracking:
            Q, M = moved(Q, M, lambda: _subspace.refresh(G, Q, keys(), self.basis))

        # Block 2: the moment, and its polar factor.
        G_hat = G.left_product(Q)
        if self.refresh_below is not None:
            captured = _subspace.captured_energy(G, G_hat)[:, 0, 0]
        M = mu * M + G_hat
        N = mu * M + G_hat if self.nesterov else M
        O = None if self.residual == "orthogonal" else polar_factor(N, method=self.polar)

        # Blocks 3 and 4.
        D, norm = self._in_full_space(G, Q, G_hat, N, O, last_norm)

        # Block 1 of the next step, from what this one has at hand.
        if tracking:
            rows = lambda: polar_factor(N, method=self.polar) if O is None else O
            Q, M = moved(Q, M, lambda: _subspace.track(G, Q, rows()))
        return D, (Q, M, norm, captured)

    def _in_full_space(self, G, Q, G_hat, N, O, last_norm) -> tuple[Update, jax.Array]:
        """Block 3: the limit on the growth of the norm. Block 4: back to the full space."""
        rho, limit = self.consistent_rms, self.norm_growth_limit
        scale = 1.0 if rho is None else rho * max(G.shape) ** 0.5
        if O is None:
            # s polar(Q N + G - Q Ĝ), over a size that a narrow dtype can hold
            weights = jnp.broadcast_to(1 / largest_entry(N), G_hat[:, :1].shape)
            of = lambda X: scale * polar_factor(X, method=self.polar)
            return Update(Q, weights * (N - G_hat), weights, of), last_norm
        if self.residual == "scaled":
            phi = _step_over_gradient(O, G_hat)
            # Where phi is 0 the norm may have overflown.
            norms = jnp.where(phi > 0, phi * _residual_norms(G, G_hat), 0)
            factor, norm = _limited(norms, last_norm, limit)
            phi = factor * phi
            # s (Q O + (G - Q Ĝ) diag(phi))
            return Update(Q, scale * (O - phi * G_hat), scale * phi), norm
        factor, norm = _limited(O, last_norm, limit)
        right = scale * factor * O
        if self.residual == "gradient":  # s Q O + G - Q Ĝ
            return Update(Q, right - G_hat, jnp.ones_like(G_hat[:, :1])), norm
        return Update(Q, right), norm


def _step_over_gradient(O: jax.Array, G_hat: jax.Array) -> jax.Array:
    """||O_j|| / ||Ĝ_j|| for each column j, (B, 1, n): Fira, arXiv 2410.01623, section 4.2.

    0 where the subspace saw nothing but rounding of a column, which says nothing of its step.
    """
    step, gradient = column_norms(O), column_norms(G_hat)
    rounding = jnp.finfo(G_hat.dtype).eps * jnp.max(gradient, axis=-1, keepdims=True)
    seen = gradient > rounding
    return jnp.where(seen, step / jnp.where(seen, gradient, 1), 0)


def _residual_norms(G: WholeGradients, G_hat: jax.Array) -> jax.Array:
    """||G_j - Q Ĝ_j|| for each column j, (B, 1, n), by Pythagoras: the residual is never formed."""
    whole, inside = G.column_norms(scale=G_hat), column_norms(G_hat)
    outside = jnp.maximum(whole - inside, 0)  # two factors, since the squares may overflow
    return jnp.sqrt(outside) * jnp.sqrt(whole + inside)


def _limited(
    X: jax.Array, last_norm: jax.Array, limit: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """The factor (B, 1, 1) that keeps ||X|| at `limit` times the last norm; and the norm then."""
    norm = jnp.linalg.norm(X, axis=(-2, -1))
    if limit is None:
        return jnp.ones_like(norm)[:, None, None], last_norm
    allowed = jnp.where(last_norm > 0, jnp.minimum(norm, limit * last_norm), norm)
    factor = jnp.where(norm > 0, allowed / jnp.where(norm > 0, norm, 1), 1)
    return factor[:, None, None], allowed


@documented(scale_by_sumo)
def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 0.25,
    *,
    refresh_every: int | None = None,
    stagger: bool = False,
    refresh_below: float | None = None,
    momentum: jax.typing.ArrayLike = 0.8,
    nesterov: bool = True,
    residual: Residual = "scaled",
    norm_growth_limit: jax.typing.ArrayLike | None = 1.1,
    consistent_rms: jax.typing.ArrayLike | None = 1.0,
    polar: PolarMethod = "auto",
    basis: _subspace.Basis = "tracking",
    side: Side = "short",
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
    r"""A complete optimizer: SUMO for matrices and AdamW for all other leaves.

    On a byte-level LLaMA with 0.86M parameters, these settings trained best: learning rate 3e-3,
    AdamW's best; `adam_learning_rate` 5e-3; warm-up and cosine decay; clipping by the global norm
    before the optimizer. With ``residual="orthogonal"`` the best scale there is `consistent_rms` 2.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> tx = sumo_optax.sumo(0.1, rank=4)
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> loss = lambda p: jnp.sum(p["dense"]["kernel"] ** 2) + jnp.sum(p["dense"]["bias"] ** 2)
      >>> for _ in range(10):
      ...     updates, state = update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 136)
      True

    References:
      `arXiv 2505.24749 <https://arxiv.org/abs/2505.24749>`_, Algorithm 1.
    """
    return with_adamw(scale_by_sumo, **locals())
