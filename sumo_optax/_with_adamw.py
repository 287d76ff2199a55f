"""A transformation of matrices made a complete optimizer, with AdamW for all other leaves."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sumo_optax import _check
from sumo_optax._axes import WeightDimensionNumbers, resolve


def with_adamw(
    scale_by: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: jax.typing.ArrayLike,
    weight_decay_mask: Any,
    weight_dimension_numbers: WeightDimensionNumbers | None,
    adam_b1: jax.typing.ArrayLike,
    adam_b2: jax.typing.ArrayLike,
    adam_eps: jax.typing.ArrayLike,
    adam_weight_decay: jax.typing.ArrayLike,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    **of_matrices: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by(**of_matrices)` and Adam for the rest, each with its decay and learning rate."""
    _check.scheduled("learning_rate", learning_rate)
    _check.scheduled("adam_learning_rate", adam_learning_rate, optional=True)
    _check.scheduled("weight_decay", weight_decay, least=0)
    _check.scheduled("adam_weight_decay", adam_weight_decay, least=0)
    _check.number("adam_b1", adam_b1, least=0, below=1)
    _check.number("adam_b2", adam_b2, least=0, below=1)
    _check.number("adam_eps", adam_eps, least=0)
    part = lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay, weight_decay_mask), optax.scale_by_learning_rate(rate)
    )
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate

    def labels(params):
        specs = resolve(weight_dimension_numbers, params)
        of_leaves = ["fallback" if spec is None else "matrix" for spec in specs]
        return jax.tree.structure(params).unflatten(of_leaves)

    return optax.chain(
        scale_by(
            weight_dimension_numbers=weight_dimension_numbers,
            fallback=optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
            **of_matrices,
        ),
        optax.partition(
            {
                "matrix": part(learning_rate, weight_decay),
                "fallback": part(adam_rate, adam_weight_decay),
            },
            labels,
        ),
    )
