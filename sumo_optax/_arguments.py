"""Docstrings that list every argument, with one text for what optimizers have in common."""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_SHARED = """
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


def documented(*others: Callable[..., Any]) -> Callable[[Function], Function]:
    """Adds to a docstring the arguments that it does not list, in the order of the signature.

    Their texts are those of the `others`' docstrings, or else the shared ones.
    """

    def decorate(function: Function) -> Function:
        if function.__doc__:  # `python -OO` leaves none
            before, own, after = _sections(function.__doc__)
            texts = _entries(_SHARED)
            for other in others:
                texts |= _entries(_sections(other.__doc__ or "")[1])
            texts |= _entries(own)
            listed = dict.fromkeys(texts[name] for name in inspect.signature(function).parameters)
            function.__doc__ = before + "".join(listed) + after
        return function

    return decorate


def _sections(doc: str) -> tuple[str, str, str]:
    """What comes before the list of arguments, the list, and what comes after."""
    before, title, rest = inspect.cleandoc(doc).partition("\nArgs:\n")
    listed, blank, after = rest.partition("\n\n")
    return before + title, f"{listed}\n", blank[1:] + after


def _entries(listed: str) -> dict[str, str]:
    """The text of each argument; several may share one."""
    entries = re.split(r"(?m)^(?=  \w)", listed)[1:]
    return {name: entry for entry in entries for name in entry.split(":")[0].strip().split(", ")}
