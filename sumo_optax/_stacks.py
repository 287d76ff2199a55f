"""Which axes of leaves are stacks: of layers, and of experts that a variable names.

A size that all leaves of a block share is a stack, where more than chance makes them share it.
"""

import re
from os.path import commonprefix

from sumo_optax._leaf import (
    VECTOR,
    Seen,
    axis_names,
    has_heads,
    is_large,
    is_named,
    metadata,
)
from sumo_optax._paths import Path

# What variables call their axes.
_STACK_NAME = re.compile(r"^(layers?|blocks?|stages?|stack|scan|repeats?|circular_repeats)$")
_EXPERT_NAME = re.compile(r"^exp(erts?)?$")


def without_stacks(leaves: list[Seen]) -> list[Seen]:
    found = _unstacked([_stacked_by_metadata(x) for x in leaves], 0)
    blocks = _blocks_with_norms(found)
    of_path = {x.leaf.path: _unstacked_like_norms(x, blocks) for x in found}
    return [of_path[x.leaf.path] for x in leaves]


def _stacked_by_metadata(x: Seen) -> Seen:
    last = len(x.shape) - 1
    names = axis_names(x.leaf)
    stacks = {i for i, of_axis in enumerate(names) if is_named(_STACK_NAME, of_axis)}
    scanned = metadata(x.leaf).get("param_scan_axis")
    if isinstance(scanned, int) and last > 0:
        stacks.add(min(scanned, last))
    x = x.without(stacks, "its variable names an axis of layers")
    experts = [i for i, a in enumerate(x.axes) if names and is_named(_EXPERT_NAME, names[a])]
    return x.without(experts, "and one of experts") if len(x.shape) - len(experts) > 1 else x


def _unstacked(block: list[Seen], depth: int) -> list[Seen]:
    """A block's leaves without the axes that are stacks in it, and then in the blocks inside."""
    while positions := _stack(block):
        where = "/".join(commonprefix([x.leaf.path for x in block])) or "the tree"
        size = block[0].shape[positions[0]]
        block = [
            x.without([i], f"axis {x.axes[i]} is a stack of {size}, as in all of {where}")
            for x, i in zip(block, positions, strict=True)
        ]
    inside: dict[str | None, list[Seen]] = {}
    for x in block:
        path = x.leaf.path
        inside.setdefault(path[depth] if depth < len(path) else None, []).append(x)
    alone = inside.pop(None, [])
    return alone + [x for part in inside.values() for x in _unstacked(part, depth + 1)]


def _stack(block: list[Seen]) -> list[int] | None:
    """Which axis of each leaf is the stack that they all share, if there is one."""
    if len(block) < 2 or not all(x.shape for x in block) or not any(map(is_large, block)):
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


def _is_stack(block: list[Seen], positions: list[int], size: int) -> bool:
    """Whether more than chance makes leaves share a size: a width of the model is shared too."""
    rests = [x.shape[:i] + x.shape[i + 1 :] for x, i in zip(block, positions, strict=True)]
    large = [rest for x, rest in zip(block, rests, strict=True) if is_large(x)]
    least = 1 < size < min((n for rest in rests for n in rest), default=0)
    for x, rest in zip(block, rests, strict=True):
        if len(rest) != 1:
            continue
        of_width = 1 < size < rest[0] and any(rest[0] in other for other in large)
        if x.is_norm or (of_width and (least or VECTOR.search(x.name))):
            return True
    several = len(large) == len(block) > 2 and len(set(rests)) > 1
    convolves = any("conv" in x.inside for x in block)
    return several and least and not convolves and not all(map(has_heads, block))


def _stack_in_several_places(block: list[Seen]) -> list[int] | None:
    """The one size, shorter than the width of the norms, that every leaf has once."""
    norms = [x.shape for x in block if x.is_norm and len(x.shape) == 2]
    shared = set.intersection(*(set(x.shape) for x in block))
    shared = {n for n in shared if n > 1 and all(n < max(shape) for shape in norms)}
    kernels = [x for x in block if is_large(x)]
    if not norms or len(shared) != 1 or all(map(has_heads, kernels)):
        return None
    [size] = shared
    once = all(x.shape.count(size) == 1 and (len(x.shape) > 1) for x in block)
    return [x.shape.index(size) for x in block] if once else None


def _blocks_with_norms(leaves: list[Seen]) -> dict[Path, list[Seen]]:
    blocks: dict[Path, list[Seen]] = {}
    for x in leaves:
        for depth in range(len(x.leaf.path)):
            blocks.setdefault(x.leaf.path[:depth], []).append(x)
    return {path: block for path, block in blocks.items() if any(x.is_norm for x in block)}


def _unstacked_like_norms(x: Seen, blocks: dict[Path, list[Seen]]) -> Seen:
    """Without the leading axes that all kernels of its nearest block share with the norms there.

    Other leaves of the block may be of other shapes.
    """
    if not is_large(x):
        return x
    enclosing = (x.leaf.path[:depth] for depth in range(len(x.leaf.path) - 1, -1, -1))
    block = next((blocks[path] for path in enclosing if path in blocks), [])
    kernels = [y.shape for y in block if is_large(y)]
    stacks = [
        len(y.shape) - 1
        for y in block
        if y.is_norm
        and len(y.shape) > 1
        and all(k[: len(y.shape) - 1] == y.shape[:-1] for k in kernels)
    ]
    return x.without(range(max(stacks, default=0)), "its leading axes are those of the norms")
