"""Gradients that are zero, tiny, huge, of low rank, or not finite, for every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import (
    assert_equal,
    every_optimizer,
    every_transformation,
    every_transformation_slowly,
    like,
)
from hypothesis import given, settings, strategies

import sumo_optax
from sumo_optax._quantize import Quantized, dequantized

SHAPE = (12, 6)
rng = np.random.default_rng(0)
DENSE = rng.normal(size=SHAPE).astype(np.float32)
STRANGE = {
    "zero": np.zeros(SHAPE),
    "rank 1": np.outer(np.arange(12), np.arange(6)),
    "rank 1 wide": np.outer(np.arange(6), np.arange(12)),
    "constant": np.ones(SHAPE),
    "one entry": np.eye(*SHAPE) * (np.arange(6) == 2),
    "tiny": 1e-30 * DENSE,
    "huge": 1e30 * DENSE,
    "mixed": DENSE * np.logspace(-30, 30, 6),
    "stack": np.stack([DENSE, 0 * DENSE, 1e30 * DENSE]),
}
STRANGE = {k: {"kernel": jnp.asarray(x, jnp.float32)} for k, x in STRANGE.items()}
STRANGE["stack"]["bias"] = jnp.ones((3, 6))


def all_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@every_transformation_slowly
def test_strange_gradients_give_finite_updates_and_states(make):
    tx = make()
    state, update = tx.init(STRANGE), jax.jit(tx.update)
    for t in range(6):
        # Now and then the strange ones alternate with ordinary ones, through a refresh.
        grads = like(STRANGE, t) if t in (2, 3) else STRANGE
        updates, state = update(grads, state)
        assert all_finite(updates) and all_finite(state)
        for name in ("rank 1", "rank 1 wide", "constant", "one entry"):
            assert np.abs(updates[name]["kernel"]).max() > 0
    if isinstance(state, sumo_optax.SubspaceState) and jax.tree.leaves(state.projector):
        return  # online PCA keeps its basis near orthonormal only where the gradient has rank r
    atol = 0.02 if isinstance(state.basis, Quantized) else 1e-4
    for Q in jax.tree.leaves(dequantized(state).basis):
        gram = np.swapaxes(Q, -1, -2) @ Q
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=atol)


PARAMS = {
    "one": {"kernel": jnp.zeros(SHAPE), "bias": jnp.zeros(6)},
    "stack": {"kernel": jnp.zeros((2, *SHAPE)), "bias": jnp.zeros((2, 6))},
}


def spoil(layer, leaf, place, value):
    return lambda g: g | {layer: g[layer] | {leaf: g[layer][leaf].at[place].set(value)}}


BAD = {
    "a NaN in one": spoil("one", "kernel", (3, 2), jnp.nan),
    "an Inf in one": spoil("one", "kernel", (3, 2), jnp.inf),
    "a NaN in a bias": spoil("one", "bias", 1, jnp.nan),
    "one of a stack": spoil("stack", "kernel", (1, 0, 0), -jnp.inf),
    "all": lambda g: jax.tree.map(lambda x: x * jnp.nan, g),
}
SKIPPED = {"a NaN in one": 1, "an Inf in one": 1, "a NaN in a bias": 1, "one of a stack": 1}
SKIPPED["all"] = 1 + 1 + 2 + 1  # a stack counts its matrices


def low_rank_part(state):
    """The state's fields of matrices."""
    return state[1:-2]


@every_transformation_slowly
@pytest.mark.parametrize("step", [0, 3, 4], ids=["first", "ordinary", "refresh"])
def test_a_gradient_that_is_not_finite_moves_nothing(make, step):
    """Update zero and state untouched for that leaf alone, and the next step is a good one."""
    tx = make()
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for t in range(step):
        _, state = update(like(PARAMS, t), state)
    grads = like(PARAMS, step)
    clean, after_clean = update(grads, state)
    for case, make_bad in BAD.items():
        updates, after = update(make_bad(grads), state)
        assert all_finite(updates) and all_finite(after)
        assert after.skipped - state.skipped == SKIPPED[case]
        fields = zip(
            *(jax.tree.leaves(low_rank_part(s)) for s in (state, after, after_clean)), strict=True
        )
        if case == "all":
            assert optax.tree.norm(updates) == 0
            assert_equal(low_rank_part(after), low_rank_part(state))
        elif case == "one of a stack":
            assert np.all(updates["stack"]["kernel"][1] == 0)
            np.testing.assert_array_equal(
                updates["stack"]["kernel"][0], clean["stack"]["kernel"][0]
            )
            for before, now, good in fields:
                if before.shape[:1] == (2,) and before.ndim > 2:
                    np.testing.assert_array_equal(now[1], before[1])
                    np.testing.assert_array_equal(now[0], good[0])
        else:
            name = "bias" if case == "a NaN in a bias" else "kernel"
            assert np.all(updates["one"][name] == 0)
            updates["one"][name] = clean["one"][name]
            assert_equal(updates, clean)
        later, _ = update(like(PARAMS, step + 1), after)
        assert all_finite(later) and np.abs(later["one"]["kernel"]).max() > 0


@every_optimizer
@pytest.mark.parametrize("bad_step", [0, 10])
def test_one_bad_step_costs_next_to_nothing(make, bad_step):
    """The loss after it is within 1 % of the clean run's."""
    target = jnp.asarray(rng.normal(size=(12, 3)) @ rng.normal(size=(3, 6)), jnp.float32)
    loss = lambda p: 1 + jnp.mean((p["kernel"] - target) ** 2)
    tx = make(learning_rate=optax.cosine_decay_schedule(0.3, 150))

    @jax.jit
    def final(bad_step):
        def body(carry, t):
            params, state = carry
            grads = jax.grad(loss)(params)
            grads = jax.tree.map(lambda g: jnp.where(t == bad_step, jnp.nan, g), grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": jnp.zeros((12, 6))}
        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(150))
        return loss(params)

    clean = final(-1)
    assert clean < 0.7 * loss({"kernel": jnp.zeros((12, 6))})
    assert abs(final(bad_step) - clean) < 0.01 * clean


@every_optimizer
def test_float16_with_a_loss_scale(make):
    """The scale overflows at first; whoever halves it at every skipped step gets on."""
    target = jnp.asarray(rng.normal(size=(12, 3)) @ rng.normal(size=(3, 6)), jnp.float16)
    loss = lambda p: jnp.mean((p["kernel"] - target).astype(jnp.float32) ** 2)
    tx = make(learning_rate=optax.cosine_decay_schedule(0.3, 150))
    params = {"kernel": jnp.zeros((12, 6), jnp.float16)}

    @jax.jit
    def step(params, state, scale):
        grads = jax.grad(lambda p: scale * loss(p))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, scale, skipped = tx.init(params), jnp.float32(2**24), 0
    first = loss(params)
    for _ in range(150):
        params, state = step(params, state, scale)
        now = int(state[0].skipped)
        skipped, scale = now, scale / 2 if now > skipped else scale
    assert 0 < skipped < 20 and params["kernel"].dtype == jnp.float16
    assert loss(params) < 0.7 * first


@every_transformation
def test_without_the_guard_a_nan_stays(make):
    tx = make(skip_nonfinite=False)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    _, state = update(like(PARAMS, 0), state)  # a basis that a NaN then meets
    for grads in (jax.tree.map(lambda x: x * jnp.nan, PARAMS), like(PARAMS, 1)):
        updates, state = update(grads, state)
        assert np.isnan(updates["one"]["kernel"]).any() and state.skipped == 0


numbers = strategies.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@every_transformation
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_finite_gradients_give_finite_updates_and_states(make, data):
    """Rows of a few numbers each, repeated: what breaks a factorisation is dependence."""
    tx, params = make(), {"kernel": jnp.zeros((6, 4))}
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        few = data.draw(strategies.lists(numbers, min_size=1, max_size=4))
        pick = data.draw(strategies.lists(strategies.integers(0, 3), min_size=24, max_size=24))
        G = np.array([few[i % len(few)] for i in pick], np.float32).reshape(6, 4)
        updates, state = update({"kernel": jnp.asarray(G)}, state)
        assert all_finite(updates) and all_finite(state)


def test_skipped_updates_are_counted_in_the_aliases_state():
    tx = sumo_optax.sumo(1e-2, 3)
    params = {"kernel": jnp.ones(SHAPE)}
    _, state = tx.update({"kernel": jnp.full(SHAPE, jnp.inf)}, tx.init(params), params)
    assert state[0].skipped == 1
