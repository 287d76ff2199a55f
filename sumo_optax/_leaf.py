"""A leaf as conventions see it: its names, its shape and what its variable carries."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from sumo_optax._paths import Leaf, Path

Axes = tuple[int, ...]
Shape = tuple[int, ...]

KERNELS = {"kernel", "weight", "w"}
# Fields of variables that name the axes.
AXIS_NAMES = ("out_sharding", "sharding_names", "sharding")
# Fields of wrappers that a path may end in.
_ARRAYS = {"array", "data_array"}
VECTOR = re.compile(
    r"(^|_)(bias|scale|gain|gamma|beta|sinks?)(_?\d+)?$|^(b|g|offset|mean|var|a_log)$"
)
NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
INTO_HEADS = re.compile(r"^w?(q|k|v|query|key|value)(_proj)?$|^w(q|kv)_b$")
OUT_OF_HEADS = re.compile(r"^(o|out)(_proj)?$")
OUT_OF_ATTENTION = re.compile(r"^(wo|output|c_proj|proj)$")
_ROUTER = re.compile(r"router|^gate$")
# Inputs and outputs of einsum layers' kernels, N heads and D the width. The first axis of those
# that hold several matrices is of no side.
EINSUMS = {
    "q_einsum": ((1,), (0, 2)),  # NDH
    "k_einsum": ((1,), (0, 2)),  # KDH
    "kv_einsum": ((2,), (1, 3)),  # 2KDH
    "qkv_einsum": ((2,), (1, 3)),  # 3NDH
    "attn_vec_einsum": ((0, 1), (2,)),  # NHD
    "gating_einsum": ((1,), (2,)),  # 2DF
}


class Seen(NamedTuple):
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
        return self.names[-2] if self.name in KERNELS and len(self.names) > 1 else self.name

    @property
    def inside(self) -> str:
        return " ".join(self.names)

    def without(self, positions: Iterable[int], why: str) -> "Seen":
        kept = [i for i in range(len(self.shape)) if i not in set(positions)]
        if len(kept) == len(self.shape):
            return self
        return self._replace(
            shape=tuple(self.shape[i] for i in kept),
            axes=tuple(self.axes[i] for i in kept),
            stacks=(*self.stacks, why),
        )


def seen(leaf: Leaf) -> Seen:
    names = [name for part in leaf.path for name in part.lower().split("/")]
    while len(names) > 1 and (names[-1].isdigit() or names[-1] in _ARRAYS):
        names.pop()
    shape = tuple(jnp.shape(leaf.value))
    is_norm = bool({"scale", "gamma"}.intersection(names[-1:])) or any(map(NORM.search, names))
    is_router = bool(KERNELS.intersection(names[-1:])) and any(map(_ROUTER.search, names))
    return Seen(tuple(names), shape, tuple(range(len(shape))), (), leaf, is_norm, is_router)


def is_large(x: Seen) -> bool:
    return len(x.shape) > 2


def has_heads(x: Seen) -> bool:
    """Heads are an axis that the kernels of an attention layer share, and no stack."""
    return any(
        pattern.match(x.module) for pattern in (INTO_HEADS, OUT_OF_HEADS, OUT_OF_ATTENTION)
    ) or (x.module in EINSUMS and x.module != "gating_einsum")


def metadata(leaf: Leaf) -> dict[str, Any]:
    node = leaf.nodes[-1] if leaf.nodes else None
    if hasattr(node, "get_metadata"):  # a variable of NNX
        return dict(node.get_metadata())
    if hasattr(node, "names") and hasattr(node, "unbox"):  # a box of Linen
        return {"sharding_names": node.names}
    axes = getattr(node, "axes", None)
    if isinstance(axes, tuple) and all(hasattr(a, "name") for a in axes):  # Haliax
        return {"sharding_names": tuple(a.name for a in axes)}
    return {}


def axis_names(leaf: Leaf) -> list[tuple[str, ...]]:
    """Of each axis; none where a variable says nothing."""
    found = metadata(leaf)
    entries = next((found[k] for k in AXIS_NAMES if isinstance(found.get(k), Iterable)), ())
    several = lambda entry: entry if isinstance(entry, tuple) else (entry,)
    names = [tuple(str(name).lower() for name in several(entry) if name) for entry in entries]
    missing = len(jnp.shape(leaf.value)) - len(names)
    return [*names, *[()] * missing] if missing >= 0 and any(names) else []


def is_named(pattern: re.Pattern, names: tuple[str, ...]) -> bool:
    """Several names on one axis are of a mesh, which says nothing of a model."""
    return len(names) == 1 and bool(pattern.match(names[0]))
