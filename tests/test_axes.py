"""Which leaves are matrices, and over which axes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import sumo_optax


def read(**shapes):
    """What the default rule says of one leaf, `kernel`, with the other leaves about it."""
    tree = {}
    for path, shape in shapes.items():
        *modules, leaf = path.split("__")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    axes = sumo_optax.flax_dimension_numbers(tree)
    *modules, leaf = next(iter(shapes)).split("__")
    for key in (*modules, leaf):
        axes = axes[key]
    return axes


MATRICES = {
    "dense": (dict(Dense_0__kernel=(8, 4), Dense_0__bias=(4,)), Axes((0,), (1,))),
    "bare 2-D": (dict(w=(8, 4)), Axes((0,), (1,))),
    "into heads": (dict(attn__query__kernel=(8, 2, 4)), Axes((0,), (1, 2))),
    "into heads, bias": (
        dict(attn__query__kernel=(8, 2, 4), attn__query__bias=(2, 4)),
        Axes((0,), (1, 2)),
    ),
    "out of heads": (dict(attn__out__kernel=(2, 4, 8)), Axes((0, 1), (2,))),
    "out of heads, bias": (
        dict(attn__out__kernel=(2, 4, 8), attn__out__bias=(8,)),
        Axes((0, 1), (2,)),
    ),
    "conv": (dict(Conv_0__kernel=(3, 3, 8, 16)), Axes((0, 1, 2), (3,))),
    "conv, bias": (dict(stem__kernel=(3, 3, 8, 16), stem__bias=(16,)), Axes((0, 1, 2), (3,))),
    "conv over time": (dict(conv__kernel=(5, 8, 16)), Axes((0, 1), (2,))),
    "stacked dense, bias": (
        dict(layers__up__kernel=(6, 8, 4), layers__up__bias=(6, 4)),
        Axes((1,), (2,)),
    ),
    "stacked dense, norm": (
        dict(layers__up__kernel=(6, 8, 4), layers__norm__scale=(6, 8)),
        Axes((1,), (2,)),
    ),
    "stacked dense named like attention": (
        dict(layers__q_proj__kernel=(6, 8, 8), layers__norm__scale=(6, 8)),
        Axes((1,), (2,)),
    ),
    "stacked into heads": (
        dict(layers__query__kernel=(6, 8, 2, 4), layers__norm__scale=(6, 8)),
        Axes((1,), (2, 3)),
    ),
    "stacked out of heads, bias": (
        dict(layers__out__kernel=(6, 2, 4, 8), layers__out__bias=(6, 8)),
        Axes((1, 2), (3,)),
    ),
    "experts": (dict(block__experts__kernel=(4, 8, 6), block__norm__scale=(8,)), Axes((1,), (2,))),
    "stacked experts": (
        dict(layers__experts__w=(2, 4, 8, 6), layers__norm__scale=(2, 8)),
        Axes((2,), (3,)),
    ),
    "norms of another stack": (
        dict(head_mixer__query__kernel=(8, 2, 4), layers__norm__scale=(6, 8)),
        Axes((0,), (1, 2)),
    ),
}

OTHERS = {
    "embedding": dict(Embed_0__embedding=(100, 8)),
    "token table": dict(wte__weight=(100, 8)),
    "positions": dict(pos_embed=(16, 8)),
    "head": dict(lm_head__kernel=(8, 100)),
    "numbered head": dict(head_0__kernel=(8, 100)),
    "stacked biases": dict(layers__up__bias=(6, 8)),
    "stacked norms": dict(layers__norm__scale=(6, 8)),
    "vector": dict(Dense_0__bias=(8,)),
    "scalar": dict(temperature=()),
    "one output": dict(Dense_0__kernel=(8, 1)),
    "stacked or many-headed": dict(up__kernel=(6, 8, 4)),
    "unnamed 3-D": dict(table=(6, 8, 4)),
    "two readings": dict(up__kernel=(4, 4, 4), up__bias=(4, 4)),
}


@pytest.mark.parametrize("shapes, axes", MATRICES.values(), ids=MATRICES)
def test_matrices(shapes, axes):
    assert read(**shapes) == axes


@pytest.mark.parametrize("shapes", OTHERS.values(), ids=OTHERS)
def test_no_matrices(shapes):
    assert read(**shapes) is None


# weight_dimension_numbers

PARAMS = {"a": {"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones(4)}, "b": jnp.ones((8, 4))}


def roles(weight_dimension_numbers, params=PARAMS):
    tx = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=weight_dimension_numbers)
    report = sumo_optax.describe(tx, params)
    return {leaf.path: (leaf.batch, leaf.m, leaf.n) for leaf in report.leaves if leaf.m}


BOTH = {"a/kernel": ((3,), 8, 4), "b": ((), 8, 4)}


@pytest.mark.parametrize(
    "numbers, expected",
    [
        (Axes(-2, -1), BOTH),
        ({"a": {"kernel": Axes(1, 2), "bias": None}, "b": None}, {"a/kernel": ((3,), 8, 4)}),
        ({"a": {"kernel": Axes((0, 1), (2,)), "bias": None}, "b": None}, {"a/kernel": ((), 24, 4)}),
        ({"a": None, "b": Axes(0, 1)}, {"b": ((), 8, 4)}),
        (lambda params: {"a": {"kernel": Axes(1, 2)}, "b": Axes()}, BOTH),
        (lambda params: jax.tree.map(lambda x: Axes(-2, -1) if x.ndim > 1 else None, params), BOTH),
    ],
    ids=["one spec", "tree", "merged axes", "prefix", "partial tree", "callable"],
)
def test_weight_dimension_numbers(numbers, expected):
    assert roles(numbers) == expected


def test_axes_not_named_are_batch_axes_wherever_they_are():
    assert roles({"w": Axes(0, 2)}, {"w": jnp.ones((8, 3, 4))}) == {"w": ((3,), 8, 4)}


@pytest.mark.parametrize(
    "numbers, error",
    [
        ({"a": None, "c": Axes()}, r"at c, which matches no parameter.*a/kernel"),
        ({"a": {"kernel": Axes(0, 3)}}, r"at a/kernel with shape \(3, 8, 4\).*axis out of range"),
        ({"a": {"kernel": Axes(0, -3)}}, r"at a/kernel .* names an axis twice"),
        ({"a": {"kernel": Axes((), 1)}}, r"at least one in each field"),
        ({"b": "rows"}, r"MuonDimensionNumbers or None, got 'rows' at b"),
    ],
)
def test_wrong_numbers_name_the_leaf(numbers, error):
    tx = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=numbers)
    with pytest.raises((ValueError, TypeError), match=error):
        tx.init(PARAMS)


def test_masked_and_missing_leaves_may_have_a_spec():
    masked = {"a": {"kernel": optax.MaskedNode(), "bias": None}, "b": jnp.ones((8, 4))}
    numbers = {"a": {"kernel": Axes(1, 2), "bias": Axes(0, 1)}, "b": Axes()}
    assert roles(numbers, masked) == {"b": ((), 8, 4)}
    assert roles(lambda params: numbers, masked) == {"b": ((), 8, 4)}
