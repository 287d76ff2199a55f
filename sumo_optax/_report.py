"""What a user reads before and during training: which leaves are matrices, and the bytes held."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sumo_optax._axes import Path, PyTree, is_open, named_leaves, path_string
from sumo_optax._in_subspace import SubspaceState
from sumo_optax._mofasgd import MofasgdState
from sumo_optax._quantize import dequantized
from sumo_optax._sumo import SumoState, sumo

_LOW_RANK_STATES = (SumoState, SubspaceState, MofasgdState)


class LeafReport(NamedTuple):
    """One parameter leaf: what it is to the optimizer, and what is held for it."""

    path: str
    shape: tuple[int, ...]
    role: str  # "matrix", "fallback" or "open" (see `describe`); "-" where there is no difference
    batch: tuple[int, ...]  # matrices held side by side, for layers or experts
    m: int | None  # the longer side
    n: int | None
    side: str  # "in" or "out": which of the leaf's axes the basis is on
    rank: int | None
    state_bytes: int
    adamw_bytes: int


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

    def __str__(self) -> str:
        header = ("parameter", "shape", "role", "m x n", "side", "rank", "state", "AdamW's")
        rows = [header, *_grouped(self.leaves)]
        matrices = sum(math.prod(leaf.batch) for leaf in self.leaves if leaf.role == "matrix")
        parameters = sum(math.prod(leaf.shape) for leaf in self.leaves)
        ratio = self.state_bytes / max(self.adamw_bytes, 1)
        total = (
            f"{parameters:,} parameters, {matrices} matrices; optimizer state"
            f" {in_words(self.state_bytes)}, {ratio:.0%} of AdamW's {in_words(self.adamw_bytes)}"
        )
        lines = [table(rows), total]
        if any(leaf.role == "open" for leaf in self.leaves):
            lines.append(
                "open: path and shape do not tell the axes of a matrix, so the fallback takes it;"
                " weight_dimension_numbers can tell"
            )
        return "\n".join(lines)


def describe(tx_or_rank: optax.GradientTransformation | int, params: PyTree) -> Report:
    """What an optimizer will do with each leaf of a tree, and the bytes it will hold.

    Nothing is allocated: the state's shapes come from ``jax.eval_shape``.

    Args:
      tx_or_rank: any optax transformation, or a rank, which stands for ``sumo`` of that rank.
      params: tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A report whose ``str`` is a table (leaves that differ in a layer's number alone share a row)
      with totals in its last line, and whose fields ``leaves``, ``state_bytes`` and
      ``adamw_bytes`` are the same as data. AdamW holds two numbers per parameter, in its dtype.
      The role ``open`` is that of leaves on the fallback which path and shape would allow to be
      matrices in more ways than one.

    Raises:
      ValueError: a low-rank optimizer finds no matrix among the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jax.ShapeDtypeStruct((512, 128), jnp.float32)}}
      >>> print(sumo_optax.describe(16, params))
      parameter     shape      role    m x n      side  rank  state     AdamW's
      dense/kernel  (512,128)  matrix  512 x 128  out   16    40.0 KiB  512.0 KiB
      65,536 parameters, 1 matrices; optimizer state 40.0 KiB, 8% of AdamW's 512.0 KiB
    """
    tx = sumo(1.0, tx_or_rank) if isinstance(tx_or_rank, int) else tx_or_rank
    state = jax.eval_shape(tx.init, params)
    leaves = named_leaves(params)
    held, shared = _held_bytes(state, leaves)
    bases = _bases(jax.eval_shape(low_rank_states, state))
    if bases is not None and leaves and not bases:
        seen = ", ".join(f"{path_string(p)} {jnp.shape(x)}" for p, x in leaves.items())
        raise ValueError(
            f"no parameter is a matrix, so there is nothing to hold at low rank; the parameters are"
            f" {seen}. Say which axes make a matrix with weight_dimension_numbers"
        )
    rows = [_leaf_report(path, x, bases, held[path]) for path, x in leaves.items()]
    return Report(tuple(rows), shared)


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """Bytes of the optimizer state of `tx` for `params`, found without allocating any.

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
    is_ours = lambda x: isinstance(x, _LOW_RANK_STATES)
    return [x for x in jax.tree.leaves(dequantized(state), is_leaf=is_ours) if is_ours(x)]


def _bases(ours: list[Any]) -> dict[Path, tuple[int, ...]] | None:
    """Shapes of all bases in such states, or None where no optimizer of ours is among them."""
    if not ours:
        return None
    return {path: q.shape for x in ours for path, q in named_leaves(x.basis).items()}


def _leaf_report(path: Path, x: Any, bases: dict[Path, Any] | None, held: int) -> LeafReport:
    shape, adamw = jnp.shape(x), 2 * _size(x)
    if bases is None or path not in bases:
        role = "-" if bases is None else "open" if is_open(path, shape) else "fallback"
        return LeafReport(path_string(path), shape, role, (), None, None, "", None, held, adamw)
    *batch, p, r = bases[path]
    q = math.prod(shape) // (math.prod(batch) * p)
    m, n = max(p, q), min(p, q)
    inputs = [math.prod(shape[len(batch) : i]) for i in range(len(batch) + 1, len(shape))]
    side = "in" if p in inputs else "out"
    return LeafReport(path_string(path), shape, "matrix", tuple(batch), m, n, side, r, held, adamw)


def _grouped(leaves: tuple[LeafReport, ...]) -> list[tuple[str, ...]]:
    """One row for leaves that differ in numbers on their path only; bytes are added up."""
    groups: dict[tuple, list[LeafReport]] = {}
    for leaf in leaves:
        pattern = re.sub(r"(?<![a-zA-Z])\d+(?![a-zA-Z])", "*", leaf.path)
        groups.setdefault((pattern, *leaf[1:8]), []).append(leaf)
    return [_row(pattern, members) for (pattern, *_), members in groups.items()]


def _row(pattern: str, members: list[LeafReport]) -> tuple[str, ...]:
    leaf = members[0]
    matrix = "" if leaf.m is None else f"{leaf.m} x {leaf.n}"
    if leaf.batch:
        matrix = f"{math.prod(leaf.batch)} of {matrix}"
    return (
        pattern if len(members) > 1 else leaf.path,
        (f"{len(members)} of " if len(members) > 1 else "") + f"({','.join(map(str, leaf.shape))})",
        leaf.role,
        matrix,
        leaf.side,
        "" if leaf.rank is None else str(leaf.rank),
        in_words(sum(x.state_bytes for x in members)),
        in_words(sum(x.adamw_bytes for x in members)),
    )


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def in_words(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
