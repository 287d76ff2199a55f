"""The gradients of a group of matrices: the only reader and writer of m x n arrays.

A group is a stack of B matrices of one shape, in the leaves that hold them. Their gradients are
never stacked: a product with G is taken leaf by leaf, and what it gives is small and is stacked.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from sumo_optax._linalg import at_least_float32, largest_entry, svd, wide, written_out

Batch = tuple[int, ...]


class Update(NamedTuple):
    """D = left right + G diag(weights), not yet multiplied out; weights want the whole G."""

    left: jax.Array  # (B, m, r)
    right: jax.Array  # (B, r, n)
    weights: jax.Array | None = None  # (B, 1, n)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """G, B matrices m x n, as their leaves hold them: in the leaves' dtype and order.

    Half of a model's matrices are wider than tall: a transpose written out costs a pass over them.
    """

    batches: Sequence[Batch]  # of the leaves, (1,) where a leaf is one matrix
    transposed: bool  # whether leaves are (*batch, n, m)
    dtype: jnp.dtype
    precision: Any  # of products m x n

    def updates(self, D: Update, good: jax.Array | None) -> list[jax.Array]:
        """D leaf by leaf, 0 where not `good` (B, 1, 1), if that is asked."""
        left, right = (D.right.mT, D.left.mT) if self.transposed else (D.left, D.right)
        parts = [written_out(left.astype(self.dtype)), right.astype(self.dtype)]
        left, right = (pieces_of(x, self.batches) for x in parts)
        [right] = apart(right)
        products = [self._matmul(x, y) for x, y in zip(left, right, strict=True)]
        if D.weights is not None:
            products = self._plus_weighted(products, D.weights)
        if good is None:
            return products
        return [
            jnp.where(keep, D, 0)
            for keep, D in zip(pieces_of(good, self.batches), products, strict=True)
        ]

    def _matmul(
        self, a: jax.Array, b: jax.Array, *, transposed: bool = False, dtype: Any = None
    ) -> jax.Array:
        """ab, or abᵀ, of arrays (*batch, ...): one operation, where `jnp.matmul` makes several."""
        *batch, _, contracted = range(a.ndim)
        dimensions = ((contracted,), (contracted if transposed else contracted - 1,))
        return jax.lax.dot_general(
            a,
            b,
            (dimensions, (batch, batch)),
            precision=self.precision,
            preferred_element_type=dtype,
        )

    def _plus_weighted(self, products: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WholeGradients(Gradients):
    stored: Sequence[jax.Array]  # each (*batch, m, n) or, where transposed, (*batch, n, m)

    @classmethod
    def of(cls, stored: Sequence[jax.Array], *, transposed: bool = False, precision: Any = None):
        batches = [G.shape[:-2] for G in stored]
        return cls(batches, transposed, stored[0].dtype, precision, stored)

    @property
    def shape(self) -> tuple[int, int]:
        """m and n."""
        rows, columns = self.stored[0].shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def left_product(self, Q: jax.Array) -> jax.Array:
        """QᵀG (B, r, n), for Q (B, m, r) of few columns."""
        return self._product(Q.mT, self.transposed)

    def right_product(self, V: jax.Array) -> jax.Array:
        """GV (B, m, r), for V (B, n, r) of few columns."""
        return self._product(V.mT, not self.transposed).mT

    def norms(self, *, scale: jax.Array) -> jax.Array:
        """||G||, shape (B, 1, 1), safe against overflow where `scale` has entries of its size."""
        return self._norms(scale, axis=(-2, -1))

    def column_norms(self, *, scale: jax.Array) -> jax.Array:
        """Those of the columns, (B, 1, n), likewise; 1e-18 of that size may count as 0."""
        norms = self._norms(scale, axis=-1 if self.transposed else -2)
        return norms.mT if self.transposed else norms

    def left_singular_vectors(self, r: int) -> jax.Array:
        """The first r of each matrix, (B, m, r)."""
        of = lambda G: svd(stack_of([at_least_float32(G)], axes=G.ndim - 2))[0][..., :r]
        return jnp.concatenate([of(G.mT if self.transposed else G) for G in self.stored])

    def are_zero(self) -> jax.Array:
        """Which are, (B, 1, 1)."""
        return self._stack([~jnp.any(G, axis=(-2, -1), keepdims=True) for G in self.stored])

    def _product(self, X: jax.Array, transposed: bool) -> jax.Array:
        """X times what the leaves hold, or its transpose; sums in float32."""
        dtype = wide(self.dtype)
        pieces = pieces_of(written_out(X.astype(self.dtype)), self.batches)
        return self._stack(
            [
                self._matmul(x, G, transposed=transposed, dtype=dtype)
                for x, G in zip(pieces, self.stored, strict=True)
            ]
        )

    def _norms(self, scale: jax.Array, axis: Any) -> jax.Array:
        largest = largest_entry(scale)
        squares = [
            jnp.sum((at_least_float32(G) / unit) ** 2, axis=axis, keepdims=True)
            for G, unit in zip(self.stored, pieces_of(largest, self.batches), strict=True)
        ]
        return largest * jnp.sqrt(self._stack(squares))

    def _plus_weighted(self, products: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
        pieces = pieces_of(weights.mT if self.transposed else weights, self.batches)
        return [
            (at_least_float32(D) + at_least_float32(G) * w).astype(self.dtype)
            for D, G, w in zip(products, self.stored, pieces, strict=True)
        ]

    def _stack(self, matrices: list[jax.Array]) -> jax.Array:
        return stack_of(*apart(matrices), axes=len(self.batches[0]))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    """What an optimizer reads of a gradient G, m x n, where that is known before G is."""

    left: Any  # QᵀG, shape (*batch, r, n), or None
    right: Any  # GV, shape (*batch, m, r), or None
    shape: tuple[int, ...]  # of the leaf

    @property
    def dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self)[0].dtype


@dataclasses.dataclass(frozen=True)
class ProjectedGradients(Gradients):
    """A group's, in the place of `WholeGradients`: what they do not hold cannot be read."""

    left: jax.Array | None  # (B, r, n)
    right: jax.Array | None  # (B, m, r)
    shape: tuple[int, int]  # m and n
    path: str  # of the first leaf

    def left_product(self, Q: jax.Array) -> jax.Array:
        return self._refuse("QᵀG") if self.left is None else self.left

    def right_product(self, V: jax.Array) -> jax.Array:
        return self._refuse("GV") if self.right is None else self.right

    def norms(self, *, scale: jax.Array) -> jax.Array:
        self._refuse("its norm")

    def column_norms(self, *, scale: jax.Array) -> jax.Array:
        self._refuse("the norms of its columns")

    def left_singular_vectors(self, r: int) -> jax.Array:
        self._refuse("its singular vectors")

    def are_zero(self) -> jax.Array:
        self._refuse("whether it is zero")

    def _plus_weighted(self, products: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
        self._refuse("the part outside the subspace")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"the gradient of {self.path} is projected, but this optimizer reads {what}, for which"
            " it needs whole gradients"
        )


def pieces_of(stack: jax.Array, batches: Sequence[Batch]) -> list[jax.Array]:
    """A stack (B, ...) taken apart: an array (*batch, ...) for each batch."""
    pieces = jax.lax.split(stack, [math.prod(batch) for batch in batches])
    return [shaped(x, (*batch, *x.shape[1:])) for x, batch in zip(pieces, batches, strict=True)]


def stack_of(arrays: Sequence[jax.Array], *, axes: int) -> jax.Array:
    """Arrays (*batch, ...), with so many batch axes, as one (B, ...)."""
    flat = [shaped(x, (math.prod(x.shape[:axes]), *x.shape[axes:])) for x in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat)


def shaped(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`x` itself where it has that shape: a program of many leaves is of many reshapes."""
    return x if x.shape == tuple(shape) else x.reshape(shape)


def apart(*lists: list[jax.Array]) -> Any:
    """The same, so that the compiler sees no concatenation through products, nor slices.

    A TPU's takes minutes where it does.
    """
    return jax.lax.optimization_barrier(lists)
