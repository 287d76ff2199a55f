"""Docstrings that say everything, with one text for what optimizers have in common."""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_OF_COMPLETE = r"""

.. math:: W \leftarrow W - \eta \, (D + \lambda W)

Here :math:`\eta` is the learning rate and :math:`\lambda` the weight decay. The other symbols are
those of :func:`{}`."""

_ARGS = """
  learning_rate: a number or an optax schedule.
  rank: r. An integer of at least 1 is the rank of every matrix. A float in (0, 1] is a fraction
    of each matrix's short side, rounded up to a multiple of 8. A function takes a leaf's path,
    such as ``"dense/kernel"``, and its shape, and returns either. The short side limits r.
  weight_decay: decoupled decay of the matrices; the learning rate multiplies it.
  weight_decay_mask: the leaves that decay: a tree of booleans like the parameters, a prefix of
    such a tree, or a function from parameters to one.
  weight_dimension_numbers: the axes that make a matrix of each leaf: one
    ``optax.contrib.MuonDimensionNumbers``, a tree of them and None, or a function from
    parameters to such a tree. Axes that it does not name are batch axes. The default is
    :func:`flax_dimension_numbers`, and ``init`` warns about ambiguous leaves.
  adam_b1, adam_b2, adam_eps: AdamW's arguments, for all other leaves.
  adam_weight_decay: decoupled decay of all other leaves.
  adam_learning_rate: learning rate or schedule of all other leaves, by default `learning_rate`.
  fallback: the transformation of all other leaves, by default ``optax.scale_by_adam()``.
  skip_nonfinite: whether a gradient with a NaN or Inf gives its matrix a zero update and leaves
    its state unchanged. The fallback then sees zeros. ``skipped`` in the state counts such
    updates.
  state_dtype: dtype of the state. The default is the parameter's dtype, but at least float32.
    ``"int8"`` and ``"int4"`` hold bases and moments in 8 or 4 bits, as :func:`quantize_state`
    does; norms and singular values keep the default. The arithmetic is in float32 or better in
    every case.
  metrics: whether the state also keeps how each basis moves, for :func:`subspace_metrics`. It
    is then a :class:`MeasuredState`. A step then also takes the norm of G and two products of
    the old basis with the new one, and at a refresh also one of the old basis with G.
  seed: seed of all randomness. The randomness depends only on it, the leaf's path and the step.
"""


_RETURNS = """Returns:
  An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs the parameters."""

_RAISES = """Raises:
  ValueError, TypeError: an argument is outside the ranges above. At init: a spec does not fit its
    leaf, a matrix is complex, or some leaf is ambiguous and no leaf is a matrix. At update: the
    gradients do not fit the state."""


def documented(scale_by: Callable[..., Any] | None = None) -> Callable[[Function], Function]:
    """Adds to a docstring what it leaves out: arguments, what is returned, errors.

    Arguments come in the order of the signature, with the text of the docstring, or that of
    `scale_by`, or the shared one. With `scale_by` the function makes a complete optimizer of that.
    """

    def decorate(function: Function) -> Function:
        if function.__doc__:  # `python -OO` leaves none
            own, texts = _sections(function), _entries(_ARGS)
            intro = own[""]
            if scale_by is not None:
                texts |= _entries(_sections(scale_by)["Args"])
                summary, *more = intro.partition("\n\n")
                intro = summary + _OF_COMPLETE.format(scale_by.__name__) + "".join(more)
            texts |= _entries(own.get("Args", ""))
            listed = dict.fromkeys(texts[name] for name in inspect.signature(function).parameters)
            args = "Args:\n" + "".join(listed).rstrip()
            parts = (intro, args, own.get("Returns", _RETURNS), _RAISES)
            ends = (own[title] for title in ("Examples", "References"))
            function.__doc__ = "\n\n".join((*parts, *ends))
        return function

    return decorate


def _sections(function: Callable[..., Any]) -> dict[str, str]:
    """The parts of a docstring by their titles; what comes first has none."""
    parts = re.split(r"\n\n(?=[A-Z]\w+:\n)", inspect.getdoc(function) or "")
    return {"": parts[0]} | {part.partition(":")[0]: part for part in parts[1:]}


def _entries(listed: str) -> dict[str, str]:
    """The text of each argument; several may share one."""
    entries = re.split(r"(?m)^(?=  \w)", f"{listed}\n")[1:]
    return {name: entry for entry in entries for name in entry.split(":")[0].strip().split(", ")}
