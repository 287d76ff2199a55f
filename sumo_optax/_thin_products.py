"""A weight whose gradient is wanted in a subspace, and what a product with it does.

The probe is a zero `ProjectedGradient`: what reaches it on the way back is QᵀG and GV. The weight
itself has no gradient.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sumo_optax import _linalg
from sumo_optax._gradient import ProjectedGradient
from sumo_optax._view import View

Axes = tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "left_basis", "right_basis", "probe"],
    meta_fields=["view", "axes"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter leaf on its way to where it is used."""

    value: jax.Array
    left_basis: jax.Array | None  # Q, shape (*batch, m, r)
    right_basis: jax.Array | None  # V, shape (*batch, n, r)
    probe: ProjectedGradient
    view: View  # of the leaf
    axes: tuple[Axes, ...]  # for each axis of the value, the axes of the leaf that it is made of

    @classmethod
    def of(cls, leaf: jax.Array, view: View, Q: Any, V: Any, *, probe: ProjectedGradient):
        return cls(leaf, Q, V, probe, view, tuple((a,) for a in range(leaf.ndim)))

    def as_(self, value: jax.Array, axes: tuple[Axes, ...] | None = None) -> "Weight":
        """The same in another type, or with its axes in another order."""
        return dataclasses.replace(self, value=value, axes=self.axes if axes is None else axes)

    def is_stack(self) -> bool:
        """Whether the first axis is the first batch axis, as those of bases and probe are."""
        return bool(self.view.batch_axes) and self.axes[0] == self.view.batch_axes[:1]

    def unstacked(self) -> "Weight":
        """One of a stack, after a loop has taken its arrays apart."""
        view = self.view._replace(batch_axes=self.view.batch_axes[1:])
        return dataclasses.replace(self, view=view, axes=self.axes[1:])

    def to_matrices(self, x: jax.Array) -> jax.Array:
        """An array like the value as (*batch, m, n)."""
        now = [a for axes in self.axes for a in axes]
        x = x.reshape([self.view.leaf_shape[a] for a in now])
        x = x.transpose([now.index(a) for a in self.view.axes])
        return x.reshape(*self.view.batch, self.view.m, self.view.n)


def transposed(weight: Weight, value: jax.Array, parameters: dict[str, Any]) -> Weight:
    return weight.as_(value, tuple(weight.axes[i] for i in parameters["permutation"]))


def reshaped(weight: Weight, value: jax.Array, parameters: dict[str, Any]) -> Weight | None:
    """None where the new axes are not made of whole old ones, in their order."""
    old, new = list(weight.axes), []
    size = lambda axes: math.prod(weight.view.leaf_shape[a] for a in axes)
    for length in value.shape:
        merged: Axes = ()
        while old and size(merged + old[0]) <= length and size(merged) < length:
            merged += old.pop(0)
        if not merged or size(merged) != length:
            return None
        new.append(merged)
    return None if old else weight.as_(value, tuple(new))


def as_array(x: Any) -> Any:
    """A weight for any use at all: the gradient is formed and then projected."""
    if not isinstance(x, Weight):
        return x
    return _probed((x.view, x.axes), x.value, x.left_basis, x.right_basis, x.probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probed(meta, value, Q, V, probe):
    return value


def _probed_backward(meta, kept, d_value):
    G = Weight(d_value, *kept, *meta).to_matrices(d_value)
    Q, V, probe = kept
    left = None if Q is None else (Q.mT @ G).astype(probe.left.dtype)
    right = None if V is None else (G @ V).astype(probe.right.dtype)
    return None, None, None, ProjectedGradient(left, right, probe.shape)


_probed.defvjp(lambda meta, value, *kept: (value, kept), _probed_backward)


def product(a: Any, b: Any, parameters: dict[str, Any]) -> jax.Array | None:
    """The dot_general of an array and a weight, all of one side of which is summed over.

    None where it is another product.
    """
    if isinstance(a, Weight) == isinstance(b, Weight):
        return None
    summed, batch = parameters["dimension_numbers"]
    if batch != ((), ()) or parameters.get("out_sharding") is not None:
        return None
    weight_first = isinstance(a, Weight)
    weight, x = (a, b) if weight_first else (b, a)
    of_weight, of_x = summed if weight_first else summed[::-1]
    kept = [i for i in range(weight.value.ndim) if i not in of_weight]
    order = sorted(range(len(of_weight)), key=lambda i: weight.axes[of_weight[i]])
    of_weight, of_x = [of_weight[i] for i in order], [of_x[i] for i in order]

    sides = tuple(sum((weight.axes[i] for i in part), ()) for part in (of_weight, kept))
    on_m = sides == (weight.view.m_axes, weight.view.n_axes)
    if weight.view.batch_axes or not (on_m or sides == (weight.view.n_axes, weight.view.m_axes)):
        return None
    Q, V, left, right = weight.left_basis, weight.right_basis, weight.probe.left, weight.probe.right
    if on_m:  # y = x W with G as it is
        bases, probes = (Q, V), (left, None if right is None else right.mT)
    else:  # G transposed
        bases, probes = (V, Q), (None if right is None else right.mT, left)

    free = [i for i in range(x.ndim) if i not in of_x]
    x_2d = x.transpose(*free, *of_x).reshape(-1, math.prod(x.shape[i] for i in of_x))
    w_2d = weight.value.transpose(*of_weight, *kept).reshape(x_2d.shape[1], -1)
    options = (parameters["precision"], parameters["preferred_element_type"])
    y = _thin(options, x_2d, w_2d, bases, probes)
    x_shape, w_shape = [x.shape[i] for i in free], [weight.value.shape[i] for i in kept]
    return y.T.reshape(*w_shape, *x_shape) if weight_first else y.reshape(*x_shape, *w_shape)


def _dot(options: tuple[Any, Any], a: jax.Array, b: jax.Array) -> jax.Array:
    precision, dtype = options
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _thin(options, x, w, bases, probes):
    """x w for x (t x p) and w (p x q), with bases of p and of q, or None.

    The probes are given (x B_p)ᵀ dy, r x q, and (dy B_q)ᵀ x, r x p.
    """
    return _dot(options, x, w)


def _thin_forward(options, x, w, bases, probes):
    B_p, B_q = bases
    seen = None if B_p is None else x @ B_p.astype(x.dtype)
    like = jnp.zeros(0, x.dtype)  # x itself is not kept where its gradient alone would need it
    return _dot(options, x, w), (None if B_q is None else x, seen, w, B_q, probes, like)


def _thin_backward(options, kept, dy):
    x, seen, w, B_q, probes, like = kept
    dx = _dot((options[0], None), dy, w.T).astype(like.dtype)
    thin = lambda left, right, probe: _linalg.written_out(left) @ right.astype(probe.dtype)
    first = None if seen is None else thin(seen.T, dy, probes[0])
    second = None if x is None else thin((dy @ B_q.astype(dy.dtype)).T, x, probes[1])
    return dx, None, None, (first, second)


_thin.defvjp(_thin_forward, _thin_backward)
