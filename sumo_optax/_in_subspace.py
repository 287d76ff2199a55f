"""Any optax transformation, run on gradients projected on a subspace.

With Adam and a basis from SVDs this is GaLore, arXiv 2403.03507; with one that online PCA moves,
Online Subspace Descent, arXiv 2408.12857. Where it fills in what the latter leaves open:
1. The basis starts as the dominant subspace of the first gradient; it takes no step then.
2. A gradient of zero has no direction for online PCA to follow: nothing moves then, and the states
   of both optimizers are left as they were.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check, _subspace
from sumo_optax._arguments import documented
from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._gradient import Update
from sumo_optax._group import Rule
from sumo_optax._linalg import choose, product
from sumo_optax._matrix import matrix_transformation, of_tree
from sumo_optax._paths import PyTree, map_named
from sumo_optax._rank import Rank
from sumo_optax._view import Side

SubspaceBasis = Literal["randomized_svd", "svd", "random", "online_pca"]

# Names that optax gives to running means of gradients, and of their squares.
FIRST_MOMENTS = {"mu", "trace"}
_SECOND_MOMENTS = {"nu", "v"}


class SubspaceState(NamedTuple):
    """State of `scale_in_subspace` and `scale_by_online_subspace_descent`.

    Basis and states are trees like the parameters, with a `MaskedNode` for every leaf that is not
    a matrix. They are float32 (float64 for float64 parameters) unless `state_dtype` is given.
    """

    count: jax.Array  # shape (), int32
    basis: PyTree  # P, shape (*batch, p, r), p the side that is projected
    projector: PyTree  # state of the basis' optimizer, with arrays like P; () where there is none
    inner: PyTree  # state of the inner optimizer, with arrays like PᵀG, shape (*batch, r, q)
    fallback: PyTree  # state of the fallback, which sees a `MaskedNode` for every matrix
    skipped: jax.Array  # updates of a matrix or leaf skipped so far, shape (), int32


class OnlinePCA(NamedTuple):
    """How online PCA moves a basis."""

    optimizer: Any  # a GradientTransformation of the one array P
    learning_rate: optax.ScalarOrSchedule
    penalty: jax.typing.ArrayLike


@documented()
def scale_in_subspace(
    inner: optax.GradientTransformation,
    rank: Rank = 0.25,
    *,
    basis: SubspaceBasis = "randomized_svd",
    refresh_every: int | None = None,
    stagger: bool = False,
    side: Side = "long",
    transport: bool = False,
    scale: jax.typing.ArrayLike = 1.0,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    skip_nonfinite: bool = True,
    state_dtype: jax.typing.DTypeLike | None = None,
    metrics: bool = False,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs any optax transformation on gradients that are projected onto a subspace.

    For one matrix with gradient :math:`G` (m x n, where m is the projected side) and basis
    :math:`P` (m x r, orthonormal):

    .. math:: \hat G = P^\top G, \quad \Delta = \mathrm{inner}(\hat G), \quad D = a P \Delta

    With Adam and the basis ``"svd"`` this is GaLore, and it agrees with ``optax.contrib.galore``.

    Args:
      inner: the transformation. Each matrix has its own inner state. `inner` must not read
        parameters: it receives zeros of the shape of :math:`\hat G` in their place.
      basis: where the basis moves. ``"randomized_svd"`` and ``"svd"`` move it to the dominant
        subspace of the gradient every `refresh_every` steps. ``"random"`` moves it to a random
        subspace. ``"online_pca"`` moves it at every step, as in
        :func:`scale_by_online_subspace_descent`.
      refresh_every: number of steps between two moves of the basis, at least 1; by default 200.
      stagger: whether each leaf moves its basis at its own step, as in :func:`scale_by_sumo`.
      side: the projected side of the matrix; the rows if both sides are equally long. The
        ``"long"`` side has the smallest state. The papers of GaLore and Online Subspace Descent
        project the ``"short"`` side.
      transport: whether the inner state moves into the new basis, with
        :math:`T = P_{new}^\top P_{old}`. Means of gradients (``mu`` and ``trace`` in optax) become
        :math:`T \mu`. Means of squares (``nu``, ``v``) become :math:`(T \circ T) \nu`, which is
        exact for uncorrelated coordinates and never negative. Without transport both stay
        unchanged, as in GaLore. ``basis="online_pca"`` excludes `transport`, `stagger` and
        `refresh_every`.
      scale: the factor a > 0 of the update, as in GaLore.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`SubspaceState`.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> galore = optax.chain(
      ...     sumo_optax.scale_in_subspace(optax.scale_by_adam(), rank=4, basis="svd", scale=0.25),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> state = galore.init(params)
      >>> updates, state = galore.update(params, state, params)

    References:
      GaLore, `arXiv 2403.03507 <https://arxiv.org/abs/2403.03507>`_, Algorithm 2.
    """
    _check.choice("basis", basis, get_args(SubspaceBasis))
    online = basis == "online_pca"
    periodic = {"refresh_every": refresh_every, "stagger": stagger, "transport": transport}
    for name, value in periodic.items():
        if online and value:
            raise ValueError(
                f"basis='online_pca' moves at every step and takes no {name}, got {value!r}"
            )
    return in_subspace(
        inner,
        rank,
        basis="randomized_svd" if online else basis,
        online_pca=OnlinePCA(optax.scale_by_adam(), 0.005, 0.1) if online else None,
        refresh_every=200 if refresh_every is None else refresh_every,
        stagger=stagger,
        side=side,
        transport=transport,
        scale=scale,
        **of_tree(locals()),
    )


def in_subspace(
    inner: Any,  # a GradientTransformation of the one array PᵀG
    rank: Rank,
    *,
    basis: _subspace.Basis = "randomized_svd",
    online_pca: OnlinePCA | None,
    refresh_every: int = 1,
    stagger: bool = False,
    side: Side,
    transport: bool = False,
    scale: jax.typing.ArrayLike,
    **shared: Any,
) -> optax.GradientTransformationExtraArgs:
    _check.transformation("inner", inner)
    refresh_every = _check.integer("refresh_every", refresh_every, least=1)
    _check.choice("side", side, get_args(Side))
    _check.number("scale", scale, above=0)

    def init(m, n, r, dtype, key):
        P = jnp.zeros((m, r), dtype)
        projector = () if online_pca is None else online_pca.optimizer.init(P)
        return P, projector, inner.init(jnp.zeros((r, n), dtype))

    def state_axes(m, n, r):
        state = jax.eval_shape(lambda: init(m, n, r, jnp.float32, None))
        return _state_axes((m, r), (r, n), state)

    def refresh_due(t, state, phase):
        P, _, _ = state
        return (
            _subspace.is_missing(P)
            if online_pca
            else _subspace.is_refresh_due(t, P, refresh_every, phase)
        )

    def step(G, state, t, refresh_due, keys):
        P, projector, inner_state = state
        begins = _subspace.is_missing(P)

        def refresh():
            P_new = _subspace.refresh(G, P, keys(), basis)
            return P_new, _transported(inner_state, P_new, P) if transport else inner_state

        P, inner_state = _subspace.refreshed(refresh_due, refresh, (P, inner_state))

        G_hat = G.left_product(P)
        # One matrix at a time, since `inner` may be any transformation.
        delta, inner_new = jax.vmap(inner.update)(G_hat, inner_state, jnp.zeros_like(G_hat))
        if online_pca is None:
            return Update(P, scale * delta), (P, projector, inner_new)
        gradient, norm = _subspace.online_pca_gradient(G, P, G_hat, online_pca.penalty)
        moves = norm[:, 0, 0] != 0  # true of NaN
        delta, inner_state = choose(moves, (delta, inner_new), (0 * G_hat, inner_state))
        moved = _moved(online_pca, gradient, P, projector, t)
        P_new, projector = choose(moves & ~begins, moved, (P, projector))
        return Update(P, scale * delta), (P_new, projector, inner_state)

    drifts = online_pca is not None
    rule = Rule(init, refresh_due, step, state_axes, rank, side, stagger, drifts)
    return matrix_transformation(rule, SubspaceState, **shared)


def _state_axes(of_P: tuple[int, int], of_G_hat: tuple[int, int], state: Any) -> Any:
    """Arrays of the optimizers that are like P or like Ĝ lie as these do."""
    _, projector, inner_state = state
    like = lambda shape, word: lambda x: word if x.shape == shape else ""
    return (
        "mr",
        jax.tree.map(like(of_P, "mr"), projector),
        jax.tree.map(like(of_G_hat, "rn"), inner_state),
    )


def _moved(pca: OnlinePCA, gradient, P, state, t) -> tuple[jax.Array, PyTree]:
    """A step of P down its loss, and the state of its optimizer."""
    direction, state = jax.vmap(pca.optimizer.update)(gradient, state, P)
    rate = pca.learning_rate(t) if callable(pca.learning_rate) else pca.learning_rate
    return P - rate * direction, state


def _transported(inner_state: PyTree, P_new: jax.Array, P_old: jax.Array) -> PyTree:
    """The inner state in a new basis, as far as that can be had; see `scale_in_subspace`."""
    T = product(P_new.mT, P_old)

    def carry(path, x):
        name = path[-1] if path else ""
        if x.ndim != 3 or x.shape[1] != T.shape[2]:
            return x
        if name in FIRST_MOMENTS:
            return product(T, x)
        return product(T**2, x) if name in _SECOND_MOMENTS else x

    return map_named(carry, inner_state)
