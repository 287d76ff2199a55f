"""State in 8 or 4 bits: of a rule, and of any optax transformation.

An array in few bits is two, as `_few_bits` makes them.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check
from sumo_optax._few_bits import Code, decoded, encoded
from sumo_optax._group import Rule
from sumo_optax._layout import as_fits
from sumo_optax._paths import PyTree, nodes_of

_LEAST_SIZE = 1024  # smaller arrays are not worth it
# Names that optax gives to means of gradients, and to means or sums of squares.
_MEANS = {"mu", "trace", "m", "m1", "m2"}
_SQUARES = {
    "nu",
    "nu_max",
    "v",
    "v_row",
    "v_col",
    "n",
    "e_g",
    "e_x",
    "exp_avg_sq",
    "sum_of_squares",
}
# Those of these mean something else.
_OTHERS = (optax.ScaleByAdanState, optax.ScaleBySM3State)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "largest"],
    meta_fields=["axis", "squares", "nearest"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tree of arrays in few bits."""

    values: PyTree  # int8 one to a number, uint8 one to two numbers
    largest: PyTree  # of each block, in the arrays' own dtype
    axis: int  # along which blocks lie, -1 or -2
    squares: bool
    nearest: bool  # or by thresholds, what moves by less than a level in a step


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    `values` and `largest` are trees like the inner state. An array that is held in few bits is in
    both; any other is in `values` as it is, with a `MaskedNode` in `largest`.
    """

    count: jax.typing.ArrayLike  # shape (), int32
    values: PyTree  # whole numbers: shape (..., n), int8; or shape (..., n / 2), uint8
    largest: PyTree  # of each block, shape (..., blocks), in the inner array's dtype


def quantize_state(
    tx: optax.GradientTransformation, bits: Literal[4, 8]
) -> optax.GradientTransformationExtraArgs:
    r"""Holds the state of any optax transformation in 8 or 4 bits.

    The arrays are divided into blocks of 128 numbers along the last axis. Let :math:`a` be the
    number of largest magnitude in a block. A number x of the block is held as an integer v,

    .. math::
      \begin{aligned}
      x &= a u & u &= v / 128 \\
      x &= a \, (0.67 \, u + 0.33 \, u^3) & u &= v / 8 \\
      x &= a \, u^4 & u &= v / 255 \text{ or } v / 15
      \end{aligned}

    The first formula is for 8 bits and the second for 4 bits. The third is for means and sums of
    squares, which are found by the names that optax gives them (``nu``, ``v``, ``sum_of_squares``
    and others). Of these, only an exact zero becomes 0, so that a step that divides by their root
    stays bounded. A square changes by less than a level in a step, so it is rounded up or down by a
    threshold that runs evenly through [0, 1] from step to step, and it is right on average. All
    other numbers are rounded to the nearest level.

    A number of a float32 state then takes 8.25 or 4.25 bits. This holds for floating-point arrays
    with at least two axes and 1,024 numbers. Counters, vectors and small arrays do not change.

    Put it inside transformations that hold parameters (``schedule_free``, ``lookahead``) or that
    add up gradients (``MultiSteps``), and not around them. For the optimizers of this library,
    ``state_dtype="int8"`` or ``"int4"`` is better, because it restores one group of matrices at a
    time.

    Args:
      tx: the transformation, such as ``adamw``, ``muon``, ``lion``, or a ``chain`` or ``partition``
        of these.
      bits: 8 or 4.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`QuantizedState`.

    Raises:
      ValueError: `bits` is neither 8 nor 4.
      TypeError: `tx` is not a transformation.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> tx = sumo_optax.quantize_state(optax.adamw(1e-3), bits=4)
      >>> sumo_optax.state_bytes(tx, params) / sumo_optax.state_bytes(optax.adamw(1e-3), params)
      0.1328...
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Blocks: Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, `arXiv 2110.02861
      <https://arxiv.org/abs/2110.02861>`_. A second moment without a zero: Li et al., *Memory
      Efficient Optimizers with 4-bit States*, `arXiv 2309.01507
      <https://arxiv.org/abs/2309.01507>`_.
    """
    _check.transformation("tx", tx)
    _check.choice("bits", bits, (8, 4))
    tx = optax.with_extra_args_support(tx)

    def init(params):
        inner = tx.init(params)
        _refuse_others(inner)

        def held(path, x):
            large = jnp.ndim(x) > 1 and x.size >= _LEAST_SIZE
            if large and jnp.issubdtype(x.dtype, jnp.floating):
                squares = _are_squares(path)
                return quantized(x, bits, -1, squares, nearest=not squares)
            return x

        return QuantizedState(
            jnp.zeros([], jnp.int32), *_apart(jax.tree.map_with_path(held, inner))
        )

    def update(updates, state, params=None, **extra_args):
        held = _together(state)
        outputs, inner = tx.update(updates, dequantized(held), params, **extra_args)
        inner = requantized(inner, held, state.count)
        return outputs, QuantizedState(optax.safe_increment(state.count), *_apart(inner))

    return optax.GradientTransformationExtraArgs(init, update)


def in_few_bits(rule: Rule, bits: int) -> Rule:
    """The rule with arrays of two axes in few bits; norms, singular values and counters stay."""

    def axes(m, n, r):
        """Of a quantised array twice: capitals are blocks of a side."""

        def of(path, word, of_leaf):
            if len(word) < 2:
                return of_leaf
            axis = min(word.find(side) for side in "mn" if side in word) - 2
            blocks = "".join(x.upper() if x in "mn" else x for x in of_leaf)
            squares = _are_squares(path)
            return Quantized(of_leaf, blocks, axis, squares, not (squares or rule.drifts))

        return jax.tree.map_with_path(of, rule.state_axes(1, 1, 1), rule.state_axes(m, n, r))

    like = axes(1, 1, 1)

    def init(m, n, r, dtype, key):
        def of(q, x):
            return quantized(x, bits, q.axis, q.squares, q.nearest) if _is_quantized(q) else x

        return jax.tree.map(of, like, rule.init(m, n, r, dtype, key), is_leaf=_is_quantized)

    def step(G, state, t, refresh_due, keys):
        D, new = rule.step(G, dequantized(state), t, refresh_due, keys)
        return D, requantized(new, state, t)

    refresh_due = lambda t, state, phase: rule.refresh_due(t, dequantized(state), phase)
    return rule._replace(
        init=init, refresh_due=refresh_due, step=step, state_axes=axes, packed=8 // bits
    )


def bits_of(dtype: Any) -> int | None:
    """8 and 4 for the whole numbers of so many bits, None for any other dtype."""
    return None if dtype is None else {"int8": 8, "int4": 4}.get(jnp.dtype(dtype).name)


def dequantized(tree: PyTree) -> PyTree:
    """The tree with floating-point arrays for those in few bits."""

    def floats(x):
        if isinstance(x, QuantizedState):
            return dequantized(_together(x))
        if not _is_quantized(x):
            return x
        decode = functools.partial(decoded, axis=x.axis, squares=x.squares)
        return jax.tree.map(functools.partial(as_fits, decode), x.values, x.largest)

    return jax.tree.map(floats, tree, is_leaf=_is_held)


def quantized(x: jax.Array, bits: int, axis: int, squares: bool, nearest: bool) -> Quantized:
    encode = functools.partial(encoded, bits=bits, axis=axis, squares=squares, nearest=nearest)
    code = as_fits(encode, x, jnp.zeros([], jnp.int32))
    return Quantized(code.values, code.largest, axis, squares, nearest)


def requantized(tree: PyTree, like: PyTree, t: jax.Array | None = None) -> PyTree:
    """The opposite, with those arrays in few bits that are so in `like`; after the step t."""
    if t is None:
        t = jnp.zeros([], jnp.int32)

    def of(like, tree):
        if isinstance(like, QuantizedState):
            return QuantizedState(like.count, *_apart(requantized(tree, _together(like), t)))
        if not _is_quantized(like):
            return tree
        how = {"axis": like.axis, "squares": like.squares, "nearest": like.nearest}

        def encode(old, x):
            bits = 4 if old.dtype == jnp.uint8 else 8
            return as_fits(functools.partial(encoded, bits=bits, **how), x, t)

        codes = jax.tree.map(encode, like.values, tree)
        part = lambda i: jax.tree.map(lambda x: x[i], codes, is_leaf=lambda x: isinstance(x, Code))
        return Quantized(part(0), part(1), **how)

    return jax.tree.map(of, like, tree, is_leaf=_is_held)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def _is_held(x: Any) -> bool:
    return isinstance(x, (Quantized, QuantizedState))


def _apart(inner: PyTree) -> tuple[PyTree, PyTree]:
    """Two trees like the inner state, whose paths end in those of the parameters."""
    of = lambda f: jax.tree.map(f, inner, is_leaf=_is_quantized)
    return (
        of(lambda x: x.values if _is_quantized(x) else x),
        of(lambda x: x.largest if _is_quantized(x) else optax.MaskedNode()),
    )


def _together(state: QuantizedState) -> PyTree:
    def of(path, values, largest):
        if isinstance(largest, optax.MaskedNode):
            return values
        squares = _are_squares(path)
        return Quantized(values, largest, -1, squares, nearest=not squares)

    return jax.tree.map_with_path(of, state.values, state.largest)


def _are_squares(path: tuple[Any, ...]) -> bool:
    """By the field of the state: the first such name, before those of the parameters."""
    names = (x.name for x in path if isinstance(x, jax.tree_util.GetAttrKey))
    return next((x for x in names if x in _MEANS | _SQUARES), None) in _SQUARES


def _refuse_others(state: PyTree) -> None:
    for x in nodes_of(state, *_OTHERS):
        raise ValueError(
            f"quantize_state needs optax's names for means and squares, but the fields of"
            f" {type(x).__name__} have other names"
        )
