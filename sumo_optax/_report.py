"""What a user reads before and during training: which leaves are matrices, and the bytes held."""

import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax import _check
from sumo_optax._conventions import Reading, readings
from sumo_optax._paths import Path, PyTree, named_leaves, path_string
from sumo_optax._quantize import dequantized
from sumo_optax._rank import Rank
from sumo_optax._sumo import sumo

_TOLD = "weight_dimension_numbers says so"


class LeafReport(NamedTuple):
    """One parameter leaf: what it is to the optimizer, and what is held for it."""

    path: str
    shape: tuple[int, ...]
    role: str  # "matrix", "fallback" or "ambiguous" (see `describe`); "-" for other optimizers
    batch: tuple[int, ...]  # matrices held side by side, for layers or experts
    m: int | None  # the longer side
    n: int | None
    side: str  # "in" or "out": which of the leaf's axes the basis is on
    rank: int | None
    state_bytes: int
    adamw_bytes: int
    why: str  # it is a matrix, or is none


class Report(NamedTuple):
    """What `describe` returns: data by its fields, a table by `str`."""

    leaves: tuple[LeafReport, ...]
    shared_bytes: int  # counters and whatever else belongs to no leaf

    @property
    def state_bytes(self) -> int:
        return self.shared_bytes + sum(leaf.state_bytes for leaf in self.leaves)

    @property
    def adamw_bytes(self) -> int:
        return sum(leaf.adamw_bytes for leaf in self.leaves)

    @property
    def reasons(self) -> str:
        """A table of why each leaf is a matrix, or is none."""
        rows: list[tuple[str, ...]] = [("parameter", "shape", "role", "why")]
        for path, [x, *_] in _alike(self.leaves, lambda x: (x.shape, x.role, x.why)):
            rows.append((path, f"({','.join(map(str, x.shape))})", x.role, x.why))
        return table(rows)

    def __str__(self) -> str:
        header = ("parameter", "shape", "matrix", "side", "rank", "state", "AdamW's")
        rows = [header, *_grouped(self.leaves)]
        matrices = sum(math.prod(leaf.batch) for leaf in self.leaves if leaf.role == "matrix")
        parameters = sum(math.prod(leaf.shape) for leaf in self.leaves)
        lines = [
            table(rows),
            f"{parameters:,} parameters, {matrices} {'matrix' if matrices == 1 else 'matrices'}",
            f"optimizer state {in_words(self.state_bytes)}{self._of_adamw()}",
        ]
        if any(leaf.role == "ambiguous" for leaf in self.leaves):
            lines += [
                "ambiguous: path and shape do not tell which axes make a matrix, so the fallback",
                "           trains the leaf. Name its axes in weight_dimension_numbers.",
            ]
        return "\n".join(lines)

    def _of_adamw(self) -> str:
        if not self.adamw_bytes:
            return ""
        ratio = self.state_bytes / self.adamw_bytes
        return f", {ratio:.0%} of AdamW's {in_words(self.adamw_bytes)}"


def describe(tx_or_rank: optax.GradientTransformation | Rank, params: PyTree) -> Report:
    """Reports how an optimizer treats each leaf of a tree, and the bytes of its state.

    Nothing is allocated: the shapes of the state come from ``jax.eval_shape``.

    Args:
      tx_or_rank: any optax transformation; or a rank as :func:`sumo` takes it (an integer, a
        fraction or a function), which stands for ``sumo`` of that rank.
      params: tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A report. Its ``str`` is a table with totals in the last lines; leaves whose paths differ only
      in the number of a layer share a row. The fields ``leaves``, ``state_bytes`` and
      ``adamw_bytes`` have the same data. AdamW holds two numbers for each parameter, in the
      parameter's dtype. The role ``ambiguous`` means that path and shape allow several matrices, so
      the fallback trains the leaf. The table ``reasons`` explains for each leaf why it is a matrix
      or not.

    Raises:
      ValueError: a low-rank optimizer finds no matrix among the parameters.
      TypeError: `params` is not a tree of arrays, or the arguments are in the wrong order.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jax.ShapeDtypeStruct((512, 128), jnp.float32)}}
      >>> print(sumo_optax.describe(16, params))
      parameter     shape      matrix     side  rank  state     AdamW's
      dense/kernel  (512,128)  512 x 128  out   16    40.0 KiB  512.0 KiB
      65,536 parameters, 1 matrix
      optimizer state 40.0 KiB, 8% of AdamW's 512.0 KiB
    """
    is_rank = isinstance(tx_or_rank, (int, float)) or callable(tx_or_rank)
    tx = sumo(1.0, tx_or_rank) if is_rank else tx_or_rank
    _check.transformation("tx_or_rank", tx, or_else="a rank")
    if _is_state(params):
        raise TypeError("params must be a tree of parameters, got the state of an optimizer")
    _check.arrays("params", params)
    with warnings.catch_warnings():  # the report says it all
        warnings.simplefilter("ignore", UserWarning)
        state = jax.eval_shape(tx.init, params)
    leaves, found = named_leaves(params), readings(params)
    held, shared = _held_bytes(state, leaves)
    bases = _bases(jax.eval_shape(low_rank_states, state))
    if bases is not None and leaves and not bases:
        seen = ", ".join(f"{path_string(p)} {jnp.shape(x)}" for p, x in leaves.items())
        raise ValueError(
            f"no parameter is a matrix, so no state can have a low rank; the parameters are"
            f" {seen}. Say which axes make a matrix with weight_dimension_numbers"
        )
    rows = [_leaf_report(path, x, bases, held[path], found[path]) for path, x in leaves.items()]
    return Report(tuple(rows), shared)


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """Returns the bytes of the optimizer state of `tx` for `params`, without allocating any.

    Args:
      tx: any optax transformation.
      params: tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      The sum over all arrays of the state.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> sumo_optax.state_bytes(optax.scale_by_adam(), {"w": jnp.ones((8, 4))})
      260
    """
    _check.transformation("tx", tx)
    _check.arrays("params", params)
    return sum(_size(x) for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def _size(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _held_bytes(state: PyTree, leaves: dict[Path, Any]) -> tuple[Counter[Path], int]:
    """State arrays belong to the parameter whose path theirs ends with."""
    held: Counter[Path] = Counter()
    shared = 0
    for path, x in named_leaves(state).items():
        owner = next((path[i:] for i in range(len(path) + 1) if path[i:] in leaves), None)
        if owner is None:
            shared += _size(x)
        else:
            held[owner] += _size(x)
    return held, shared


def low_rank_states(state: PyTree) -> list[Any]:
    """The states of this library's optimizers in one of any transformation, in floating point."""
    return list(filter(_is_ours, jax.tree.leaves(dequantized(state), is_leaf=_is_ours)))


def _is_ours(x: Any) -> bool:
    """By the fields that `matrix_transformation` gives every state."""
    return {"basis", "fallback", "skipped"} <= set(getattr(x, "_fields", ()))


def _bases(ours: list[Any]) -> dict[Path, tuple[int, ...]] | None:
    """Shapes of all bases in such states, or None where no optimizer of ours is among them."""
    if not ours:
        return None
    return {path: q.shape for x in ours for path, q in named_leaves(x.basis).items()}


def _is_state(params: PyTree) -> bool:
    kinds = (optax.ScaleByAdamState, optax.TraceState)
    is_state = lambda x: isinstance(x, kinds) or _is_ours(x)
    return any(map(is_state, jax.tree.leaves(params, is_leaf=is_state)))


def _leaf_report(
    path: Path, x: Any, bases: dict[Path, Any] | None, held: int, reading: Reading
) -> LeafReport:
    shape, adamw = jnp.shape(x), 2 * _size(x)
    if bases is None or path not in bases:
        is_ambiguous = reading.is_ambiguous and bases is not None
        role = "-" if bases is None else "ambiguous" if is_ambiguous else "fallback"
        why = reading.why if reading.axes is None else _TOLD
        return LeafReport(
            path_string(path), shape, role, (), None, None, "", None, held, adamw, why
        )
    *batch, p, r = bases[path]
    q = math.prod(shape) // (math.prod(batch) * p)
    m, n = max(p, q), min(p, q)
    axes, why = _axes_as_read(reading, shape, tuple(batch), {p, q})
    inputs = {math.prod(shape[a] for a in axes[0])} if axes else _products(shape, batch)
    side = "in" if p in inputs else "out"
    return LeafReport(
        path_string(path), shape, "matrix", tuple(batch), m, n, side, r, held, adamw, why
    )


def _axes_as_read(reading: Reading, shape, batch, sides: set[int]) -> tuple[Any, str]:
    """The axes that the leaf's shape and path give, if these are what the optimizer took."""
    axes = reading.axes
    if axes is None:
        return None, _TOLD
    size = lambda side: math.prod(shape[a] for a in side)
    others = tuple(n for a, n in enumerate(shape) if a not in axes[0] + axes[1])
    same = others == batch and set(map(size, axes)) == sides
    return (axes, reading.why) if same else (None, _TOLD)


def _products(shape: tuple[int, ...], batch: Any) -> set[int]:
    """What the inputs may be, where batch axes come first and inputs next."""
    start = len(batch)
    return {math.prod(shape[start:i]) for i in range(start + 1, len(shape))}


def _alike(leaves: tuple[LeafReport, ...], traits: Any) -> list[tuple[str, list[LeafReport]]]:
    """Leaves that differ in numbers on their path only, by their path without these."""
    groups: dict[Any, list[LeafReport]] = {}
    for leaf in leaves:
        pattern = re.sub(r"(?<![a-zA-Z])\d+(?![a-zA-Z])", "*", leaf.path)
        groups.setdefault((pattern, traits(leaf)), []).append(leaf)
    named = lambda pattern, members: pattern if len(members) > 1 else members[0].path
    return [(named(pattern, members), members) for (pattern, _), members in groups.items()]


def _grouped(leaves: tuple[LeafReport, ...]) -> list[tuple[str, ...]]:
    """One row for leaves that are alike; bytes are added up."""
    return [_row(path, members) for path, members in _alike(leaves, lambda x: x[1:8])]


def _row(path: str, members: list[LeafReport]) -> tuple[str, ...]:
    leaf = members[0]
    matrix = leaf.role if leaf.m is None else f"{leaf.m} x {leaf.n}"
    if leaf.batch:
        matrix = f"{math.prod(leaf.batch)} of {matrix}"
    return (
        path,
        (f"{len(members)} of " if len(members) > 1 else "") + f"({','.join(map(str, leaf.shape))})",
        matrix,
        leaf.side,
        "" if leaf.rank is None else str(leaf.rank),
        in_words(sum(x.state_bytes for x in members)),
        in_words(sum(x.adamw_bytes for x in members)),
    )


WIDTH = 80


def table(rows: list[tuple[str, ...]], width: int = WIDTH) -> str:
    """Columns side by side, in lines of at most `width` where words allow it.

    A first cell that its column has no room for has a line to itself; a last cell is wrapped.
    """
    first, *middle, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    between = 2 * (len(middle) + 1) + sum(middle)
    # As little as its title needs, where its cells have lines to themselves anyway.
    least = first if first + between + last <= width else len(rows[0][0])
    last = min(last, max(width - between - least, 20))
    first = min(first, max(width - between - last, 4))
    return "\n".join(line for row in rows for line in _lines(row, (first, *middle, last)))


def _lines(row: tuple[str, ...], widths: tuple[int, ...]) -> Iterator[str]:
    """Those of one row of a table."""
    start = row[0]
    if len(start) > widths[0]:
        yield start
        start = ""
    ends = textwrap.wrap(row[-1], widths[-1], break_long_words=False) or [""]
    for i, end in enumerate(ends):
        cells = (start, *row[1:-1], end) if i == 0 else ("",) * (len(row) - 1) + (end,)
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield "  ".join(padded).rstrip()


def in_words(count: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
