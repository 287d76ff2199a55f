"""Which leaves of a tree are matrices, where nobody says so: read off what the tree shows.

Evidence, in the order in which it is trusted: the axis names that variables carry, the types of
modules, sizes that all leaves of a block share, the bias beside a kernel, and names last. An
ambiguous leaf is no matrix: the fallback is the safe choice, and `init` warns of it.
"""

import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from sumo_optax._leaf import (
    EINSUMS,
    INTO_HEADS,
    KERNELS,
    NORM,
    OUT_OF_ATTENTION,
    OUT_OF_HEADS,
    VECTOR,
    Axes,
    Seen,
    axis_names,
    has_heads,
    is_large,
    is_named,
    seen,
)
from sumo_optax._paths import Path, PyTree, leaves_of, map_named
from sumo_optax._stacks import without_stacks

_BIASES = ("bias", "b")

_TABLE_OR_HEAD = re.compile(
    r"embed|(^|_)(emb|w[tp]e|(lm_|output_)?head|logits?(_?dense)?|classifier)(_?\d+)?$"
)
# Heads where they stand outside of any layer; layers have matrices of these names.
_LAST = re.compile(r"^(output|proj_out)$")
_LAYER = re.compile(r"\d|layer|block|att|mlp|ffn")
_BLOCK_DIAGONAL = "o_a_proj"  # of DeepSeek 4, a matrix for each group of heads
_SHORT_CONV = re.compile(r"conv_?1d|short_?conv|depthwise|dwconv")

_WIDTH_NAME = re.compile(r"^(embed|emb|d_model|model_dim|features)$")
_VOCABULARY_NAME = re.compile(r"^vocab")


class Reading(NamedTuple):
    """What a leaf was found to be."""

    axes: tuple[Axes, Axes] | None  # of inputs and outputs
    why: str
    is_ambiguous: bool = False  # it may hold a matrix all the same
    is_short: bool = False  # one side is shorter than all other axes, as a stack's is


def flax_dimension_numbers(params: PyTree) -> PyTree:
    """Finds the matrices of a tree from metadata, shapes and paths.

    Embeddings, output heads, norms, biases and other vectors are not matrices. For any other leaf
    the first of these sources that knows its axes decides:

    1. the names that variables give their axes: NNX's ``out_sharding`` and ``sharding_names``,
       Linen's ``Partitioned``, Haliax's axes. An axis of layers or experts is a batch axis;
    2. the types of Equinox's and Haliax's layers;
    3. the shapes of the whole tree: an axis of one size in all leaves of a block is a stack of
       layers, wherever it stands, as in scanned models whose norms are (width, layers);
    4. the bias beside a kernel, which has the kernel's batch axes and outputs;
    5. names: ``kernel`` and ``w`` are (..., in, out), ``weight`` is (out, in, ...);
       ``query|key|value`` are (d, heads, head_dim) and ``out`` is (heads, head_dim, d); Gemma's
       einsum layers follow their equations; experts have one more batch axis.

    If no source knows the axes of a leaf, the leaf is ambiguous: it is not a matrix, and the
    fallback trains it. ``init`` warns about such leaves, and ``describe`` gives the reason for each
    leaf.

    This function is the default of every ``weight_dimension_numbers``. Wrap it to overrule it for
    some leaves, or replace it.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Tree of the same structure, with ``optax.contrib.MuonDimensionNumbers`` for a matrix and None
      for any other leaf.

    Examples:
      >>> import jax.numpy as jnp, sumo_optax
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
      >>> sumo_optax.flax_dimension_numbers(params)["dense"]["kernel"]
      MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1,))
    """
    found = readings(params)
    numbers = lambda axes: None if axes is None else MuonDimensionNumbers(*axes)
    return map_named(lambda path, _: numbers(found[path].axes), params)


def readings(params: PyTree) -> dict[Path, Reading]:
    leaves = without_stacks([seen(leaf) for leaf in leaves_of(params)])
    by_names = {x.names: x for x in leaves}
    return {x.leaf.path: _reading(x, by_names) for x in leaves}


def _reading(x: Seen, by_names: dict[Path, Seen]) -> Reading:
    reason = _no_matrix(x)
    if reason:
        return Reading(None, reason)
    typed = _by_type(x)
    if typed:
        return typed
    if len(x.shape) < 2:
        return Reading(None, _because(x, "a vector"))
    if _has_one_channel(x):
        return Reading(None, _because(x, "a kernel of one channel"))
    found = _by_axis_names(x) or _by_bias(x, by_names) or _by_name(x, by_names)
    long = tuple(i for i, n in enumerate(x.shape) if n > 1)
    if not found and len(long) == 2:
        return _matrix(x, long[:1], long[1:], "two axes longer than 1")
    return found or Reading(None, "path and shape allow more than one reading", is_ambiguous=True)


def _no_matrix(x: Seen) -> str | None:
    if 0 in x.shape:
        return "it holds no numbers"
    if sum(n > 1 for n in jnp.shape(x.leaf.value)) < 2:
        return "a scalar or a vector"
    if VECTOR.search(x.name):
        return f"a vector by its name, {x.name}"
    if any(map(NORM.search, x.names)):
        return "of a norm"
    if any(map(_TABLE_OR_HEAD.search, x.names)) or any(
        _VOCABULARY_NAME.match(name) for names in axis_names(x.leaf) for name in names
    ):
        return "of a table or an output head"
    if _LAST.match(x.module) and not any(map(_LAYER.search, x.names[: x.names.index(x.module)])):
        return f"an output head: {x.module}, outside of any layer"
    return None


def _because(x: Seen, why: str) -> str:
    return "; ".join((*x.stacks, why))


def _matrix(x: Seen, inputs: Axes, outputs: Axes, why: str) -> Reading:
    """Axes are those of `x`. A matrix of one row is a vector."""
    sides = [math.prod(x.shape[i] for i in side) for side in (inputs, outputs)]
    if min(sides) == 1:
        return Reading(None, _because(x, "one row or column alone"))
    of_leaf = lambda side: tuple(x.axes[i] for i in side)
    return Reading((of_leaf(inputs), of_leaf(outputs)), _because(x, why))


def _split(x: Seen, batch: int, outputs: int, why: str, *, out_first: bool = False) -> Reading:
    """The axes after the batch: inputs first, then outputs, or the other way round."""
    axes = tuple(range(batch, len(x.shape)))
    if out_first:
        return _matrix(x, axes[outputs:], axes[:outputs], why)
    split = len(axes) - outputs
    return _matrix(x, axes[:split], axes[split:], why)


# What variables carry


def _by_axis_names(x: Seen) -> Reading | None:
    """Of three axes and more, the one that is the model's width is a side of its own."""
    names = axis_names(x.leaf)
    if not names or len(x.shape) < 3:
        return None
    width = [i for i, a in enumerate(x.axes) if is_named(_WIDTH_NAME, names[a])]
    if len(width) != 1:
        return None
    rest = tuple(i for i in range(len(x.shape)) if i not in width)
    inputs, outputs = (rest, tuple(width)) if width[0] > rest[-1] else (tuple(width), rest)
    return _matrix(x, inputs, outputs, "its variable names the axes")


# The types of modules


def _by_type(x: Seen) -> Reading | None:
    """Equinox's layers are (out, in, ...), and Haliax's say which axes are which."""
    kinds = [
        (node, kind.__name__)
        for node in x.leaf.nodes
        for kind in type(node).__mro__
        if kind.__module__.split(".")[0] in ("equinox", "haliax")
    ]
    if not kinds:
        return None
    whole = seen(x.leaf)
    for node, kind in reversed(kinds):
        why = f"the layout of {kind}"
        if kind == "Embedding" or kind.endswith("Norm"):
            return Reading(None, f"of a module {kind}")
        if hasattr(node, "In") and hasattr(node, "Out"):
            return _by_named_sides(whole, node, why)
        own = {"Linear": 2, "GRUCell": 2, "LSTMCell": 2}.get(kind)
        if kind in ("Conv", "ConvTranspose"):
            own = node.num_spatial_dims + 2
        if own is None or not x.name.startswith("weight") or own > len(whole.shape):
            continue
        batch = len(whole.shape) - own
        if own > 2 and whole.shape[batch + 1] == 1:
            return Reading(None, "a kernel of one channel")
        return _split(whole, batch, 1, why, out_first=True)
    return None


def _by_named_sides(x: Seen, layer: Any, why: str) -> Reading | None:
    axes = getattr(x.leaf.nodes[-1], "axes", ())
    if x.name != "weight" or len(axes) != len(x.shape):
        return None
    several = lambda side: side if isinstance(side, (tuple, list)) else (side,)
    named = lambda side: {getattr(a, "name", a) for a in several(side)}
    inputs, outputs = (
        tuple(i for i, a in enumerate(axes) if a.name in named(side))
        for side in (layer.In, layer.Out)
    )
    return _matrix(x, inputs, outputs, why) if inputs and outputs else None


# The bias beside the kernel


def _by_bias(x: Seen, by_names: dict[Path, Seen]) -> Reading | None:
    """The bias has the kernel's batch axes and its outputs; it may be ambiguous itself."""
    beside = (by_names.get((*x.names[:-1], name)) for name in _BIASES)
    bias = next((y.shape for y in beside if y is not None and y is not x), ())
    if x.name not in KERNELS or not bias:
        return None
    why = "by the bias beside it"
    while bias and bias[-1] == 1 and x.name == "weight" and len(bias) > 1:
        bias = bias[:-1]
    if x.name == "weight" and len(bias) < len(x.shape) and x.shape[: len(bias)] == bias:
        return _split(x, len(bias) - 1, 1, why, out_first=True)
    readings = [
        batch
        for batch in range(len(bias))
        if bias == x.shape[:batch] + x.shape[len(x.shape) - len(bias) + batch :]
        and len(bias) < len(x.shape)
    ]
    if len(readings) != 1:
        return None
    return _split(x, readings[0], len(bias) - readings[0], why)


# Names


def _by_name(x: Seen, by_names: dict[Path, Seen]) -> Reading | None:
    if x.module in EINSUMS and len(x.shape) > 2:
        return _einsum(x, by_names)
    out_first = x.name == "weight"
    if "conv" in x.inside and 3 <= len(x.shape) <= 5 and x.name in KERNELS:
        return _split(x, 0, 1, "a convolution's kernel", out_first=out_first)
    batch, why = 0, "two axes"
    if is_large(x) and _is_expert(x, by_names):
        batch, why = 1, "the first axis is of experts"
    own = len(x.shape) - batch
    if own == 2:
        return _split(x, batch, 1, why, out_first=out_first)
    if out_first:
        return None
    if own == 3 and INTO_HEADS.match(x.module):
        return _into_heads(x, batch, by_names)
    if own == 3 and _is_out_of_heads(x):
        return _out_of_heads(x, batch)
    return _unnamed_convolution(x) if x.name in KERNELS else None


def _einsum(x: Seen, by_names: dict[Path, Seen]) -> Reading | None:
    """Experts have one more axis in front."""
    inputs, outputs = EINSUMS[x.module]
    experts = len(x.shape) - max(inputs + outputs) - 1
    if experts not in (0, 1) or (experts == 1 and not _is_expert(x, by_names)):
        return None
    block = x.names[: x.names.index(x.module)]
    down = by_names.get((*block, "linear", "w")) or by_names.get((*block, "linear"))
    if x.module == "gating_einsum" and down and down.shape[-2] == x.shape[-2] != x.shape[-1]:
        inputs, outputs = outputs, inputs
    inputs, outputs = (tuple(a + experts for a in side) for side in (inputs, outputs))
    return _matrix(x, inputs, outputs, f"{x.module}'s equation")


def _into_heads(x: Seen, batch: int, by_names: dict[Path, Seen]) -> Reading:
    """(d, heads, head_dim), or (heads, d, head_dim) where the kernel out of the heads says so."""
    block = x.names[: x.names.index(x.module)]
    outs = [y for k, y in by_names.items() if k[: len(block)] == block and _is_out_of_heads(y)]
    width = {y.shape[-1] for y in outs}
    if len(x.shape) == 3 and width == {x.shape[1]} != {x.shape[0]}:
        return _matrix(x, (1,), (0, 2), f"{x.module} kernels here are (heads, d, head_dim)")
    found = _split(x, batch, 2, f"{x.module} kernels are (d, heads, head_dim)")
    return found._replace(is_short=x.shape[batch] < min(x.shape[batch + 1 :]))


def _out_of_heads(x: Seen, batch: int) -> Reading:
    found = _split(x, batch, 1, f"{x.module} kernels are (heads, head_dim, d)")
    return found._replace(is_short=x.shape[-1] < min(x.shape[batch:-1]))


def _is_out_of_heads(x: Seen) -> bool:
    attends = "att" in x.inside and OUT_OF_ATTENTION.match(x.module)
    return len(x.shape) > 2 and bool(attends or OUT_OF_HEADS.match(x.module))


def _is_expert(x: Seen, by_names: dict[Path, Seen]) -> bool:
    """By its path, or by a router beside it that has as many outputs.

    The attention of a block that is called after its experts is none of them.
    """
    if has_heads(x) and "att" in x.inside:
        return False
    if x.module == _BLOCK_DIAGONAL or re.search(r"expert|(^|_| )moe", x.inside):
        return True
    if INTO_HEADS.match(x.module) or OUT_OF_HEADS.match(x.module):
        return False
    routers = [y for y in by_names.values() if y.is_router and len(y.shape) == 2]
    experts = lambda y: y.shape[:1] if y.name == "weight" else y.shape[-1:]
    return any(
        y.names[: len(block)] == block and experts(y) == x.shape[:1]
        for block in filter(None, (x.names[:-1], x.names[:-2]))
        for y in routers
    )


def _has_one_channel(x: Seen) -> bool:
    """Depthwise convolutions: a vector for each channel."""
    if len(x.shape) == 2:
        return bool(_SHORT_CONV.search(x.module)) and min(x.shape) <= 8
    channels = x.shape[1] if x.name == "weight" else x.shape[-2]
    return "conv" in x.inside and x.name in KERNELS and channels == 1


def _unnamed_convolution(x: Seen) -> Reading | None:
    """A window as wide as high tells one; with few channels it reads pixels, as a table tokens."""
    height, width, *channels = x.shape
    if len(channels) != 2 or height != width or width > min(31, channels[1]):
        return None
    if channels[0] <= 4:
        return Reading(None, _because(x, "a kernel on pixels, or of one channel"))
    return _split(x, 0, 1, "a convolution's kernel by its square window")
