"""Which leaves of a tree are matrices, where nobody says so: read off what the tree shows.

Evidence, in the order in which it is trusted: the axis names that variables carry, the types of
modules, sizes that all leaves of a block share, the bias beside a kernel, and names last. What is
left open is no matrix: the fallback is the safe choice, and `init` warns of it.
"""

import math
import re
from collections.abc import Iterable
from os.path import commonprefix
from typing import Any, NamedTuple

import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from sumo_optax._paths import Leaf, Path, PyTree, leaves_of, map_named

Axes = tuple[int, ...]
Shape = tuple[int, ...]

_KERNELS = {"kernel", "weight", "w"}
_BIASES = ("bias", "b")
# Fields of wrappers that a path may end in.
_ARRAYS = {"array", "data_array"}

_VECTOR = re.compile(
    r"(^|_)(bias|scale|gain|gamma|beta|sinks?)(_?\d+)?$|^(b|g|offset|mean|var|a_log)$"
)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
_TABLE_OR_HEAD = re.compile(
    r"embed|(^|_)(emb|w[tp]e|(lm_|output_)?head|logits?(_?dense)?|classifier)(_?\d+)?$"
)
# Heads where they stand outside of any layer; layers have matrices of these names.
_LAST = re.compile(r"^(output|proj_out)$")
_LAYER = re.compile(r"\d|layer|block|att|mlp|ffn")
_INTO_HEADS = re.compile(r"^w?(q|k|v|query|key|value)(_proj)?$|^w(q|kv)_b$")
_OUT_OF_HEADS = re.compile(r"^(o|out)(_proj)?$")
_OUT_OF_ATTENTION = re.compile(r"^(wo|output|c_proj|proj)$")
_ROUTER = re.compile(r"router|^gate$")
_SHORT_CONV = re.compile(r"conv_?1d|short_?conv|depthwise|dwconv")

# Inputs and outputs of einsum layers' kernels, N heads and D the width. The first axis of those
# that hold several matrices is of no side.
_EINSUMS = {
    "q_einsum": ((1,), (0, 2)),  # NDH
    "kv_einsum": ((2,), (1, 3)),  # 2KDH
    "qkv_einsum": ((2,), (1, 3)),  # 3NDH
    "attn_vec_einsum": ((0, 1), (2,)),  # NHD
    "gating_einsum": ((1,), (2,)),  # 2DF
}

# What variables call their axes.
_STACK_NAME = re.compile(r"^(layers?|blocks?|stages?|stack|scan|repeats?|circular_repeats)$")
_EXPERT_NAME = re.compile(r"^exp(erts?)?$")
_WIDTH_NAME = re.compile(r"^(embed|emb|d_model|model_dim|features)$")
_VOCABULARY_NAME = re.compile(r"^vocab")


class Reading(NamedTuple):
    """What a leaf was found to be."""

    axes: tuple[Axes, Axes] | None  # of inputs and outputs
    why: str
    is_open: bool = False  # it may hold a matrix all the same
    is_short: bool = False  # one side is shorter than all other axes, as a stack's is


class _Leaf(NamedTuple):
    """A leaf as conventions see it: in lower case, without indices and fields of wrappers."""

    names: Path
    shape: Shape  # of what is left once stacks are taken away
    axes: Axes  # of the leaf, that these are
    stacks: tuple[str, ...]  # why the others are stacks
    leaf: Leaf
    is_norm: bool
    is_router: bool

    @property
    def name(self) -> str:
        return self.names[-1] if self.names else ""

    @property
    def module(self) -> str:
        return self.names[-2] if self.name in _KERNELS and len(self.names) > 1 else self.name

    @property
    def inside(self) -> str:
        return " ".join(self.names)

    def without(self, positions: Iterable[int], why: str) -> "_Leaf":
        kept = [i for i in range(len(self.shape)) if i not in set(positions)]
        if len(kept) == len(self.shape):
            return self
        return self._replace(
            shape=tuple(self.shape[i] for i in kept),
            axes=tuple(self.axes[i] for i in kept),
            stacks=(*self.stacks, why),
        )


def flax_dimension_numbers(params: PyTree) -> PyTree:
    """Tells matrices from other leaves by what the tree shows: metadata, shapes and paths.

    Embeddings, output heads, norms, biases and other vectors are no matrices. Of the other leaves
    the axes are read off, in this order of trust:

    1. the names that variables give their axes: NNX's ``out_sharding`` and ``sharding_names``,
       Linen's ``Partitioned``, Haliax's axes. A layer's or expert's axis is a batch axis;
    2. the types of Equinox's and Haliax's layers;
    3. the shapes of the whole tree: a size that all leaves of a block share is a stack of layers,
       whichever axis it is, as in scanned models whose norms are (width, layers);
    4. the bias beside a kernel, which has the kernel's batch axes and its outputs;
    5. names: ``kernel`` and ``w`` are (..., in, out), ``weight`` is (out, in, ...);
       ``query|key|value`` are (d, heads, head_dim) and ``out`` is (heads, head_dim, d); Gemma's
       einsum layers are as their equations say; experts have one more batch axis.

    What all this leaves open is no matrix: the fallback is the safe choice. ``init`` warns of it,
    and ``describe`` says why each leaf is what it is.

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
    found = readings(params)
    numbers = lambda axes: None if axes is None else MuonDimensionNumbers(*axes)
    return map_named(lambda path, _: numbers(found[path].axes), params)


def readings(params: PyTree) -> dict[Path, Reading]:
    leaves = _without_stacks([_named(leaf) for leaf in leaves_of(params)])
    by_names = {x.names: x for x in leaves}
    return {x.leaf.path: _reading(x, by_names) for x in leaves}


def _named(leaf: Leaf) -> _Leaf:
    names = [name for part in leaf.path for name in part.lower().split("/")]
    while len(names) > 1 and (names[-1].isdigit() or names[-1] in _ARRAYS):
        names.pop()
    shape = tuple(jnp.shape(leaf.value))
    is_norm = bool({"scale", "gamma"}.intersection(names[-1:])) or any(map(_NORM.search, names))
    is_router = bool(_KERNELS.intersection(names[-1:])) and any(map(_ROUTER.search, names))
    return _Leaf(tuple(names), shape, tuple(range(len(shape))), (), leaf, is_norm, is_router)


def _reading(x: _Leaf, by_names: dict[Path, _Leaf]) -> Reading:
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
    return found or Reading(None, "path and shape allow more than one reading", is_open=True)


def _no_matrix(x: _Leaf) -> str | None:
    if 0 in x.shape:
        return "it holds no numbers"
    if sum(n > 1 for n in jnp.shape(x.leaf.value)) < 2:
        return "a scalar or a vector"
    if _VECTOR.search(x.name):
        return f"a vector by its name, {x.name}"
    if any(map(_NORM.search, x.names)):
        return "of a norm"
    if any(map(_TABLE_OR_HEAD.search, x.names)) or any(
        _VOCABULARY_NAME.match(name) for names in _axis_names(x.leaf) for name in names
    ):
        return "of a table or an output head"
    if _LAST.match(x.module) and not any(map(_LAYER.search, x.names[: x.names.index(x.module)])):
        return f"an output head: {x.module}, outside of any layer"
    return None


def _because(x: _Leaf, why: str) -> str:
    return "; ".join((*x.stacks, why))


def _matrix(x: _Leaf, inputs: Axes, outputs: Axes, why: str) -> Reading:
    """Axes are those of `x`. A matrix of one row is a vector."""
    sides = [math.prod(x.shape[i] for i in side) for side in (inputs, outputs)]
    if min(sides) == 1:
        return Reading(None, _because(x, "one row or column alone"))
    of_leaf = lambda side: tuple(x.axes[i] for i in side)
    return Reading((of_leaf(inputs), of_leaf(outputs)), _because(x, why))


def _split(x: _Leaf, batch: int, outputs: int, why: str, *, out_first: bool = False) -> Reading:
    """The axes after the batch: inputs first, then outputs, or the other way round."""
    axes = tuple(range(batch, len(x.shape)))
    if out_first:
        return _matrix(x, axes[outputs:], axes[:outputs], why)
    split = len(axes) - outputs
    return _matrix(x, axes[:split], axes[split:], why)


# 1. What variables carry


def _metadata(leaf: Leaf) -> dict[str, Any]:
    node = leaf.nodes[-1] if leaf.nodes else None
    if hasattr(node, "get_metadata"):  # a variable of NNX
        return dict(node.get_metadata())
    if hasattr(node, "names") and hasattr(node, "unbox"):  # a box of Linen
        return {"sharding_names": node.names}
    axes = getattr(node, "axes", None)
    if isinstance(axes, tuple) and all(hasattr(a, "name") for a in axes):  # Haliax
        return {"sharding_names": tuple(a.name for a in axes)}
    return {}


def _axis_names(leaf: Leaf) -> list[tuple[str, ...]]:
    """Of each axis; none where a variable says nothing."""
    metadata = _metadata(leaf)
    fields = ("out_sharding", "sharding_names", "sharding")
    entries = next((metadata[k] for k in fields if isinstance(metadata.get(k), Iterable)), ())
    several = lambda entry: entry if isinstance(entry, tuple) else (entry,)
    names = [tuple(str(name).lower() for name in several(entry) if name) for entry in entries]
    missing = len(jnp.shape(leaf.value)) - len(names)
    return [*names, *[()] * missing] if missing >= 0 and any(names) else []


def _is_named(pattern: re.Pattern, names: tuple[str, ...]) -> bool:
    """Several names on one axis are of a mesh, which says nothing of a model."""
    return len(names) == 1 and bool(pattern.match(names[0]))


def _stacked_by_metadata(x: _Leaf) -> _Leaf:
    last = len(x.shape) - 1
    names = _axis_names(x.leaf)
    stacks = {i for i, of_axis in enumerate(names) if _is_named(_STACK_NAME, of_axis)}
    scanned = _metadata(x.leaf).get("param_scan_axis")
    if isinstance(scanned, int) and last > 0:
        stacks.add(min(scanned, last))
    x = x.without(stacks, "its variable names an axis of layers")
    experts = [i for i, a in enumerate(x.axes) if names and _is_named(_EXPERT_NAME, names[a])]
    return x.without(experts, "and one of experts") if len(x.shape) - len(experts) > 1 else x


def _by_axis_names(x: _Leaf) -> Reading | None:
    """Of three axes and more, the one that is the model's width is a side of its own."""
    names = _axis_names(x.leaf)
    if not names or len(x.shape) < 3:
        return None
    width = [i for i, a in enumerate(x.axes) if _is_named(_WIDTH_NAME, names[a])]
    if len(width) != 1:
        return None
    rest = tuple(i for i in range(len(x.shape)) if i not in width)
    inputs, outputs = (rest, tuple(width)) if width[0] > rest[-1] else (tuple(width), rest)
    return _matrix(x, inputs, outputs, "its variable names the axes")


# 2. The types of modules


def _by_type(x: _Leaf) -> Reading | None:
    """Equinox's layers are (out, in, ...), and Haliax's say which axes are which."""
    kinds = [
        (node, kind.__name__)
        for node in x.leaf.nodes
        for kind in type(node).__mro__
        if kind.__module__.split(".")[0] in ("equinox", "haliax")
    ]
    if not kinds:
        return None
    whole = _named(x.leaf)
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


def _by_named_sides(x: _Leaf, layer: Any, why: str) -> Reading | None:
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


# 3. The shapes of the whole tree


def _without_stacks(leaves: list[_Leaf]) -> list[_Leaf]:
    found = _unstacked([_stacked_by_metadata(x) for x in leaves], 0)
    blocks = _blocks_with_norms(found)
    of_path = {x.leaf.path: _unstacked_like_norms(x, blocks) for x in found}
    return [of_path[x.leaf.path] for x in leaves]


def _unstacked(block: list[_Leaf], depth: int) -> list[_Leaf]:
    """A block's leaves without the axes that are stacks in it, and then in the blocks inside."""
    while positions := _stack(block):
        where = "/".join(commonprefix([x.leaf.path for x in block])) or "the tree"
        size = block[0].shape[positions[0]]
        block = [
            x.without([i], f"axis {x.axes[i]} is a stack of {size}, as in all of {where}")
            for x, i in zip(block, positions, strict=True)
        ]
    inside: dict[str | None, list[_Leaf]] = {}
    for x in block:
        path = x.leaf.path
        inside.setdefault(path[depth] if depth < len(path) else None, []).append(x)
    alone = inside.pop(None, [])
    return alone + [x for part in inside.values() for x in _unstacked(part, depth + 1)]


def _stack(block: list[_Leaf]) -> list[int] | None:
    """Which axis of each leaf is the stack that they all share, if there is one."""
    if len(block) < 2 or not all(x.shape for x in block) or not any(map(_is_large, block)):
        return None
    if any(x.is_router and len(x.shape) == 2 for x in block):  # its experts are no layers
        return None
    places: list[tuple[int, list[int]]] = []
    for place in (0, 1):
        positions = [min(place, len(x.shape) - 1) for x in block]
        sizes = {x.shape[i] for x, i in zip(block, positions, strict=True)}
        if len(sizes) == 1 and _is_stack(block, positions, *sizes):
            places.append((min(sizes), positions))
    if places:  # a model has fewer layers than channels
        return min(places, key=lambda found: found[0])[1]
    return _stack_in_several_places(block)


def _is_large(x: _Leaf) -> bool:
    return len(x.shape) > 2


def _has_heads(x: _Leaf) -> bool:
    """Heads are an axis that the kernels of an attention layer share, and no stack."""
    return any(
        pattern.match(x.module) for pattern in (_INTO_HEADS, _OUT_OF_HEADS, _OUT_OF_ATTENTION)
    ) or (x.module in _EINSUMS and x.module != "gating_einsum")


def _is_stack(block: list[_Leaf], positions: list[int], size: int) -> bool:
    """Whether more than chance makes leaves share a size: a width of the model is shared too."""
    rests = [x.shape[:i] + x.shape[i + 1 :] for x, i in zip(block, positions, strict=True)]
    large = [rest for x, rest in zip(block, rests, strict=True) if _is_large(x)]
    least = 1 < size < min((n for rest in rests for n in rest), default=0)
    for x, rest in zip(block, rests, strict=True):
        if len(rest) != 1:
            continue
        of_width = 1 < size < rest[0] and any(rest[0] in other for other in large)
        if x.is_norm or (of_width and (least or _VECTOR.search(x.name))):
            return True
    several = len(large) == len(block) > 2 and len(set(rests)) > 1
    convolves = any("conv" in x.inside for x in block)
    return several and least and not convolves and not all(map(_has_heads, block))


def _stack_in_several_places(block: list[_Leaf]) -> list[int] | None:
    """The one size, shorter than the width of the norms, that every leaf has once."""
    norms = [x.shape for x in block if x.is_norm and len(x.shape) == 2]
    shared = set.intersection(*(set(x.shape) for x in block))
    shared = {n for n in shared if n > 1 and all(n < max(shape) for shape in norms)}
    kernels = [x for x in block if _is_large(x)]
    if not norms or len(shared) != 1 or all(map(_has_heads, kernels)):
        return None
    [size] = shared
    once = all(x.shape.count(size) == 1 and (len(x.shape) > 1) for x in block)
    return [x.shape.index(size) for x in block] if once else None


def _blocks_with_norms(leaves: list[_Leaf]) -> dict[Path, list[_Leaf]]:
    blocks: dict[Path, list[_Leaf]] = {}
    for x in leaves:
        for depth in range(len(x.leaf.path)):
            blocks.setdefault(x.leaf.path[:depth], []).append(x)
    return {path: block for path, block in blocks.items() if any(x.is_norm for x in block)}


def _unstacked_like_norms(x: _Leaf, blocks: dict[Path, list[_Leaf]]) -> _Leaf:
    """Without the leading axes that all kernels of its nearest block share with the norms there.

    Other leaves of the block may be of other shapes.
    """
    if not _is_large(x):
        return x
    enclosing = (x.leaf.path[:depth] for depth in range(len(x.leaf.path) - 1, -1, -1))
    block = next((blocks[path] for path in enclosing if path in blocks), [])
    kernels = [y.shape for y in block if _is_large(y)]
    stacks = [
        len(y.shape) - 1
        for y in block
        if y.is_norm
        and len(y.shape) > 1
        and all(k[: len(y.shape) - 1] == y.shape[:-1] for k in kernels)
    ]
    return x.without(range(max(stacks, default=0)), "its leading axes are those of the norms")


# 4. The bias beside the kernel


def _by_bias(x: _Leaf, by_names: dict[Path, _Leaf]) -> Reading | None:
    """The bias has the kernel's batch axes and its outputs; two ways to read it leave it open."""
    beside = (by_names.get((*x.names[:-1], name)) for name in _BIASES)
    bias = next((y.shape for y in beside if y is not None and y is not x), ())
    if x.name not in _KERNELS or not bias:
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


# 5. Names


def _by_name(x: _Leaf, by_names: dict[Path, _Leaf]) -> Reading | None:
    if x.module in _EINSUMS and len(x.shape) > 2:
        return _einsum(x, by_names)
    out_first = x.name == "weight"
    if "conv" in x.inside and 3 <= len(x.shape) <= 5 and x.name in _KERNELS:
        return _split(x, 0, 1, "a convolution's kernel", out_first=out_first)
    batch, why = 0, "two axes"
    if _is_large(x) and _is_expert(x, by_names):
        batch, why = 1, "the first axis is of experts"
    own = len(x.shape) - batch
    if own == 2:
        return _split(x, batch, 1, why, out_first=out_first)
    if out_first:
        return None
    if own == 3 and _INTO_HEADS.match(x.module):
        return _into_heads(x, batch, by_names)
    if own == 3 and _is_out_of_heads(x):
        return _out_of_heads(x, batch)
    return _unnamed_convolution(x) if x.name in _KERNELS else None


def _einsum(x: _Leaf, by_names: dict[Path, _Leaf]) -> Reading | None:
    inputs, outputs = _EINSUMS[x.module]
    if len(x.shape) != max(inputs + outputs) + 1:
        return None
    block = x.names[: x.names.index(x.module)]
    down = by_names.get((*block, "linear", "w")) or by_names.get((*block, "linear"))
    if x.module == "gating_einsum" and down and down.shape[0] == x.shape[1] != x.shape[2]:
        inputs, outputs = outputs, inputs
    return _matrix(x, inputs, outputs, f"{x.module}'s equation")


def _into_heads(x: _Leaf, batch: int, by_names: dict[Path, _Leaf]) -> Reading:
    """(d, heads, head_dim), or (heads, d, head_dim) where the kernel out of the heads says so."""
    block = x.names[: x.names.index(x.module)]
    outs = [y for k, y in by_names.items() if k[: len(block)] == block and _is_out_of_heads(y)]
    width = {y.shape[-1] for y in outs}
    if len(x.shape) == 3 and width == {x.shape[1]} != {x.shape[0]}:
        return _matrix(x, (1,), (0, 2), f"{x.module} kernels here are (heads, d, head_dim)")
    found = _split(x, batch, 2, f"{x.module} kernels are (d, heads, head_dim)")
    return found._replace(is_short=x.shape[batch] < min(x.shape[batch + 1 :]))


def _out_of_heads(x: _Leaf, batch: int) -> Reading:
    found = _split(x, batch, 1, f"{x.module} kernels are (heads, head_dim, d)")
    return found._replace(is_short=x.shape[-1] < min(x.shape[batch:-1]))


def _is_out_of_heads(x: _Leaf) -> bool:
    attends = "att" in x.inside and _OUT_OF_ATTENTION.match(x.module)
    return len(x.shape) > 2 and bool(attends or _OUT_OF_HEADS.match(x.module))


def _is_expert(x: _Leaf, by_names: dict[Path, _Leaf]) -> bool:
    """By its path, or by a router beside it that has as many outputs."""
    if re.search(r"expert|(^|_| )moe", x.inside):
        return True
    if _INTO_HEADS.match(x.module) or _OUT_OF_HEADS.match(x.module):
        return False
    routers = [y for y in by_names.values() if y.is_router and len(y.shape) == 2]
    experts = lambda y: y.shape[:1] if y.name == "weight" else y.shape[-1:]
    return any(
        y.names[: len(block)] == block and experts(y) == x.shape[:1]
        for block in filter(None, (x.names[:-1], x.names[:-2]))
        for y in routers
    )


def _has_one_channel(x: _Leaf) -> bool:
    """Depthwise convolutions: a vector for each channel."""
    if len(x.shape) == 2:
        return bool(_SHORT_CONV.search(x.module)) and min(x.shape) <= 8
    channels = x.shape[1] if x.name == "weight" else x.shape[-2]
    return "conv" in x.inside and x.name in _KERNELS and channels == 1


def _unnamed_convolution(x: _Leaf) -> Reading | None:
    """A window as wide as high tells one; with few channels it reads pixels, as a table tokens."""
    height, width, *channels = x.shape
    if len(channels) != 2 or height != width or width > min(31, channels[1]):
        return None
    if channels[0] <= 4:
        return Reading(None, _because(x, "a kernel on pixels, or of one channel"))
    return _split(x, 0, 1, "a convolution's kernel by its square window")
