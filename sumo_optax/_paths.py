"""Leaves of a tree by the names on their way, and the whole tree that a part of it is of."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

PyTree = Any
Path = tuple[str, ...]

# The fields in which Flax's variables and boxes hold their array.
_WRAPPED = ("value", "raw_value")


class Leaf(NamedTuple):
    path: Path
    value: Any
    nodes: tuple[Any, ...]  # of the tree, from the root to the one that holds the leaf


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


def leaves_of(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[Leaf]:
    """In JAX's order. The field that a wrapper of one array holds it in is no part of the path."""
    return list(_walk(tree, (), (), is_leaf))


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    return {leaf.path: leaf.value for leaf in leaves_of(tree, is_leaf)}


def map_named(
    f: Callable[[Path, Any], Any], tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> PyTree:
    """`f(path, leaf)` in place of each leaf."""
    treedef = jax.tree.structure(tree, is_leaf=is_leaf)
    return treedef.unflatten([f(leaf.path, leaf.value) for leaf in leaves_of(tree, is_leaf)])


def path_string(names: Path) -> str:
    return "/".join(names) or "(the root)"


def few(words: list[str], joint: str = ", ") -> str:
    """The first five, and how many more there are."""
    return joint.join(words[:5] + ([f"and {len(words) - 5} more"] if len(words) > 5 else []))


def nodes_of(tree: PyTree, *kinds: Any) -> list[Any]:
    """The nodes of these types in a tree, the outermost alone."""
    is_node = lambda x: isinstance(x, kinds)
    return list(filter(is_node, jax.tree.leaves(tree, is_leaf=is_node)))


def _walk(node: Any, path: Path, nodes: tuple[Any, ...], is_leaf) -> Iterator[Leaf]:
    if is_leaf is not None and is_leaf(node):
        yield Leaf(path, node, nodes)
        return
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(children) == 1 and children[0][1] is node:  # None is a node without children
        yield Leaf(path, node, nodes)
        return
    for (*_, key), child in children:
        wraps = len(children) == 1 and getattr(key, "name", None) in _WRAPPED
        name = str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        yield from _walk(child, path if wraps else (*path, name), (*nodes, node), is_leaf)
