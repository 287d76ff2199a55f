"""What both models are made of. Shapes: B batch, L length, D width, H heads, K width of a head."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class Linear(nnx.Linear):
    """Flax's own, as one matrix product: on a CPU its gradient is faster than one over two axes."""

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        y_NxD = super().__call__(x_BxLxD.reshape(-1, x_BxLxD.shape[-1]))
        return y_NxD.reshape(*x_BxLxD.shape[:-1], -1)


class Attention(nnx.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int, use_bias: bool, rngs: nnx.Rngs):
        linear = functools.partial(Linear, width, width, use_bias=use_bias, rngs=rngs)
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear() for _ in range(4))

    def __call__(
        self, x_BxLxD: jax.Array, turn: Callable[[jax.Array], jax.Array] | None = None, **sees: Any
    ) -> jax.Array:
        """Queries and keys are turned by their positions; `sees` says what a token sees."""
        B, L, D = x_BxLxD.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x_BxLxD).reshape(B, L, self.heads, D // self.heads) for f in projections)
        if turn is not None:
            q, k = turn(q), turn(k)
        y_BxLxHxK = jax.nn.dot_product_attention(q, k, v, **sees)
        return self.o_proj(y_BxLxHxK.reshape(B, L, D))
