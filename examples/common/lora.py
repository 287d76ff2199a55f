"""LoRA (arXiv 2106.09685): an addend A B to each matrix, which itself stays as it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import optimizers
from flax import traverse_util

# Trained whole, since they start at random.
TRAINED = ("pooler", "classifier")


def split(weights: Any, rank: int, key: jax.Array) -> tuple[Any, Callable[[Any], Any]]:
    """Parameters to train, m x r and r x n a matrix; and from them all weights again.

    A starts at random with variance 1/m, B at zero: so the model starts as it was.
    """
    frozen: dict[tuple[Any, ...], jax.Array] = traverse_util.flatten_dict(weights)  # type: ignore[assignment]
    params = {name: weights[name] for name in TRAINED}
    addends = {}
    for path, W in frozen.items():
        if optimizers.is_matrix(tuple(map(jax.tree_util.DictKey, path))):
            key, own = jax.random.split(key)
            m, n = W.shape
            addends["/".join(map(str, path))] = {
                "A": jax.random.normal(own, (m, rank)) * m**-0.5,
                "B": jnp.zeros((rank, n)),
            }

    def merge(params: Any) -> Any:
        merged = dict(frozen)
        for path, W in frozen.items():
            addend = params["addends"].get("/".join(map(str, path)))
            if addend is not None:
                merged[path] = W + addend["A"] @ addend["B"]
        return traverse_util.unflatten_dict(merged) | {name: params[name] for name in TRAINED}

    return params | {"addends": addends}, merge
