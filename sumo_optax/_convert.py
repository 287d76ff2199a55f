"""States of other ranks and other optimizers: refused, or made a start for SUMO or MoFaSGD."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sumo_optax import _check
from sumo_optax._axes import MatrixAxes, WeightDimensionNumbers, resolve
from sumo_optax._in_subspace import SubspaceState
from sumo_optax._linalg import at_least_float32, svd
from sumo_optax._mofasgd import MofasgdState
from sumo_optax._paths import Path, PyTree, few, map_named, named_leaves, nodes_of, path_string
from sumo_optax._quantize import dequantized, requantized
from sumo_optax._sumo import SumoState
from sumo_optax._view import matrix_view

_OURS = (SumoState, MofasgdState)
# optax.contrib has it from optax 0.2.7 on.
_GALORE = getattr(optax.contrib, "GaLoreState", ())
_ADAM = optax.ScaleByAdamState


def check_state(state: PyTree, expected: PyTree) -> None:
    """Raises an error if a state belongs to another rank, optimizer or layout.

    Args:
      state: tree of arrays, of ``jax.ShapeDtypeStruct``, or of anything else with ``shape`` and
        ``dtype``, such as the metadata that Orbax returns before it restores a checkpoint
        (``item_metadata(step)``).
      expected: such a tree for the optimizer, for instance ``jax.eval_shape(tx.init, params)``.

    Raises:
      ValueError: a path, shape or dtype differs. The message names the first differences.

    Examples:
      >>> import jax, jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 8))}}
      >>> state = sumo_optax.scale_by_mofasgd(2).init(params)
      >>> tx = sumo_optax.scale_by_mofasgd(4)
      >>> sumo_optax.check_state(
      ...     state, jax.eval_shape(tx.init, params)
      ... )  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: basis/dense/kernel was float32[16, 2], now float32[16, 4]; row_basis/...
    """
    kind = lambda x: f"{np.dtype(x.dtype)}{list(x.shape)}"
    then = {path: kind(x) for path, x in named_leaves(state).items()}
    now = {path: kind(x) for path, x in named_leaves(expected).items()}
    differences = [
        f"{path_string(path)} was {then.get(path, 'absent')}, now {now.get(path, 'absent')}"
        for path in sorted(now | then)
        if then.get(path) != now.get(path)
    ]
    if differences:
        raise ValueError(few(differences, "; "))


def convert_state(
    state: PyTree,
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
) -> PyTree:
    r"""Converts the state of another rank or optimizer to a state of `tx`.

    The first moment of each matrix is factorised, :math:`U \,\mathrm{diag}(s)\, V^\top`. The r
    largest singular values give its best approximation of rank r. For SUMO this makes

    .. math:: Q = U_r, \qquad M = \mathrm{diag}(s_r)\, V_r^\top

    and for MoFaSGD :math:`U_r, s_r, V_r`. If r is larger than before, random orthonormal columns
    complete the bases, with zeros for moment and singular values, so the first moment does not
    change. The first moment of SUMO is :math:`Q M`, and that of MoFaSGD is :math:`U
    \,\mathrm{diag}(s)\, V^\top`. That of AdamW is ``mu`` and that of ``optax.contrib.galore`` is
    :math:`P` ``mu``, both divided by :math:`1 - b_1`, because Adam holds a mean where SUMO and
    MoFaSGD hold a sum.

    Counters keep their values, so schedules continue. SUMO's limit on the growth of the norm starts
    anew for a matrix whose moment changed or that has no moment yet. If the states agree in all
    else, all else is kept. Otherwise the other leaves keep their Adam's moments, and the rest is
    new.

    Args:
      state: a state that ``tx.init`` or ``tx.update`` returned, of SUMO, MoFaSGD,
        ``optax.contrib.galore`` with Adam, or any optimizer that contains
        ``optax.scale_by_adam``, alone or inside ``chain``, ``partition`` and other wrappers.
      tx: an optimizer that contains :func:`scale_by_sumo` or :func:`scale_by_mofasgd`.
      params: the parameters, or arrays like them.
      weight_dimension_numbers: that of `tx`. The states of AdamW and GaLore need it.
      adam_b1: :math:`b_1` in [0, 1) of the Adam that made `state`.

    Returns:
      A state like ``tx.init(params)``. The conversion factorises whole matrices, so on a mesh, move
      the result to the shardings of :func:`state_shardings`.

    Raises:
      ValueError: `tx` or `state` is none of the above, or a matrix of `tx` has no first moment in
        `state` or one of another shape.

    Examples:
      >>> import jax.numpy as jnp, optax, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
      >>> adamw, tx = optax.adamw(1e-3), sumo_optax.sumo(3e-3, rank=4)
      >>> _, state = adamw.update(params, adamw.init(params), params)
      >>> state = sumo_optax.convert_state(state, tx, params)
      >>> state[0].moment["dense"]["kernel"].shape
      (4, 16)
    """
    _check.transformation("tx", tx)
    _check.number("adam_b1", adam_b1, least=0, below=1)
    held = tx.init(params)
    state, fresh = dequantized(state), dequantized(held)
    sources = list(_sources(state))
    if not any(map(_is_ours, _sources(fresh))):
        raise ValueError(f"tx must hold SUMO or MoFaSGD, got one with {_names(fresh)}")
    moments = {  # of two for one leaf, ours
        path: (x, arrays)
        for x in sorted(sources, key=_is_ours)
        for path, arrays in _held(x).items()
    }
    if not moments:
        raise ValueError(
            "state must hold first moments of SUMO, MoFaSGD, optax.contrib.galore with Adam or"
            f" optax.scale_by_adam, got one with {_names(state)}"
        )
    specs = resolve(weight_dimension_numbers, params)
    axes = {
        path: (jnp.shape(x), spec)
        for (path, x), spec in zip(named_leaves(params).items(), specs, strict=True)
    }
    adams = _adam_moments(state)

    def convert(x):
        if not _is_ours(x):
            return x
        new = {
            path: _start(path, x, arrays, moments, axes, 1 / (1 - adam_b1))
            for path, arrays in _held(x).items()
        }
        owner = next((moments[path][0] for path in new), sources[0])
        others = _rest(getattr(owner, "fallback", None), x.fallback, adams, owner.count)
        fields = [
            map_named(lambda path, _, i=i: new[path][i], field) for i, field in enumerate(x[1:-2])
        ]
        return type(x)(owner.count, *fields, others, getattr(owner, "skipped", x.skipped))

    with jax.default_matmul_precision("highest"):
        converted = jax.tree.map(convert, fresh, is_leaf=_is_ours)
    return requantized(_rest(state, converted, adams, sources[0].count), held)


def _is_ours(x: Any) -> bool:
    return isinstance(x, _OURS)


def _sources(state: PyTree) -> Iterator[Any]:
    """The states, anywhere inside a state, of transformations that hold first moments."""
    known = (*_OURS, SubspaceState, _GALORE, _ADAM)
    for x in nodes_of(state, *known):
        yield x
        if isinstance(x, (*_OURS, SubspaceState)):
            yield from _sources(x.fallback)


def _names(state: PyTree) -> str:
    """What holds first moments in a state, for a message."""
    return ", ".join(dict.fromkeys(type(x).__name__ for x in _sources(state))) or "none of these"


def _held(x: Any) -> dict[Path, tuple[jax.Array, ...]]:
    """What a state holds for each leaf that it has a first moment of, as far as we can read it."""
    if _is_ours(x):
        trees = x[1:-2]
    elif isinstance(x, _GALORE) and isinstance(x.base_optimizer_state, _ADAM):
        trees = (x.projector, x.base_optimizer_state.mu)
    elif isinstance(x, _ADAM):
        trees = (x.mu,)
    else:
        return {}
    columns = [named_leaves(tree) for tree in trees]
    return {path: tuple(column[path] for column in columns) for path in columns[0]}


def _start(
    path: Path,
    target: Any,
    fresh: tuple[jax.Array, ...],
    moments: dict[Path, tuple[Any, tuple[jax.Array, ...]]],
    axes: dict[Path, tuple[tuple[int, ...], MatrixAxes | None]],
    sum_over_mean: jax.typing.ArrayLike,
) -> tuple[jax.Array, ...]:
    """The arrays of `target` for one leaf."""
    if path not in moments:
        seen = ", ".join(map(path_string, moments))
        raise ValueError(f"state holds no first moment of {path_string(path)}; it has: {seen}")
    source, held = moments[path]
    if type(source) is type(target) and [x.shape for x in held] == [x.shape for x in fresh]:
        return tuple(x.astype(y.dtype) for x, y in zip(held, fresh, strict=True))
    L, R = _factors(path, source, held, *axes[path])
    if not _is_ours(source):
        R = sum_over_mean * R
    *batch, m, r = fresh[0].shape
    n = fresh[-1].shape[-2] if isinstance(target, MofasgdState) else fresh[1].shape[-1]
    if L.shape[-2] != m:  # the other side has the basis
        L, R = R.mT, L.mT
    stack = jnp.broadcast_shapes(L.shape[:-2], R.shape[:-2])
    given = (*stack, L.shape[-2], R.shape[-1])
    if given != (*batch, m, n):
        raise ValueError(
            f"at {path_string(path)} state has {_matrices(given)}, tx has"
            f" {_matrices((*batch, m, n))}"
        )
    U, s, V = _truncated_svds(r, L, R)
    if isinstance(target, MofasgdState):
        new = U, s, V
    else:
        _, _, norm, captured = fresh
        new = U, s[..., None] * V.mT, norm, captured
    moved = s[..., 0] > 0
    pick = lambda x, y: jnp.where(moved.reshape(moved.shape + (1,) * (y.ndim - moved.ndim)), x, y)
    return tuple(pick(x, y).astype(y.dtype) for x, y in zip(new, fresh, strict=True))


def _matrices(shape: tuple[int, ...]) -> str:
    *batch, m, n = shape
    return f"{batch} matrices {m} x {n}" if batch else f"a matrix {m} x {n}"


def _factors(
    path: Path,
    source: Any,
    held: tuple[jax.Array, ...],
    shape: tuple[int, ...],
    axes: MatrixAxes | None,
) -> tuple[jax.Array, jax.Array]:
    """L (*batch, m, k) and R (*batch, k, n) of a first moment L R, in at least float32."""
    held = tuple(map(at_least_float32, held))
    if isinstance(source, SumoState):
        Q, M, *_ = held
        return Q, M
    if isinstance(source, MofasgdState):
        U, s, V = held
        return U * s[..., None, :], V.mT
    if axes is None:
        raise ValueError(
            f"tx has a matrix at {path_string(path)}, weight_dimension_numbers has none there; give"
            " those of tx"
        )
    view = matrix_view(shape, axes)
    *projector, mu = held
    if projector and projector[0].size:  # GaLore too has its basis on the longer side
        return projector[0], mu if view.m_axes == axes[0] else mu.T
    if mu.shape != shape:
        raise ValueError(
            f"state has a first moment of shape {mu.shape} at {path_string(path)}, the parameter"
            f" has {shape}"
        )
    return view.to_matrices(mu), jnp.eye(view.n, dtype=mu.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _truncated_svds(r: int, L: jax.Array, R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The r largest singular values of each L R and their vectors, made up to r if fewer."""
    batch = jnp.broadcast_shapes(L.shape[:-2], R.shape[:-2])
    stack = lambda x: jnp.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
    L, R = stack(L), stack(R)
    Q, T = jax.lax.map(jnp.linalg.qr, L)
    U, s, V = svd(T @ R)
    s = jnp.pad(s[:, 0, :r], ((0, 0), (0, max(0, r - s.shape[-1]))))
    of_width = lambda x: jax.lax.map(functools.partial(_of_width, r), x)
    in_batch = lambda x: x.reshape(*batch, *x.shape[1:])
    return in_batch(of_width(Q @ U)), in_batch(s), in_batch(of_width(V))


def _of_width(r: int, columns: jax.Array) -> jax.Array:
    """The first r of some orthonormal columns, or all and random ones to make up r."""
    m, k = columns.shape
    if k >= r:
        return columns[:, :r]
    random = jax.random.normal(jax.random.key(0), (m, r - k), columns.dtype)
    made_up = jnp.linalg.qr(jnp.concatenate([columns, random], axis=1))[0][:, k:]
    return jnp.concatenate([columns, made_up], axis=1)


def _adam_moments(state: PyTree) -> dict[Path, tuple[jax.Array, jax.Array]]:
    """Adam's two moments of each leaf, from wherever in the state."""
    found = {}
    for x in nodes_of(state, _ADAM):
        nu = named_leaves(x.nu)
        found |= {path: (mu, nu[path]) for path, mu in named_leaves(x.mu).items()}
    return found


def _rest(
    old: PyTree,
    new: PyTree,
    adams: dict[Path, tuple[jax.Array, jax.Array]],
    count: jax.Array,
) -> PyTree:
    """All that is no state of ours: the old if it is alike, else the new with Adam's moments."""
    olds, old_structure = jax.tree.flatten(old, is_leaf=_is_ours)
    news, structure = jax.tree.flatten(new, is_leaf=_is_ours)
    if structure == old_structure and all(map(_alike, olds, news)):
        return structure.unflatten(
            [y if _is_ours(y) else x for x, y in zip(olds, news, strict=True)]
        )

    def moment(i, path, y):
        x = adams.get(path, (None, None))[i]
        if x is None or x.shape != y.shape:
            raise ValueError(
                f"tx has Adam for {path_string(path)}, but state has no moments of Adam"
                f" of shape {y.shape} for it"
            )
        return x.astype(y.dtype)

    def carry(path, x):
        if isinstance(x, _ADAM):
            mu, nu = (
                map_named(functools.partial(moment, i), tree) for i, tree in enumerate((x.mu, x.nu))
            )
            return x._replace(count=count, mu=mu, nu=nu)
        return count if path[-1:] == ("count",) and jnp.ndim(x) == 0 else x

    is_leaf = lambda x: isinstance(x, (*_OURS, _ADAM))
    return map_named(carry, new, is_leaf)


def _alike(old: Any, new: Any) -> bool:
    if _is_ours(old) or _is_ours(new):
        return _is_ours(old) and _is_ours(new)
    return (jnp.shape(old), jnp.result_type(old)) == (jnp.shape(new), jnp.result_type(new))
