"""Online Subspace Descent, arXiv 2408.12857: a subspace that online PCA moves at every step.

The step itself, and where it fills in the paper, is `_in_subspace`'s. Of what is here:
1. The orthogonality penalty is the paper's 0.1; the authors' code leaves the term out (0).
2. The learning rate of P is by default the authors' code's, 1/200 times the main schedule
   over its peak. The paper's, five times the main one, is had with None.
3. The paper's P decays at its own learning rate, as the weights do at theirs. That is
   `optax.add_decayed_weights` in `basis_optimizer`, which is given P for the parameters. There is
   none by default; the authors' code has PyTorch's AdamW there, whose decay is 0.01.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sumo_optax import _check
from sumo_optax._arguments import documented
from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._in_subspace import OnlinePCA, in_subspace
from sumo_optax._matrix import of_tree
from sumo_optax._rank import Rank
from sumo_optax._view import Side
from sumo_optax._with_adamw import with_adamw

_PAPERS_RATIO = 5.0  # of the learning rate of P to the main one


@documented()
def scale_by_online_subspace_descent(
    rank: Rank = 0.25,
    *,
    inner: optax.GradientTransformation | None = None,
    basis_optimizer: optax.GradientTransformation | None = None,
    basis_learning_rate: optax.ScalarOrSchedule = 0.005,
    orthogonality_penalty: jax.typing.ArrayLike = 0.1,
    side: Side = "short",
    scale: jax.typing.ArrayLike = 1.0,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    fallback: optax.GradientTransformation | None = None,
    skip_nonfinite: bool = True,
    state_dtype: jax.typing.DTypeLike | None = None,
    metrics: bool = False,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Online Subspace Descent, as a transformation of gradients.

    For one matrix with gradient :math:`G` (m x n, where m is the projected side), basis
    :math:`P` (m x r) and :math:`g = G / \|G\|_F`:

    .. math::
      \begin{aligned}
      \Delta &= \mathrm{inner}(P^\top G), \qquad D = a P \Delta \\
      L(P) &= \| P P^\top g - g \|^2 + \rho \, \| P^\top P - I \|^2 \\
      P &\leftarrow P - \eta_P \, \mathrm{optimizer}(\nabla L)
      \end{aligned}

    P starts as the dominant subspace of the first gradient. Only the penalty keeps it near
    orthonormal. The gradient of L has a closed form and takes one more product with G. With Adam
    for both, the state has r (3 m + 2 n) numbers for each matrix.

    Args:
      inner: the transformation of projected gradients, by default ``optax.scale_by_adam()``; see
        :func:`scale_in_subspace`.
      basis_optimizer: the transformation of :math:`\nabla L`, by default
        ``optax.scale_by_adam()``. It receives P as its parameters. ``optax.identity()`` is gradient
        descent and holds nothing.
      basis_learning_rate: :math:`\eta_P` >= 0, or a schedule of it.
      orthogonality_penalty: :math:`\rho` >= 0. The paper uses 0.1, and the authors' code 0.
      side: the projected side of the matrix, ``"short"`` or ``"long"``.
      scale: the factor a > 0 of the update.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`SubspaceState`.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> tx = optax.chain(
      ...     sumo_optax.scale_by_online_subspace_descent(4, inner=optax.scale_by_lion()),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    References:
      `arXiv 2408.12857 <https://arxiv.org/abs/2408.12857>`_, Algorithm 1 and section 4.
    """
    if not callable(basis_learning_rate):
        _check.number("basis_learning_rate", basis_learning_rate, least=0)
    _check.number("orthogonality_penalty", orthogonality_penalty, least=0)
    basis_optimizer = optax.scale_by_adam() if basis_optimizer is None else basis_optimizer
    return in_subspace(
        optax.scale_by_adam() if inner is None else inner,
        rank,
        online_pca=OnlinePCA(basis_optimizer, basis_learning_rate, orthogonality_penalty),
        side=side,
        scale=scale,
        **of_tree(locals()),
    )


@documented(scale_by_online_subspace_descent)
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 0.25,
    *,
    inner: optax.GradientTransformation | None = None,
    basis_optimizer: optax.GradientTransformation | None = None,
    basis_learning_rate: optax.ScalarOrSchedule | None = 0.005,
    orthogonality_penalty: jax.typing.ArrayLike = 0.1,
    side: Side = "short",
    scale: jax.typing.ArrayLike = 1.0,
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
    r"""A complete optimizer: Online Subspace Descent for matrices, AdamW for all other leaves.

    Args:
      basis_learning_rate: a schedule, or a number >= 0. If `learning_rate` is a schedule, the
        number is the rate at the peak of this schedule and follows its shape; the peak must come
        before step 10 million. None means five times `learning_rate`.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> tx = sumo_optax.online_subspace_descent(0.1, rank=4, scale=0.25)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> bool(jnp.all(updates["dense"]["kernel"] < 0))
      True

    References:
      `arXiv 2408.12857 <https://arxiv.org/abs/2408.12857>`_, Algorithm 1.
      ``**sumo_optax.presets.ONLINE_SUBSPACE_DESCENT`` gives this algorithm.
    """
    basis_learning_rate = _basis_rate(learning_rate, basis_learning_rate)
    return with_adamw(scale_by_online_subspace_descent, **locals())


def _basis_rate(
    main: optax.ScalarOrSchedule, own: optax.ScalarOrSchedule | None
) -> optax.ScalarOrSchedule:
    if own is None:
        _check.scheduled("learning_rate", main)
        return (lambda t: _PAPERS_RATIO * main(t)) if callable(main) else _PAPERS_RATIO * main
    if callable(main) and not callable(own):
        _check.number("basis_learning_rate", own, least=0)
        return _with_shape_of(main, own)
    return own


def _with_shape_of(schedule: optax.Schedule, peak: jax.typing.ArrayLike) -> optax.Schedule:
    """`schedule`, scaled so that its largest value, looked for at steps 1 % apart, is `peak`."""
    steps = np.unique(np.geomspace(1, 1e7, 1600).astype(np.int32)) - 1

    def scaled(t):
        with jax.ensure_compile_time_eval():
            largest = jnp.max(jax.vmap(schedule)(jnp.asarray(steps)))
        return peak * schedule(t) / jnp.where(largest > 0, largest, 1)

    return scaled
