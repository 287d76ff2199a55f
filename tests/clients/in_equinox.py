"""Ten steps of a model that is an Equinox module, and five and five with a file between them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import runs

Step = Callable[..., tuple[Any, Any, jax.Array]]


def train(step: Step, model: Any, state: Any, steps: Iterable[int]) -> tuple[Any, Any, list[float]]:
    losses = []
    for i in steps:
        model, state, loss = step(model, state, jnp.asarray(runs.tokens(i)))
        losses.append(float(loss))
    return model, state, losses


def assert_resumes(
    create: Callable[[jax.Array], Any], start: Callable[[Any], Any], step: Step, folder: Path
) -> None:
    model = create(jax.random.key(0))
    *whole, losses = train(step, model, start(model), range(runs.STEPS))
    runs.assert_learns(losses)

    *half, _ = train(step, model, start(model), range(5))
    eqx.tree_serialise_leaves(folder / "step_5.eqx", half)
    like = create(jax.random.key(1))
    half = eqx.tree_deserialise_leaves(folder / "step_5.eqx", [like, start(like)])
    *resumed, _ = train(step, *half, range(5, runs.STEPS))
    runs.assert_same_bits(resumed, whole)
