"""The optimizers that every contract holds for. A new optimizer is one row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sumo_optax

# name: (the optimizer, the transformation), both as functions of keyword arguments.
TABLE = {
    "sumo": (
        lambda learning_rate=1e-2, rank=3, **kw: sumo_optax.sumo(learning_rate, rank, **kw),
        lambda rank=3, **kw: sumo_optax.scale_by_sumo(rank, **kw),
    ),
    "sumo_periodic": (
        lambda learning_rate=1e-2, rank=3, **kw: sumo_optax.sumo(
            learning_rate, rank, basis="randomized_svd", refresh_every=4, stagger=True, **kw
        ),
        lambda rank=3, **kw: sumo_optax.scale_by_sumo(
            rank,
            basis="randomized_svd",
            refresh_every=4,
            stagger=True,
            residual="gradient",
            **kw,
        ),
    ),
    "sumo_orthogonal": (
        lambda learning_rate=1e-2, rank=3, **kw: sumo_optax.sumo(
            learning_rate, rank, residual="orthogonal", **kw
        ),
        lambda rank=3, **kw: sumo_optax.scale_by_sumo(rank, residual="orthogonal", **kw),
    ),
    "sumo_int8": (
        lambda learning_rate=1e-2, rank=3, **kw: sumo_optax.sumo(
            learning_rate, rank, state_dtype="int8", **kw
        ),
        lambda rank=3, **kw: sumo_optax.scale_by_sumo(rank, state_dtype="int8", **kw),
    ),
    "online_subspace_descent": (
        lambda learning_rate=1e-2, rank=3, momentum=0.9, **kw: sumo_optax.online_subspace_descent(
            learning_rate, rank, inner=optax.scale_by_adam(momentum), **kw
        ),
        lambda rank=3, **kw: sumo_optax.scale_by_online_subspace_descent(rank, **kw),
    ),
    "galore": (
        lambda learning_rate=1e-2, rank=3, momentum=0.9, weight_decay=0.0, **kw: optax.chain(
            sumo_optax.scale_in_subspace(
                optax.scale_by_adam(momentum), rank, refresh_every=4, transport=True, **kw
            ),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        ),
        lambda rank=3, **kw: sumo_optax.scale_in_subspace(
            optax.scale_by_adam(), rank, refresh_every=4, transport=True, **kw
        ),
    ),
    "mofasgd": (
        lambda learning_rate=1e-2, rank=3, **kw: sumo_optax.mofasgd(learning_rate, rank, **kw),
        lambda rank=3, **kw: sumo_optax.scale_by_mofasgd(rank, **kw),
    ),
}


# Rows of other arguments: as slow tests, their files having tests of their own besides.
VARIANTS = ("sumo_periodic", "sumo_orthogonal", "sumo_int8", "galore")


def every(column, slow=VARIANTS, without=()):
    """The same arguments give the same object, so that tests share its compilations."""
    marks = lambda name: [pytest.mark.slow] if name in slow else []
    rows = [
        pytest.param(functools.cache(row[column]), id=name, marks=marks(name))
        for name, row in TABLE.items()
        if name not in without
    ]
    return pytest.mark.parametrize("make", rows)


every_optimizer, every_transformation = every(0), every(1)
# For tests that compile for long: in the quick suite one row stands for all.
ALL_BUT_ONE = [name for name in TABLE if name != "sumo"]
every_optimizer_slowly, every_transformation_slowly = every(0, ALL_BUT_ONE), every(1, ALL_BUT_ONE)
# For tests of what arrays of the state are; those in few bits have tests of their own.
IN_FEW_BITS = ("sumo_int8",)
every_optimizer_in_floats = every(0, without=IN_FEW_BITS)
every_optimizer_in_floats_slowly = every(0, ALL_BUT_ONE, IN_FEW_BITS)
every_transformation_in_floats = every(1, without=IN_FEW_BITS)
# For tests of what is sent: not those that need whole matrices.
WHOLE = ("sumo_orthogonal",)
every_low_rank_transformation = every(1, without=(*IN_FEW_BITS, *WHOLE))
every_low_rank_transformation_slowly = every(1, ALL_BUT_ONE, WHOLE)


def like(tree, seed, scale=1.0):
    """A random tree of the same shapes and dtypes; of NumPy's, which has nothing to compile."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    draw = lambda x: np.asarray(scale * rng.normal(size=jnp.shape(x)), jnp.result_type(x))
    return treedef.unflatten([jnp.asarray(draw(x)) for x in leaves])


def small_params():
    """A kernel, a batch of kernels, and leaves that are no matrices."""
    shapes = {
        "dense": {"kernel": (12, 6), "bias": (6,)},
        "layers": {"up": {"kernel": (2, 6, 10), "bias": (2, 10)}},
        "embed": {"embedding": (9, 6)},
        "scale": (),
    }
    zeros = lambda shape: np.zeros(shape, np.float32)
    return like(jax.tree.map(zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)), 0)


def train(tx, params, steps, first=1, state=None):
    """Steps on random gradients that depend on the step alone; returns parameters and state."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for t in range(first, first + steps):
        updates, state = update(like(params, t), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def three_steps(name):
    """Updates and state of one matrix and one vector, for a process of its own."""
    params = {"kernel": np.ones((12, 6), np.float32), "bias": np.ones(6, np.float32)}
    tx = TABLE[name][0]()
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for t in range(3):
        updates, state = update(like(params, t), state, params)
    return jax.tree.leaves((updates, state))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, rtol=1e-5):
    """Equal to `rtol` of each leaf's norm."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y) + 1e-30
