"""The gradient G of one matrix as an optimizer reads it, and the update that it gives."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sumo_optax._linalg import frobenius_norm, largest_entry, product


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stored"], meta_fields=["transposed"]
)
@dataclasses.dataclass(frozen=True)
class WholeGradient:
    """G, m x n, as it lies in memory: where that is Gᵀ, to write out G would cost a pass or two."""

    stored: jax.Array  # G or, where transposed, Gᵀ
    transposed: bool

    @property
    def matrix(self) -> jax.Array:
        return self.stored.mT if self.transposed else self.stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.stored.dtype

    def norm(self, *, scale: jax.Array) -> jax.Array:
        """||G||, safe against overflow where `scale` has entries of its size."""
        return frobenius_norm(self.stored, scale=scale)

    def column_norms(self, *, scale: jax.Array) -> jax.Array:
        """Those of the columns, likewise; columns that are 1e-18 of that size may count as 0."""
        largest = largest_entry(scale)
        axis = -1 if self.transposed else -2
        return largest * jnp.linalg.norm(self.stored / largest, axis=axis)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    """What an optimizer reads of a gradient G, m x n, where that is known before G is."""

    left: Any  # QᵀG, shape (*batch, r, n), or None
    right: Any  # GV, shape (*batch, m, r), or None
    shape: tuple[int, ...]  # of G, or of the leaf that it is of

    @property
    def dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self)[0].dtype

    @property
    def T(self) -> "ProjectedGradient":
        transpose = lambda x: None if x is None else x.mT
        return ProjectedGradient(transpose(self.right), transpose(self.left), self.shape[::-1])


Gradient = WholeGradient | ProjectedGradient


def left_product(Q: jax.Array, G: Gradient) -> jax.Array:
    """QᵀG, for Q with few columns; of a projected gradient, whose Q this is, what it holds."""
    return G.left if isinstance(G, ProjectedGradient) else product(Q.T, G.matrix)


def right_product(G: Gradient, V: jax.Array) -> jax.Array:
    """GV, for V with few columns; likewise."""
    return G.right if isinstance(G, ProjectedGradient) else product(V.T, G.matrix.T).T


class Update(NamedTuple):
    """D = left right + G diag(weights), not yet multiplied out; weights want the whole G."""

    left: jax.Array  # m x r
    right: jax.Array  # r x n
    weights: jax.Array | None = None  # shape (n,)

    def of(self, G: Gradient, *, transposed: bool) -> jax.Array:
        """D or, where transposed, Dᵀ: made as it is wanted, since a transpose costs a pass."""
        left, right, weights = self
        D = product(right.T, left.T) if transposed else product(left, right)
        if weights is None or isinstance(G, ProjectedGradient):
            return D
        return D + (G.matrix.T * weights[:, None] if transposed else G.matrix * weights)
