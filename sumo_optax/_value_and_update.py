"""Updates inside the backward pass: a layer's gradient is used as soon as it is there.

Autodiff gives the gradient of a leaf to whatever made the leaf. So parameters enter the loss by a
function that hands them on, and whose "gradient" is the updated parameter: its backward pass takes
the gradient, makes the update, and gives back new parameters and new state. Layers that a scan
takes apart are updated in the scan's own backward pass, one layer a turn, in place.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sumo_optax import _check
from sumo_optax._parts import Arrays, Parts, numbers_of_parts
from sumo_optax._paths import Path, named_leaves, path_string
from sumo_optax._program import Evaluator, Pullback, Scan, traced, uses


def value_and_update(
    fun: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    strict: bool = False,
) -> Callable[..., Any]:
    r"""Makes a training step that updates each layer inside the backward pass.

    The step combines ``jax.value_and_grad``, ``tx.update`` and ``optax.apply_updates``, with equal
    results up to rounding:

    .. math:: W_l \leftarrow W_l + \mathrm{update}(\partial f / \partial W_l)

    It frees the gradient of a layer l before it computes that of the layer below. Beside parameters
    and state, a step holds the activations and the gradient of one layer. Stacked layers, which
    ``jax.lax.scan`` takes apart (``nn.scan``, ``nnx.scan``), with or without ``jax.checkpoint``,
    are updated in place in one loop. Separate layers are updated layer by layer: leaves belong
    together if their paths agree up to the first number. All other leaves, and weights that several
    loops use, are updated when their whole gradient exists.

    Jit the step with ``donate_argnums=(0, 1)``. Otherwise parameters and state exist twice.

    Args:
      fun: the loss, a function of the parameters and any further arguments.
      tx: a transformation that treats leaves one by one: those of this library, ``adamw``, ``muon``
        or ``lion``, with schedules, weight decay, masks, ``inject_hyperparams`` and ``partition``.
        It treats each layer of a stack as a leaf of its own, for instance in a trust ratio.
      has_aux: whether `fun` returns a pair of the loss and auxiliary data.
      strict: whether to raise an error if a scan takes leaves apart that it cannot update, because
        the loss also uses them elsewhere, or slices or transposes them first. Without it, such
        leaves are updated after the backward pass.

    Returns:
      A function of the parameters, the state of `tx`, and the further arguments of `fun`. It
      returns the loss (or the pair), the new parameters and the new state.

    Raises:
      ValueError: an update depends on the gradients of several layers, as after
        ``clip_by_global_norm`` (SUMO's step does not depend on the gradient's size;
        :func:`clip_by_last_norm` clips for other optimizers); a state is not stacked like
        its parameter; `strict`, as above.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sumo_optax
      >>> layer = lambda x, w: (x + jnp.tanh(x @ w), None)
      >>> loss = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)
      >>> matrices = optax.contrib.MuonDimensionNumbers(1, 2)
      >>> tx = sumo_optax.sumo(0.01, rank=2, weight_dimension_numbers=matrices)
      >>> params = {"layers": 0.1 * jax.random.normal(jax.random.key(0), (4, 8, 8))}
      >>> state, before = tx.init(params), loss(params, jnp.eye(8))
      >>> step = jax.jit(sumo_optax.value_and_update(loss, tx), donate_argnums=(0, 1))
      >>> for _ in range(10):
      ...     value, params, state = step(params, state, jnp.eye(8))
      >>> bool(value < before)
      True

    References:
      Lv et al., *Full Parameter Fine-tuning for Large Language Models with Limited Resources*,
      `arXiv 2306.09782 <https://arxiv.org/abs/2306.09782>`_, section 3, for SGD.
    """
    _check.transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def step(params, state, *args, **kwargs):
        leaves, treedef = jax.tree.flatten(params)
        program = traced(lambda *leaves: fun(treedef.unflatten(leaves), *args, **kwargs), leaves)
        paths = list(named_leaves(params))
        used = uses(program.jaxpr)
        if strict:
            _check_loops(paths, used.taken_apart - set(used.loops))
        parts = Parts.of(tx, params, state, numbers_of_parts(paths, used.loops))
        parts.check_stacked(used.loops)
        adding = parts.adding()

        def of_variables(variables):
            values, held, added = variables
            inputs: list[Any] = list(values)
            extra = {part: (held[part], added[part], parts.shared) for part in parts.inside}
            for part in parts.inside:
                members = parts.members[part]
                own = [values[i] for i in members]
                if members[0] in used.loops:
                    own = [_Layers(i, part, x, x.dtype) for i, x in zip(members, own, strict=True)]
                else:
                    own = _handed_on(_update_inside(parts, adding, part), own, *extra[part])
                for i, x in zip(members, own, strict=True):
                    inputs[i] = x
            update_of = functools.partial(_update_inside, parts, adding)
            rules = {
                "scan": functools.partial(_scan, update_of, extra),
                "convert_element_type": _converted,
            }
            run = Evaluator(_Layers, lambda layers: layers.value, rules)
            return program.result(run(program.jaxpr, program.consts, inputs))

        held = {part: list(map(_as_float, parts.held(part))) for part in parts.inside}
        added = {part: [jnp.zeros([], jnp.float32)] * len(adding) for part in parts.inside}
        value, (new, held, added) = jax.value_and_grad(of_variables, has_aux=has_aux)(
            (leaves, held, added)
        )
        held = {part: _as_held(arrays, parts.held(part)) for part, arrays in held.items()}
        rest = parts.members[0]
        own = lambda arrays: [arrays[i] for i in rest]
        last, held[0], shared = parts.update(0, own(new), own(leaves), parts.held(0), parts.shared)
        for i, x in zip(rest, last, strict=True):
            new[i] = x
        for k, more in zip(adding, zip(*added.values(), strict=True), strict=True):
            shared[k] += jnp.sum(jnp.stack(more)).astype(shared[k].dtype)
        return value, treedef.unflatten(new), parts.state_of(held, shared)

    return step


def _check_loops(paths: list[Path], missed: set[int]) -> None:
    if missed:
        names = ", ".join(path_string(paths[i]) for i in sorted(missed))
        raise ValueError(
            f"strict: a scan takes {names} apart, but cannot update a leaf that the loss also uses"
            " elsewhere, or that it slices or transposes before"
        )


def _update_inside(parts: Parts, adding: list[int], part: int) -> Callable[..., Any]:
    """An update whose results may leave the backward pass as gradients: floating-point numbers."""
    like = parts.held(part)

    def update(grads, values, held, shared):
        held = _as_held(held, like)
        values, held, new = parts.update(part, grads, values, held, shared)
        sums = [s for s, i in zip(parts.sums, parts.owners, strict=True) if i is None]
        added = [new[k] if sums[k] else new[k] - shared[k] for k in adding]
        return values, list(map(_as_float, held)), [x.astype(jnp.float32) for x in added]

    return update


def _as_float(x: jax.Array) -> jax.Array:
    """The same bits as a type that has gradients."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    as_wide = {1: jnp.float8_e4m3fn, 2: jnp.bfloat16, 4: jnp.float32, 8: jnp.float64}
    return jax.lax.bitcast_convert_type(x, as_wide[x.dtype.itemsize])


def _as_held(arrays: Arrays, like: Arrays) -> Arrays:
    return [_from_float(x, y.dtype) for x, y in zip(arrays, like, strict=True)]


def _from_float(x: jax.Array, dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.bool_:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, dtype)


def _handed_on(update, values: Arrays, held: Arrays, added: Arrays, shared: Arrays) -> Arrays:
    """The values, of which the gradient's place is taken by new values, and so of all else."""

    @jax.custom_vjp
    def hand_on(values, held, added, shared):
        return values

    def forward(values, held, added, shared):
        return values, (values, held, shared)

    def backward(kept, grads):
        return *update(grads, *kept), None

    hand_on.defvjp(forward, backward)
    return hand_on(values, held, added, shared)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """A stacked parameter on its way to the loop that takes it apart."""

    leaf: int
    part: int
    value: jax.Array
    dtype: Any  # in which the loop wants it


def _converted(run: Evaluator, eqn: Any, layers: _Layers) -> list[_Layers]:
    return [dataclasses.replace(layers, dtype=eqn.params["new_dtype"])]


def _scan(update_of, extra, run: Evaluator, eqn: Any, *arguments: Any) -> list[Any]:
    """A loop over layers, whose backward pass updates each layer as soon as it has its gradient."""
    scan = Scan.of(eqn)
    consts, carry, xs = scan.split(arguments)
    # In the order of the parameters, which that of the update is.
    places = sorted(
        (k for k, x in enumerate(xs) if isinstance(x, _Layers)), key=lambda k: xs[k].leaf
    )
    others = [x for x in xs if not isinstance(x, _Layers)]
    part = xs[places[0]].part
    held, added, shared = extra[part]
    pullback = _pullback(scan, consts, carry, xs, places)
    carried = [jax.typeof(x) for x in carry]

    @jax.custom_vjp
    def loop(stacks, held, added, shared, consts, carry, others):
        return forward(stacks, held, added, shared, consts, carry, others)[0]

    def forward(stacks, held, added, shared, consts, carry, others):
        def turn(carry, slices):
            layer, others = slices
            outputs, kept = pullback.fun(*consts, *carry, *layer, *others)
            return outputs[: scan.carry], (outputs[scan.carry :], kept)

        carry, (ys, kept) = scan.run(turn, carry, (stacks, others))
        return (carry, ys), (stacks, held, shared, consts, others, kept)

    loop.defvjp(
        forward,
        functools.partial(_backward, scan, pullback, update_of(part), carried, len(added)),
    )
    stacks = [xs[k].value for k in places]
    carry, ys = loop(stacks, held, added, shared, consts, carry, others)
    return [*carry, *ys]


def _pullback(
    scan: Scan, consts: list[Any], carry: list[Any], xs: list[Any], places: list[int]
) -> Pullback:
    """That of one turn of a loop; its carry alone is not given again in the backward pass."""
    dtypes = [xs[k].dtype for k in places]

    def body(consts, carry, layer, others):
        own = {k: w.astype(t) for k, w, t in zip(places, layer, dtypes, strict=True)}
        rest = iter(others)
        slices = [own[k] if k in own else next(rest) for k in range(len(xs))]
        outputs = scan.turn(*consts, *carry, *slices)
        return outputs[: scan.carry], outputs[scan.carry :]

    slices = scan.slices()
    layer = [slices[k].update(dtype=xs[k].value.dtype) for k in places]
    rest = [x for k, x in enumerate(slices) if k not in places]
    return Pullback.of(body, (consts, carry, layer, rest), given=(0, 2, 3))


def _backward(scan: Scan, pullback: Pullback, update, carried, sums: int, saved, cotangents):
    """The loop the other way round: each layer's gradient, and its update in the layer's place."""
    stacks, held, shared, consts, others, kept = saved
    d_carry, d_ys = cotangents
    length = scan.options["length"]
    zeros = lambda arrays: [jnp.zeros_like(x) if _is_float(x) else None for x in arrays]

    def turn(j, now):
        stacks, held, added, d_consts, d_carry, d_others = now
        i = j if scan.options["reverse"] else length - 1 - j
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
        layer = [at(x) for x in stacks]
        inputs = [*consts, *[None] * scan.carry, *layer, *[at(x) for x in others]]
        back = pullback.back(inputs, [at(x) for x in kept])
        d_slices = [at(d) if _is_float(d) else d[0] for d in d_ys]
        found = back((_with_blanks(d_carry, carried), d_slices))
        more, d_carry, grads, d_slices = (list(map(_float_or_none, x)) for x in found)
        of_layer = ([x[None] for x in xs] for xs in (grads, layer, map(at, held)))
        new, new_held, new_added = update(*of_layer, shared)
        put_all = lambda xs, news: jax.tree.map(put, xs, news)
        return (
            put_all(stacks, [x[0] for x in new]),
            put_all(held, [x[0] for x in new_held]),
            jax.tree.map(jnp.add, added, new_added),
            jax.tree.map(jnp.add, d_consts, more),
            d_carry,
            put_all(d_others, d_slices),
        )

    start = (
        stacks,
        held,
        [jnp.zeros([], jnp.float32)] * sums,
        zeros(consts),
        list(map(_float_or_none, d_carry)),
        zeros(others),
    )
    *new, d_consts, d_carry, d_others = jax.lax.fori_loop(0, length, turn, start)
    return *new, None, d_consts, d_carry, d_others


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _float_or_none(x: Any) -> Any:
    """A gradient, or None for that of whole numbers, which has no type a loop can carry."""
    return x if _is_float(x) else None


def _with_blanks(gradients: list[Any], values: Sequence[Any]) -> list[Any]:
    blank = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    return [blank(x) if d is None else d for d, x in zip(gradients, values, strict=True)]
