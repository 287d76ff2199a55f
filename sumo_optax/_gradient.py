"""The gradients of a group of matrices: the only reader and writer of m x n arrays.

A group is a stack of B matrices of one shape, in the leaves that hold them. Their gradients are
never stacked: a product with G is taken leaf by leaf, and what it gives is small and is stacked.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from sumo_optax._linalg import at_least_float32, largest_entry, svd, wide, written_out
from sumo_optax._mesh import divided, whole
from sumo_optax._paths import PyTree

Batch = tuple[int, ...]


class Update(NamedTuple):
    """D = left right + G diag(weights), not yet multiplied out; weights want the whole G.

    Or a function of that, which gives for a transpose the transpose.
    """

    left: jax.Array  # (B, m, r)
    right: jax.Array  # (B, r, n)
    weights: jax.Array | None = None  # (B, 1, n)
    function: Callable[[jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients G of B matrices m x n, kept as their leaves hold them.

    A leaf that holds n x m matrices is never transposed: that would copy it.
    """

    batches: Sequence[Batch]  # of the leaves, (1,) where a leaf is one matrix
    transposed: Sequence[bool]  # whether a leaf is (*batch, n, m)
    dtype: jnp.dtype
    precision: Any  # of products m x n
    stored: Sequence[Any]  # each (*batch, m, n) or, where transposed, (*batch, n, m); or None
    # Of a loop over the first batch axis, in every product.
    turns: int = dataclasses.field(default=1, kw_only=True)

    def updates(self, D: Update, good: jax.Array | None) -> list[jax.Array]:
        """D leaf by leaf, 0 where not `good` (B, 1, 1), if that is asked."""
        pieces = lambda x: [None] * len(self.batches) if x is None else pieces_of(x, self.batches)
        right = list(map(self._divided, pieces_of(D.right.astype(self.dtype), self.batches)))
        factors = zip(pieces(D.left.astype(self.dtype)), *apart(right), strict=True)
        factors = [
            (r.mT, l.mT) if turned else (l, r)
            for (l, r), turned in zip(factors, self.transposed, strict=True)
        ]
        left, right = zip(*factors, strict=True)
        weights = [
            x.mT if turned and x is not None else x
            for x, turned in zip(pieces(D.weights), self.transposed, strict=True)
        ]
        of_leaves = zip(self.stored, written_out(left), right, weights, pieces(good), strict=True)
        of = functools.partial(self._leaf_update, D.function)
        return [in_turns(of, self.turns, *of_leaf) for of_leaf in of_leaves]

    def _leaf_update(
        self, function: Any, G: Any, left: Any, right: Any, weights: Any, good: Any
    ) -> jax.Array:
        D = self._matmul(whole(left, -1), whole(right, -2))
        if weights is not None:
            D = at_least_float32(D) + at_least_float32(G) * weights
        D = (D if function is None else function(D)).astype(self.dtype)
        return D if good is None else jnp.where(good, D, 0)

    def _divided(self, x: jax.Array) -> jax.Array:
        """Over devices that share the matrices of a stack; a matrix alone is on all of them."""
        return divided(x, -2) if sum(map(math.prod, self.batches)) > 1 else x

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


@dataclasses.dataclass(frozen=True)
class WholeGradients(Gradients):
    @property
    def shape(self) -> tuple[int, int]:
        """m and n."""
        rows, columns = self.stored[0].shape[-2:]
        return (columns, rows) if self.transposed[0] else (rows, columns)

    def left_product(self, Q: jax.Array) -> jax.Array:
        """QᵀG (B, r, n), for Q (B, m, r) of few columns."""
        return self._product(Q.mT, self.transposed)

    def right_product(self, V: jax.Array) -> jax.Array:
        """GV (B, m, r), for V (B, n, r) of few columns."""
        return self._product(V.mT, [not turned for turned in self.transposed]).mT

    def norms(self, *, scale: jax.Array) -> jax.Array:
        """||G||, shape (B, 1, 1), safe against overflow where `scale` has entries of its size."""
        return self._norms(scale, lambda turned: (-2, -1))

    def column_norms(self, *, scale: jax.Array) -> jax.Array:
        """Those of the columns, (B, 1, n), likewise; 1e-18 of that size may count as 0."""
        return self._norms(scale, lambda turned: -1 if turned else -2)

    def left_singular_vectors(self, r: int) -> jax.Array:
        """The first r of each matrix, (B, m, r)."""
        of = lambda G: svd(stack_of([at_least_float32(G)], axes=G.ndim - 2))[0][..., :r]
        turned = zip(self.stored, self.transposed, strict=True)
        return jnp.concatenate([of(G.mT if transposed else G) for G, transposed in turned])

    def are_zero(self) -> jax.Array:
        """Which are, (B, 1, 1)."""
        return self._stack([~jnp.any(G, axis=(-2, -1), keepdims=True) for G in self.stored])

    def _product(self, X: jax.Array, transposed: Sequence[bool]) -> jax.Array:
        """X (B, r, ...) times what the leaves hold, or its transpose; sums in float32."""
        dtype = wide(self.dtype)

        def of_leaf(x, G, transposed):
            def product(_, x, G):
                x = self._matmul(whole(x, -2), G, transposed=transposed, dtype=dtype)
                return self._divided(whole(x, -2))

            columns = G.shape[-2 if transposed else -1]
            into = jnp.zeros((*x.shape[:-1], columns), dtype) if self.turns > 1 else None
            return in_turns(product, self.turns, into, self._divided(x), G)

        pieces = pieces_of(written_out(X.astype(self.dtype)), self.batches)
        return self._stack(list(map(of_leaf, pieces, self.stored, transposed)))

    def _norms(self, scale: jax.Array, axis_of: Callable[[bool], Any]) -> jax.Array:
        largest = largest_entry(scale)

        def squares(G, unit, turned):
            sums = jnp.sum((at_least_float32(G) / unit) ** 2, axis=axis_of(turned), keepdims=True)
            return sums.mT if turned else sums

        pieces = pieces_of(largest, self.batches)
        return largest * jnp.sqrt(
            self._stack(list(map(squares, self.stored, pieces, self.transposed)))
        )

    def _stack(self, matrices: list[jax.Array]) -> jax.Array:
        return stack_of(*apart(matrices), axes=len(self.batches[0]))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    r"""Projections of an m x n gradient G, from :func:`subspace_value_and_grad`.

    `left` is :math:`Q^\top G` and `right` is :math:`G V`. A projection that the optimizer does
    not read is None. `shape` is the shape of the parameter.
    """

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

    def _leaf_update(
        self, function: Any, G: Any, left: Any, right: Any, weights: Any, good: Any
    ) -> jax.Array:
        if weights is not None:
            self._refuse("the part outside the subspace")
        return super()._leaf_update(function, G, left, right, weights, good)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"the gradient of {self.path} is projected, but this optimizer reads {what}, for which"
            " it needs whole gradients"
        )


def in_turns(
    fn: Callable[..., Any], turns: int, over: PyTree, *read: PyTree, axes: PyTree = None
) -> PyTree:
    """`fn(over, *read)` written over `over`, a part of a batch axis at a time.

    That is the first axis of every array, or the one that `axes`, a tree like `over`, says.
    """
    if turns == 1:
        return fn(over, *read)
    axes = jax.tree.map(lambda x: 0, over) if axes is None else axes
    # What goes together lies `turns` apart: a mesh that divides the axis divides every turn.
    split = lambda x, axis=0: x.reshape(*x.shape[:axis], -1, turns, *x.shape[axis + 1 :])
    joined = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def turn(i, over):
        at = lambda x, axis=0: jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)
        put = lambda x, new, axis: jax.lax.dynamic_update_index_in_dim(x, new, i, axis + 1)
        new = fn(jax.tree.map(at, over, axes), *jax.tree.map(at, read))
        return jax.tree.map(put, over, new, axes)

    over, read = jax.tree.map(split, over, axes), jax.tree.map(split, read)
    return jax.tree.map(joined, jax.lax.fori_loop(0, turns, turn, over), axes)


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
