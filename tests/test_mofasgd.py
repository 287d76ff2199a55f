"""MoFaSGD against its formulas in float64, and what its factors promise."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_sumo import gradients, relative, run

import sumo_optax

RANK = 6
# Where 2r exceeds the short side, what lies beyond the factors has fewer than r directions.
SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (24, 24), "2r > n": (30, 8)}
# float32 rounding (1e-7) through 30 steps whose gap after singular value r is above 1e-2.
TRAJECTORY = 1e-4


def factors(state, name):
    leaf = lambda field: np.asarray(field[name]["kernel"], np.float64)
    return leaf(state.basis), leaf(state.singular_values), leaf(state.row_basis)


SIMPLER = [(None, 0.0, 0.2), (None, 1.0, None), (0.7, 0.0, None)]
FORMS = [*(pytest.param(*x, marks=pytest.mark.slow) for x in SIMPLER), (0.7, 1.0, 0.2)]


@pytest.mark.parametrize("inverse_limit, complement, consistent_rms", FORMS)
def test_trajectories_agree_with_the_whole_target(inverse_limit, complement, consistent_rms):
    rule = dict(
        momentum=0.9,
        inverse_limit=inverse_limit,
        complement=complement,
        consistent_rms=consistent_rms,
    )
    sequences = {name: gradients(shape, 30) for name, shape in SHAPES.items()}
    updates, states = run(sumo_optax.scale_by_mofasgd(RANK, **rule), sequences, 30)
    for name, sequence in sequences.items():
        # The randomised SVD of the first gradient has its own test; here both start from it.
        U, s, V = state = factors(states[1], name)
        G = sequence[0] if SHAPES[name][0] >= SHAPES[name][1] else sequence[0].T
        scale = 1.0 if consistent_rms is None else consistent_rms * np.sqrt(max(G.shape))
        d = np.ones(len(s)) if inverse_limit is None else np.minimum(1 / s, inverse_limit)
        D = scale * (U * d) @ V.T + complement * (np.float64(G) - (U * s) @ V.T)
        assert relative(updates[0][name], D if G is sequence[0] else D.T) < TRAJECTORY
        for t, G in enumerate(map(np.float64, sequence[1:]), start=1):
            wide = G.shape[0] < G.shape[1]
            D, state = oracles.mofasgd_step(G.T if wide else G, state, **rule)
            assert relative(updates[t][name], D.T if wide else D) < TRAJECTORY, (name, t)
            M = (state[0] * state[1]) @ state[2].T
            U, s, V = factors(states[t + 1], name)
            assert relative((U * s) @ V.T, M) < TRAJECTORY


def test_first_step_is_the_svd_of_the_first_gradient():
    """Not the gradient's twice, and not random: the same as the formulas from no momentum."""
    rng = np.random.default_rng(0)
    low = {k: rng.normal(size=(s[0], 5)) @ rng.normal(size=(5, s[1])) for k, s in SHAPES.items()}
    sequences = {name: [G.astype(np.float32)] for name, G in low.items()}
    updates, states = run(sumo_optax.scale_by_mofasgd(RANK), sequences, 1)
    for name, (G,) in sequences.items():
        U, s, V = factors(states[1], name)
        whole = np.linalg.svd(np.float64(G))[1]
        np.testing.assert_allclose(s, whole[:RANK], atol=1e-5 * whole[0])  # float32
        G = G if G.shape[0] >= G.shape[1] else G.T
        assert relative((U * s) @ V.T, G) < 1e-5  # float32, and G has rank below r
        D = 0.5 * np.sqrt(U.shape[0]) * U[:, :5] @ V[:, :5].T
        wide = SHAPES[name][0] < SHAPES[name][1]
        assert relative(updates[0][name], D.T if wide else D) < 1e-4


def test_state_is_m_plus_n_plus_1_times_r_numbers():
    state = sumo_optax.scale_by_mofasgd(RANK).init({"kernel": jnp.zeros((40, 16))})
    assert sum(x.size for x in jax.tree.leaves(state[1:4])) == (40 + 16 + 1) * RANK
    assert sum(x.size for x in jax.tree.leaves(state)) == (40 + 16 + 1) * RANK + 3  # counters


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_spectral_update_has_equal_singular_values(shape):
    tx = sumo_optax.scale_by_mofasgd(RANK, consistent_rms=None)
    updates, _ = run(tx, {"w": gradients(shape, 20)}, 20)
    for update in updates:
        spectrum = np.linalg.svd(update["w"])[1]
        np.testing.assert_allclose(spectrum[:RANK], 1, atol=1e-4)
        np.testing.assert_allclose(spectrum[RANK:], 0, atol=1e-5)


def orthonormality(state, name="w"):
    U, _, V = factors(state, name)
    return max(np.abs(Q.T @ Q - np.eye(Q.shape[1])).max() for Q in (U, V))


def vanishing(t, G):
    return jnp.where((t % 400 < 200) | (t < 5), G, 0)


def low_rank(t, G):
    return G.at[:, 2:].set(0)


STREAMS = {"any": lambda t, G: G, "vanishing for a while": vanishing, "rank 2": low_rank}


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("shape", [(40, 16), (30, 8)], ids=str)
def test_factors_stay_orthonormal_over_10_000_steps(shape, stream):
    orthonormal_after(stream, shape, 10_000)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("shape", [(40, 16), (30, 8)], ids=str)
def test_factors_stay_orthonormal(shape, stream):
    orthonormal_after(stream, shape, 600)


def orthonormal_after(stream, shape, steps):
    """The largest error over all steps; float32 rounding of m products is about 1e-6."""
    tx = sumo_optax.scale_by_mofasgd(RANK)
    drift = jax.random.normal(jax.random.key(0), shape)

    def body(state, t):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), shape)
        G = stream(t, jnp.roll(drift, t // 100, axis=0) + 0.3 * noise)
        _, state = tx.update({"kernel": G}, state)
        Q = [state.basis["kernel"], state.row_basis["kernel"]]
        errors = [jnp.abs(q.T @ q - jnp.eye(RANK)).max() for q in Q]
        return state, jnp.stack(errors).max()

    run = jax.jit(lambda state: jax.lax.scan(body, state, jnp.arange(steps)))
    _, errors = run(tx.init({"kernel": jnp.zeros(shape)}))
    assert errors.max() < 1e-4


@pytest.mark.slow
def test_the_start_after_a_zero_gradient_is_from_the_gradient_alone():
    """The momentum is then U Uᵀ G: the columns that V was completed with have no part in it."""
    G = jax.random.normal(jax.random.key(0), (40, 16))
    tx = sumo_optax.scale_by_mofasgd(RANK)
    _, state = tx.update({"kernel": 0 * G}, tx.init({"kernel": G}))
    _, state = tx.update({"kernel": G}, state)
    U, s, V = (np.float64(x["kernel"]) for x in state[1:4])
    assert relative(U * s @ V.T, U @ (U.T @ np.float64(G))) < 1e-5, "rounding of float32"


def test_momentum_may_be_a_schedule():
    sequences = {"w": gradients((40, 16), 6)}
    warm = sumo_optax.scale_by_mofasgd(RANK, momentum=lambda t: jnp.where(t < 3, 0.5, 0.9))
    _, states = run(warm, sequences, 6)
    state = factors(states[1], "w")
    rule = dict(inverse_limit=None, complement=0.0, consistent_rms=0.2)
    for t, G in enumerate(map(np.float64, sequences["w"][1:]), start=1):
        _, state = oracles.mofasgd_step(G, state, momentum=0.5 if t < 3 else 0.9, **rule)
        np.testing.assert_allclose(factors(states[t + 1], "w")[1], state[1], rtol=1e-4)


@pytest.mark.parametrize(
    "argument, error",
    [
        ({"rank": 0}, "rank must be an integer of at least 1 .* got 0"),
        ({"momentum": 1.0}, "momentum must be a number >= 0 and < 1, got 1.0"),
        ({"inverse_limit": 0}, "inverse_limit must be a number > 0, or None, got 0"),
        ({"complement": -1}, "complement must be a number >= 0, got -1"),
        ({"consistent_rms": 0}, "consistent_rms must be a number > 0, or None, got 0"),
    ],
)
def test_wrong_arguments(argument, error):
    with pytest.raises(ValueError, match=error):
        sumo_optax.mofasgd(1e-3, **argument)
