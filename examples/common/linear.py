"""A dense layer that is fast on a CPU too."""

import jax
from flax import nnx


class Linear(nnx.Linear):
    """Flax's own, as one matrix product: on a CPU its gradient is faster than one over two axes."""

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        y_NxD = super().__call__(x_BxLxD.reshape(-1, x_BxLxD.shape[-1]))
        return y_NxD.reshape(*x_BxLxD.shape[:-1], -1)
