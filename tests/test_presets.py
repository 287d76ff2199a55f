"""Each preset is the algorithm of its paper, whose numbers are written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_sumo import RANK, TRAJECTORY, gradients, relative, run, starting_state

import sumo_optax
from sumo_optax import presets

SHAPES = {"tall": (40, 16), "wide": (16, 40)}


def sequences(steps, low_rank_at=()):
    """Where the rank is r, a randomised SVD is an exact one."""
    found = {name: gradients(shape, steps) for name, shape in SHAPES.items()}
    for sequence in found.values():
        for t in low_rank_at:
            U, s, Vt = np.linalg.svd(np.float64(sequence[t]), full_matrices=False)
            sequence[t] = np.float32((U[:, :RANK] * s[:RANK]) @ Vt[:RANK])
    return found


@pytest.mark.parametrize(
    "settings, low_rank_at",
    [
        (presets.SUMO, (0, 200)),
        pytest.param({**presets.SUMO, "basis": "svd"}, (), marks=pytest.mark.slow),
    ],
    ids=["randomized", "svd"],
)
def test_sumo(settings, low_rank_at):
    """Through a refresh, at step 200, into which the moment is carried."""
    given = sequences(206, low_rank_at)
    updates, states = run(sumo_optax.scale_by_sumo(RANK, **settings), given, 206)
    for name, sequence in given.items():
        state = starting_state(states, name)
        for t, G in enumerate(map(np.float64, sequence)):
            step = lambda G, state, t=t: oracles.sumo_step(
                G,
                state,
                t,
                rank=RANK,
                refresh_every=200,
                momentum=0.95,
                nesterov=False,
                residual="gradient",
                norm_growth_limit=1.1,
                consistent_rms=None,
            )
            D, state = oracles.oriented(step)(G, state)
            assert relative(updates[t][name], D) < TRAJECTORY, (name, t)


def test_mofasgd():
    given = sequences(25, low_rank_at=[0])
    updates, _ = run(sumo_optax.scale_by_mofasgd(RANK, **presets.MOFASGD), given, 25)
    rule = dict(momentum=0.95, inverse_limit=None, complement=0.0, consistent_rms=None)
    for name, sequence in given.items():
        m, n = max(SHAPES[name]), min(SHAPES[name])
        state = np.zeros((m, RANK)), np.zeros(RANK), np.zeros((n, RANK))
        for t, G in enumerate(map(np.float64, sequence)):
            step = oracles.oriented(lambda G, state: oracles.mofasgd_step(G, state, **rule))
            D, state = step(G, state)
            assert relative(updates[t][name], D) < TRAJECTORY, (name, t)


SCHEDULE = optax.linear_schedule(0.01, 0.002, 20)


@pytest.mark.parametrize(
    "rate, decay",
    [(0.01, 0.0), pytest.param(SCHEDULE, 0.1, marks=pytest.mark.slow)],
    ids=["number", "schedule"],
)
def test_online_subspace_descent(rate, decay):
    """Of weights, since both decays are of what has its learning rate."""
    settings = dict(presets.ONLINE_SUBSPACE_DESCENT)
    if decay:
        decayed = optax.add_decayed_weights(decay)
        settings["basis_optimizer"] = optax.chain(optax.scale_by_adam(), decayed)
    tx = sumo_optax.online_subspace_descent(rate, RANK, weight_decay=decay, **settings)
    given = sequences(20, low_rank_at=[0])
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in SHAPES.items()}
    state, update, trajectory = tx.init(params), jax.jit(tx.update), []
    for t in range(20):
        grads = {name: {"kernel": jnp.asarray(given[name][t])} for name in SHAPES}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append((params, state[0].basis))

    for name, sequence in given.items():
        turned = lambda x, name=name: x.T if name == "tall" else x  # the short side first
        P = np.float64(trajectory[0][1][name]["kernel"])
        top = oracles.top_left_subspace(turned(np.float64(sequence[0])), RANK)
        assert relative(P @ P.T, top @ top.T) < TRAJECTORY
        W, inner, projector = np.ones((16, 40)), oracles.Adam(), oracles.Adam()
        for t, G in enumerate(map(np.float64, sequence)):
            eta = float(rate(t)) if callable(rate) else rate
            D, P = oracles.online_subspace_descent_step(
                turned(G),
                P,
                inner,
                projector,
                first=t == 0,
                basis_learning_rate=5 * eta,
                rho=0.1,
                scale=1.0,
                decay=decay,
            )
            W = W - eta * (D + decay * W)
            params, basis = trajectory[t]
            assert relative(turned(np.asarray(params[name]["kernel"])), W) < TRAJECTORY, (name, t)
            assert relative(np.asarray(basis[name]["kernel"]), P) < TRAJECTORY, (name, t)


def test_the_projector_alone_needs_a_rate_of_its_own():
    with pytest.raises(TypeError, match="basis_learning_rate must be a number >= 0, got None"):
        sumo_optax.scale_by_online_subspace_descent(**presets.ONLINE_SUBSPACE_DESCENT)


def test_presets_do_not_change():
    with pytest.raises(TypeError):
        presets.SUMO["momentum"] = 0.5
