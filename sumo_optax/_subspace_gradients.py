"""Gradients in the subspace: what an optimizer reads of a gradient, without forming the gradient.

QᵀG is the gradient with respect to a zero r x n matrix Z in y = x (W + QZ), and GV that with
respect to a zero m x r one in y = x (W + ZVᵀ). Where a weight is only multiplied, y = x W and
G = xᵀ dy,

    QᵀG = (x Q)ᵀ dy,    GV = xᵀ (dy V),

so that backpropagation takes thin products instead of one that is m x n. The loss is traced and its
products with such weights are replaced, so that no layer has to know of it; `_thin_products` says
how one weight and one product meet.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from sumo_optax._axes import WeightDimensionNumbers
from sumo_optax._gradient import ProjectedGradient
from sumo_optax._paths import PyTree, named_leaves
from sumo_optax._program import Evaluator, Scan, traced
from sumo_optax._report import low_rank_states
from sumo_optax._thin_products import Weight, as_array, product, reshaped, transposed
from sumo_optax._view import View, matrix_views


def subspace_value_and_grad(
    fun: Callable[..., Any],
    *,
    has_aux: bool = False,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
) -> Callable[..., Any]:
    r"""Like ``jax.value_and_grad``, with projected gradients for matrices.

    The optimizer's state has a basis :math:`Q` for each matrix and, with MoFaSGD, a row basis
    :math:`V`. The gradient of the matrix then consists of :math:`Q^\top G` and :math:`G V` only. If
    the loss uses the matrix only in products :math:`y = x W`, the m x n array :math:`G` is never
    computed:

    .. math:: Q^\top G = (x Q)^\top \bar y, \qquad G V = x^\top (\bar y V)

    You can add up such gradients over micro-batches, average them over devices and clip them; their
    norm is that of the projected gradients. The `update` of the optimizers of this library accepts
    them, with the parameters as its third argument.

    Args:
      fun: the loss, a function of the parameters and any further arguments.
      has_aux: whether `fun` returns a pair of the loss and auxiliary data.
      weight_dimension_numbers: that of the optimizer.

    Returns:
      A function of the parameters, the optimizer's state, and the further arguments of `fun`. It
      returns the loss (or the pair) and a tree of gradients. Its keyword `full`, a Python bool,
      requests whole gradients, which the first step and every refresh of the basis need.

    Raises:
      ValueError: the optimizer's state has no basis, or the parameters lie on a mesh with Explicit
        axes. `update` raises it if the optimizer needs whole gradients: SUMO with a residual or
        with a basis that tracks the gradient at every step, and Online Subspace Descent.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, optax, sumo_optax
      >>> tx = sumo_optax.sumo(
      ...     0.1, rank=2, basis="randomized_svd", refresh_every=10, residual=None
      ... )
      >>> loss = lambda params, x: jnp.mean((x @ params["dense"]["kernel"]) ** 2)
      >>> value_and_grad = sumo_optax.subspace_value_and_grad(loss)
      >>> @functools.partial(jax.jit, static_argnames="full")
      ... def train_step(params, state, x, full):
      ...     value, grads = value_and_grad(params, state, x, full=full)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, value
      >>> params = {"dense": {"kernel": jnp.ones((16, 8))}}
      >>> state = tx.init(params)
      >>> for step in range(20):
      ...     x = jax.random.normal(jax.random.key(step), (64, 16))
      ...     params, state, value = train_step(params, state, x, full=step % 10 == 0)
      >>> bool(loss(params, jnp.eye(16)) < 0.9)  # it was 1
      True

    References:
      `arXiv 2507.08091 <https://arxiv.org/abs/2507.08091>`_, section 4, shows that MoFaSGD needs
      these two products only.
    """

    def value_and_grad(params, state, *args, full: bool = False, **kwargs):
        if full:
            return jax.value_and_grad(fun, has_aux=has_aux)(params, *args, **kwargs)
        leaves, treedef = jax.tree.flatten(params)
        if any(AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in leaves):
            raise ValueError(
                "projected gradients need a mesh of Auto axes, and the parameters are on one of"
                " Explicit axes"
            )
        views = matrix_views(params, weight_dimension_numbers)
        bases = _bases(params, state, views)
        program = traced(lambda *leaves: fun(treedef.unflatten(leaves), *args, **kwargs), leaves)

        def of_variables(variables):
            inputs = [
                x if view is None else Weight.of(leaf, view, *basis, probe=x)
                for leaf, x, view, basis in zip(leaves, variables, views, bases, strict=True)
            ]
            outputs = _evaluate(program.jaxpr, program.consts, inputs)
            return program.result([as_array(x) for x in outputs])

        variables = [
            leaf if view is None else _zero(leaf, view, *basis)
            for leaf, view, basis in zip(leaves, views, bases, strict=True)
        ]
        value, grads = jax.value_and_grad(of_variables, has_aux=has_aux)(variables)
        return value, treedef.unflatten(grads)

    return value_and_grad


def _bases(params: PyTree, state: PyTree, views: list[View | None]):
    """For each leaf, the basis of its rows' side, m, and of its columns' side, n, where held."""
    left, right = {}, {}
    for ours in low_rank_states(state):
        left |= named_leaves(ours.basis)
        right |= named_leaves(getattr(ours, "row_basis", ()))
    if not left:
        raise ValueError(
            "the optimizer's state has no basis: it is not that of a low-rank optimizer"
        )
    bases = []
    for path, view in zip(named_leaves(params), views, strict=True):
        P, V = left.get(path), right.get(path)
        on_n = view is not None and P is not None and P.shape[-2] != view.m
        bases.append((None, P) if on_n else (P, V))
    return bases


def _zero(leaf: jax.Array, view: View, Q: Any, V: Any) -> ProjectedGradient:
    """The gradient's place in the tree of variables."""
    zeros = lambda *shape: jnp.zeros((*view.batch, *shape), leaf.dtype)
    return ProjectedGradient(
        None if Q is None else zeros(Q.shape[-1], view.n),
        None if V is None else zeros(view.m, V.shape[-1]),
        view.leaf_shape,
    )


def _dot_general(run: Evaluator, eqn: Any, a: Any, b: Any) -> list[Any]:
    out = product(a, b, eqn.params)
    return run.bind(eqn, a, b) if out is None else [out]


def _shaped(rule, run: Evaluator, eqn: Any, weight: Any) -> list[Any]:
    """Operations that leave a weight a weight, if in another type or order of its axes."""
    [value] = run.bind(eqn, weight.value)
    new = rule(weight, value, eqn.params)
    return run.bind(eqn, weight) if new is None else [new]


def _checkpoint(run: Evaluator, eqn: Any, *arguments: Any) -> list[Any]:
    inner = lambda *x: [as_array(y) for y in run(eqn.params["jaxpr"], [], x)]
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(inner, **options)(*arguments)


def _scan(run: Evaluator, eqn: Any, *arguments: Any) -> list[Any]:
    """Weights may be the same at each turn, or stacked along their first axis."""
    scan = Scan.of(eqn)
    consts, carry, stacks = scan.split(arguments)
    stacks = [x if not isinstance(x, Weight) or x.is_stack() else as_array(x) for x in stacks]

    def turn(carry, slices):
        slices = [x.unstacked() if isinstance(x, Weight) else x for x in slices]
        outputs = run(scan.body.jaxpr, scan.body.consts, [*consts, *carry, *slices])
        outputs = [as_array(x) for x in outputs]
        return outputs[: scan.carry], outputs[scan.carry :]

    carry, outputs = scan.run(turn, [as_array(x) for x in carry], stacks)
    return [*carry, *outputs]


_evaluate = Evaluator(
    Weight,
    as_array,
    {
        "dot_general": _dot_general,
        "transpose": functools.partial(_shaped, transposed),
        "reshape": functools.partial(_shaped, reshaped),
        "convert_element_type": functools.partial(_shaped, lambda w, value, _: w.as_(value)),
        "checkpoint": _checkpoint,
        "remat2": _checkpoint,
        "scan": _scan,
    },
)
