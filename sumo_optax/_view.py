"""A leaf seen as a stack of matrices m x n, and back."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sumo_optax._axes import MatrixAxes, WeightDimensionNumbers, resolve
from sumo_optax._gradient import shaped
from sumo_optax._paths import PyTree

Side = Literal["long", "short"]


class View(NamedTuple):
    """A leaf seen as (*batch, m, n); `wide` where its own order is n before m."""

    leaf_shape: tuple[int, ...]
    batch_axes: tuple[int, ...]  # of the leaf
    m_axes: tuple[int, ...]
    n_axes: tuple[int, ...]
    r: int = 0  # rank of an optimizer's state, where one has been said

    @property
    def axes(self) -> tuple[int, ...]:
        return self.batch_axes + self.m_axes + self.n_axes

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.leaf_shape[a] for a in self.batch_axes)

    @property
    def m(self) -> int:
        return math.prod(self.leaf_shape[a] for a in self.m_axes)

    @property
    def n(self) -> int:
        return math.prod(self.leaf_shape[a] for a in self.n_axes)

    @property
    def wide(self) -> bool:
        return self.n_axes < self.m_axes

    @property
    def stored_axes(self) -> tuple[int, ...]:
        sides = self.n_axes + self.m_axes if self.wide else self.m_axes + self.n_axes
        return self.batch_axes + sides

    def part(self, turns: int) -> "View":
        """Of a leaf with so many times fewer layers: a part of this one's."""
        first = self.batch_axes[0]
        shape = [size // turns if a == first else size for a, size in enumerate(self.leaf_shape)]
        return self._replace(leaf_shape=tuple(shape))

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        return self.as_stored(leaf).mT if self.wide else self.as_stored(leaf)

    def as_stored(self, leaf: jax.Array) -> jax.Array:
        """(*batch, m, n), where wide (*batch, n, m): most often the leaf as it is."""
        sides = (self.n, self.m) if self.wide else (self.m, self.n)
        return shaped(leaf.transpose(self.stored_axes), (*self.batch, *sides))

    def to_leaf(self, stored: jax.Array) -> jax.Array:
        axes = self.stored_axes
        permuted = shaped(stored, [self.leaf_shape[a] for a in axes])
        return permuted.transpose(sorted(range(len(axes)), key=lambda i: axes[i]))


def matrix_view(shape: tuple[int, ...], axes: MatrixAxes, side: Side = "long") -> View:
    """With m the long or the short side, the rows where both are as long."""
    rows, columns = axes
    size = lambda axes: math.prod(shape[a] for a in axes)
    if size(rows) != size(columns) and (size(rows) < size(columns)) == (side == "long"):
        rows, columns = columns, rows
    batch = tuple(a for a in range(len(shape)) if a not in (*rows, *columns))
    return View(shape, batch, rows, columns)


def matrix_views(
    tree: PyTree, numbers: WeightDimensionNumbers | None, side: Side = "long"
) -> list[View | None]:
    """For each leaf how it is a matrix, or None."""
    return [
        None if axes is None else matrix_view(jnp.shape(x), axes, side)
        for x, axes in zip(jax.tree.leaves(tree), resolve(numbers, tree), strict=True)
    ]
