"""Arguments that make each optimizer the algorithm of its paper.

``sumo_optax.sumo(1e-2, **sumo_optax.presets.SUMO)`` is the algorithm of the paper. To change one
argument, write ``sumo_optax.sumo(1e-2, **{**sumo_optax.presets.SUMO, "basis": "svd"})``.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SUMO: Mapping[str, Any] = MappingProxyType(
    {
        "basis": "randomized_svd",
        "side": "long",
        "refresh_every": 200,
        "momentum": 0.95,
        "nesterov": False,
        "residual": "gradient",
        "norm_growth_limit": 1.1,
        "consistent_rms": None,
    }
)
"""`arXiv 2505.24749 <https://arxiv.org/abs/2505.24749>`_, Algorithm 1, for
:func:`~sumo_optax.sumo` and :func:`~sumo_optax.scale_by_sumo`. As in the paper, the basis comes
from a randomised SVD; ``basis="svd"`` gives the exact one."""

ONLINE_SUBSPACE_DESCENT: Mapping[str, Any] = MappingProxyType(
    {
        "basis_learning_rate": None,
        "orthogonality_penalty": 0.1,
        "side": "short",
        "scale": 1.0,
    }
)
"""`arXiv 2408.12857 <https://arxiv.org/abs/2408.12857>`_, Algorithm 1 with Adam for both and
:math:`\\eta_P = 5 \\eta`, for :func:`~sumo_optax.online_subspace_descent`. The paper also
decays P: to do so, pass ``basis_optimizer=optax.chain(optax.scale_by_adam(),
optax.add_decayed_weights(weight_decay))``."""

MOFASGD: Mapping[str, Any] = MappingProxyType(
    {
        "momentum": 0.95,
        "inverse_limit": None,
        "complement": 0.0,
        "consistent_rms": None,
    }
)
"""`arXiv 2507.08091 <https://arxiv.org/abs/2507.08091>`_, Algorithm 1, for
:func:`~sumo_optax.mofasgd` and :func:`~sumo_optax.scale_by_mofasgd`."""
