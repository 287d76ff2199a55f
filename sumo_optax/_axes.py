"""Which leaves are matrices, and over which axes: read off path and shape by Flax's conventions."""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

PyTree = Any
MatrixAxes = tuple[tuple[int, ...], tuple[int, ...]]  # of inputs and outputs, from the front
Path = tuple[str, ...]
WeightDimensionNumbers = MuonDimensionNumbers | PyTree | Callable[[PyTree], PyTree]

# Path components of tables, heads and norms; and leaf names of vectors, stacked ones included.
_NO_MATRIX = re.compile(
    r"embed|(^|_)(w[tp]e|(lm_|output_)?head|logits|classifier)(_?\d+)?$|norm|(^|_)ln(_|\d|$)"
)
_VECTORS = {"bias", "scale", "b", "g", "beta", "gamma", "offset", "mean", "var"}
_KERNELS = {"kernel", "weight", "w"}
_INTO_HEADS = re.compile(r"^(q|k|v|query|key|value)(_proj)?$")
_OUT_OF_HEADS = re.compile(r"^(o|out)(_proj)?$")


class Whole(NamedTuple):
    """The tree of parameters that an `update` sees a part of."""

    params: PyTree
    parts: dict[Path, int]  # of each leaf


_WHOLE: contextvars.ContextVar[Whole | None] = contextvars.ContextVar("whole", default=None)


@contextlib.contextmanager
def parts_of(whole: Whole):
    """Under it a tree may hold some leaves alone, or some layers of a stack: these are the same
    matrices with the same places in the tree as if it held them all.
    """
    token = _WHOLE.set(whole)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def whole_of(tree: PyTree) -> PyTree:
    whole = _WHOLE.get()
    return tree if whole is None else whole.params


def part_of(path: Path) -> int:
    whole = _WHOLE.get()
    return 0 if whole is None else whole.parts[path]


def path_names(path: tuple[Any, ...]) -> Path:
    """A JAX key path as plain names; the `value` inside a Flax variable is not one of them."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return tuple(names[:-1] if len(names) > 1 and names[-1] in ("value", "raw_value") else names)


def path_string(names: Path) -> str:
    return "/".join(names) or "(the root)"


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {path_names(path): leaf for path, leaf in flat}


def flax_dimension_numbers(params: PyTree) -> PyTree:
    """Tells matrices from other leaves by path and shape, as Flax (Linen and NNX) lays them out.

    Embeddings, output heads, norms, biases and other vectors are no matrices. A kernel's axes are
    read off the shape of the bias beside it: leading axes that both have are batch axes (layers
    stacked by ``scan`` or ``vmap``, experts), trailing ones that both have are outputs, the rest
    are inputs. Without a bias, the norms of the same block tell how many axes are stacked, and the
    name tells the rest: ``query|key|value`` kernels are (d, heads, head_dim), ``out`` ones
    (heads, head_dim, d), those of a ``conv`` (..., in, out), those of ``expert``s have one more
    batch axis. What path and shape leave open is no matrix: the fallback is the safe choice, and
    ``describe`` shows it.

    This is the default of every ``weight_dimension_numbers``; wrap it to overrule it for some
    leaves, or replace it.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Tree of the same structure with ``optax.contrib.MuonDimensionNumbers`` for a matrix, None for
      any other leaf.

    Examples:
      >>> import jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
      >>> sumo_optax.flax_dimension_numbers(params)["dense"]["kernel"]
      MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1,))
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in named_leaves(params).items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _leaf_axes(path_names(path), shapes), params
    )


def _leaf_axes(path: Path, shapes: dict[Path, tuple[int, ...]]) -> MuonDimensionNumbers | None:
    shape = shapes[path]
    if _is_no_matrix(path, shape):
        return None
    if len(shape) == 2:
        return _split(shape, batch=0, outputs=1)
    if not path or path[-1].lower() not in _KERNELS:
        return None
    bias = shapes.get((*path[:-1], "bias")) or shapes.get((*path[:-1], "b"))
    if bias is not None:
        return _axes_beside_bias(shape, bias)
    return _axes_by_name(path, shape, _stacked_axes(path, shapes))


def _is_no_matrix(path: Path, shape: tuple[int, ...]) -> bool:
    vector = len(shape) < 2 or (path and path[-1].lower() in _VECTORS)
    return bool(vector or any(_NO_MATRIX.search(name.lower()) for name in path))


def is_open(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a leaf that was not taken for a matrix may well hold one."""
    return len(shape) > 2 and not _is_no_matrix(path, shape)


def _split(shape: tuple[int, ...], batch: int, outputs: int) -> MuonDimensionNumbers | None:
    """The axes after the batch: inputs first, then outputs. A matrix of one row is a vector."""
    axes = range(len(shape))
    split = len(shape) - outputs
    if min(math.prod(shape[batch:split]), math.prod(shape[split:])) == 1:
        return None
    return MuonDimensionNumbers(tuple(axes[batch:split]), tuple(axes[split:]))


def _axes_beside_bias(shape: tuple[int, ...], bias: tuple[int, ...]) -> MuonDimensionNumbers | None:
    """The bias has the kernel's batch axes and its outputs; two ways to read it leave it open."""
    readings = [
        batch
        for batch in range(len(bias))
        if bias == shape[:batch] + shape[len(shape) - len(bias) + batch :]
        and len(bias) < len(shape)
    ]
    if len(readings) != 1:
        return None
    return _split(shape, batch=readings[0], outputs=len(bias) - readings[0])


def _stacked_axes(path: Path, shapes: dict[Path, tuple[int, ...]]) -> int:
    """How many leading axes the kernel shares with the norms of its nearest enclosing block."""
    for depth in range(len(path) - 1, -1, -1):
        norms = [s for p, s in shapes.items() if p[:depth] == path[:depth] and p[-1:] == ("scale",)]
        if norms:
            stacks = [s[:-1] for s in norms if s[:-1] == shapes[path][: len(s) - 1]]
            return max(map(len, stacks), default=0)
    return 0


def _axes_by_name(path: Path, shape: tuple[int, ...], batch: int) -> MuonDimensionNumbers | None:
    module = path[-2].lower() if len(path) > 1 else ""
    inside = " ".join(path).lower()
    own = len(shape) - batch
    if own > 2 and "expert" in inside:
        batch, own = batch + 1, own - 1
    if own == 2 or (own in (3, 4, 5) and "conv" in inside):
        return _split(shape, batch, outputs=1)
    if own == 3 and _INTO_HEADS.match(module):
        return _split(shape, batch, outputs=2)
    if own == 3 and _OUT_OF_HEADS.match(module):
        return _split(shape, batch, outputs=1)
    return None


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (MuonDimensionNumbers, optax.MaskedNode))


def resolve(
    weight_dimension_numbers: WeightDimensionNumbers | None, params: PyTree
) -> list[MatrixAxes | None]:
    """One entry for every leaf of `params`, in order: its axes as a matrix, or None."""
    whole = whole_of(params)
    axes = dict(zip(named_leaves(whole), _resolved(weight_dimension_numbers, whole), strict=True))
    return [axes[path] for path in named_leaves(params)]


def _resolved(
    weight_dimension_numbers: WeightDimensionNumbers | None, params: PyTree
) -> list[MatrixAxes | None]:
    if weight_dimension_numbers is None:
        weight_dimension_numbers = flax_dimension_numbers
    leaves = named_leaves(params)
    if isinstance(weight_dimension_numbers, MuonDimensionNumbers):
        specs = {path: weight_dimension_numbers for path, x in leaves.items() if jnp.ndim(x) > 1}
        return [_checked(specs.get(path), path, jnp.shape(x)) for path, x in leaves.items()]
    tree = weight_dimension_numbers
    specs = named_leaves(tree(params) if callable(tree) else tree, is_leaf=_is_spec)
    _check_all_used(specs, params)
    return [_checked(_lookup(specs, path), path, jnp.shape(x)) for path, x in leaves.items()]


def _lookup(specs: dict[Path, Any], path: Path) -> MuonDimensionNumbers | None:
    """The spec at the leaf's path or at the nearest one above it: the tree may be a prefix."""
    for depth in range(len(path), -1, -1):
        if path[:depth] in specs:
            spec = specs[path[:depth]]
            return None if isinstance(spec, optax.MaskedNode) else spec
    return None


def _check_all_used(specs: dict[Path, Any], params: PyTree) -> None:
    """Every spec must be at or above a leaf, a None or a node masked by an outer transformation."""
    places = named_leaves(params, is_leaf=_is_spec)
    if not places:
        return
    for path, spec in specs.items():
        if spec is None or isinstance(spec, optax.MaskedNode):
            continue
        if not any(place[: len(path)] == path for place in places):
            seen = ", ".join(path_string(p) for p in places)
            raise ValueError(
                f"weight_dimension_numbers has {spec} at {path_string(path)}, which matches no"
                f" parameter; the parameters are: {seen}"
            )


def _checked(spec: Any, path: Path, shape: tuple[int, ...]) -> MatrixAxes | None:
    """The spec with both fields as tuples of axes counted from the front."""
    if spec is None:
        return None
    where = f"at {path_string(path)} with shape {shape}"
    if not isinstance(spec, MuonDimensionNumbers):
        raise TypeError(
            f"weight_dimension_numbers must hold optax.contrib.MuonDimensionNumbers or None,"
            f" got {spec!r} {where}"
        )
    fields = []
    for field in spec:
        axes = (field,) if isinstance(field, int) else tuple(field)
        if not axes or any(not -len(shape) <= a < len(shape) for a in axes):
            raise ValueError(
                f"{spec} {where} names an axis out of range: axes are"
                f" {-len(shape)} to {len(shape) - 1}, at least one in each field"
            )
        fields.append(tuple(a % len(shape) for a in axes))
    named = fields[0] + fields[1]
    if len(set(named)) != len(named):
        raise ValueError(f"{spec} {where} names an axis twice")
    return fields[0], fields[1]
