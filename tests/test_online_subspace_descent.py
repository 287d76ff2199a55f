"""Online Subspace Descent and the wrapper against formulas in float64 and optax's GaLore."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_sumo import gradients, relative, run

import sumo_optax
from sumo_optax import _subspace
from sumo_optax._gradient import WholeGradients

RANK = 6
SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (24, 24)}
# float32 rounding (1e-7), times 1 / sqrt(eps) of Adam where a second moment is small, 30 steps.
TRAJECTORY = 1e-4

INNER = {
    "adam": (optax.scale_by_adam(), oracles.Adam),
    "lion": (optax.scale_by_lion(), oracles.Lion),
}
PROJECTORS = {
    "sgd": (optax.identity(), oracles.Sgd),
    "adam": (optax.scale_by_adam(), oracles.Adam),
}


def short_side_first(G):
    """A square matrix as it is: its rows are the side that is projected."""
    return G.T if G.shape[0] > G.shape[1] else G


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("inner", INNER)
def test_trajectories_agree_with_the_formulas(inner, projector, rho):
    transformation, Inner = INNER[inner]
    projection, Projector = PROJECTORS[projector]
    tx = sumo_optax.scale_by_online_subspace_descent(
        RANK,
        inner=transformation,
        basis_optimizer=projection,
        basis_learning_rate=0.01,
        orthogonality_penalty=rho,
        scale=0.5,
    )
    sequences = {name: gradients(shape, 30) for name, shape in SHAPES.items()}
    updates, states = run(tx, sequences, 30)
    for name, sequence in sequences.items():
        P = np.asarray(states[1].basis[name]["kernel"], np.float64)
        G = short_side_first(np.float64(sequence[0]))
        top = oracles.top_left_subspace(G, RANK)
        assert relative(P @ P.T, top @ top.T) < 0.05, "the start is the top subspace, randomised"
        inner_oracle, projector_oracle = Inner(), Projector()
        for t, G in enumerate(map(np.float64, sequence)):
            D, P = oracles.online_subspace_descent_step(
                short_side_first(G),
                P,
                inner_oracle,
                projector_oracle,
                first=t == 0,
                basis_learning_rate=0.01,
                rho=rho,
                scale=0.5,
            )
            upright = G.shape[0] <= G.shape[1]
            assert relative(updates[t][name], D if upright else D.T) < TRAJECTORY, (name, t)
            assert relative(np.asarray(states[t + 1].basis[name]["kernel"]), P) < TRAJECTORY


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_closed_form_gradient_is_that_of_the_loss(shape, rho):
    rng = np.random.default_rng(1)
    G, P = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (shape[0], RANK)))
    P = P / 4

    def loss(P):
        g = G / jnp.linalg.norm(G)
        gram = P.T @ P - jnp.eye(RANK)
        return jnp.sum((P @ P.T @ g - g) ** 2) + rho * jnp.sum(gram**2)

    whole = WholeGradients([(1,)], [False], G.dtype, None, [G[None]])
    closed, norm = _subspace.online_pca_gradient(whole, P[None], (P.T @ G)[None], rho)
    np.testing.assert_allclose(norm.item(), np.linalg.norm(G), rtol=1e-6)
    assert relative(closed[0], jax.grad(loss)(P)) < 1e-5  # float32


def test_svd_basis_and_adam_are_optax_galore():
    """30 steps through two refreshes after the first.

    The signs of singular vectors are LAPACK's whim, and Adam's first moment remembers them. So
    optax is given the wide matrix as we see it, transposed.
    """
    sequences = {name: gradients(shape, 30) for name, shape in SHAPES.items()}
    rule = dict(basis="svd", refresh_every=10, scale=0.5)
    ours, _ = run(sumo_optax.scale_in_subspace(optax.scale_by_adam(), RANK, **rule), sequences, 30)
    galore = optax.contrib.scale_by_galore(rank=RANK, update_proj_gap=10, scale=0.5)
    sequences["wide"] = [G.T for G in sequences["wide"]]
    theirs, _ = run(galore, sequences, 30)
    for mine, reference in zip(ours, theirs, strict=True):
        for name in sequences:
            D = mine[name].T if name == "wide" else mine[name]
            assert relative(D, reference[name]) < 1e-5


@pytest.mark.parametrize("basis", ["svd", "randomized_svd", "random", "online_pca"])
@pytest.mark.parametrize("side", ["long", "short"])
def test_bases_and_sides(basis, side):
    sequences = {name: gradients(shape, 8) for name, shape in SHAPES.items()}
    refresh_every = None if basis == "online_pca" else 4
    tx = sumo_optax.scale_in_subspace(
        optax.scale_by_adam(), RANK, basis=basis, side=side, refresh_every=refresh_every
    )
    updates, states = run(tx, sequences, 8)
    for name, shape in SHAPES.items():
        P = np.asarray(states[8].basis[name]["kernel"], np.float64)
        assert P.shape == ((max if side == "long" else min)(shape), RANK)
        G, D = (np.float64(x) for x in (sequences[name][7], updates[7][name]))
        if P.shape[0] != shape[0]:
            G, D = G.T, D.T
        before = np.asarray(states[7].basis[name]["kernel"], np.float64)
        assert relative(before @ (np.linalg.pinv(before) @ D), D) < 1e-5, "D is in the subspace"
        best = oracles.captured_energy(oracles.top_left_subspace(G, RANK), G)
        energy = oracles.captured_energy(np.linalg.qr(P)[0], G)
        assert energy < 0.7 * best if basis == "random" else energy > 0.9 * best


def test_transport_carries_both_moments():
    sequence = gradients((40, 16), 5)
    tx = sumo_optax.scale_in_subspace(
        optax.scale_by_adam(0.9, 0.99), RANK, basis="svd", refresh_every=4, transport=True
    )
    _, states = run(tx, {"w": sequence}, 5)
    leaf = lambda field: np.asarray(field["w"]["kernel"], np.float64)
    P0, mu0, nu0 = leaf(states[4].basis), leaf(states[4].inner.mu), leaf(states[4].inner.nu)
    P1, mu1, nu1 = leaf(states[5].basis), leaf(states[5].inner.mu), leaf(states[5].inner.nu)
    T, G_hat = P1.T @ P0, P1.T @ np.float64(sequence[4])
    np.testing.assert_allclose(mu1, 0.9 * T @ mu0 + 0.1 * G_hat, atol=1e-6)
    np.testing.assert_allclose(nu1, 0.99 * T**2 @ nu0 + 0.01 * G_hat**2, atol=1e-6)
    assert relative(mu1, 0.9 * mu0 + 0.1 * G_hat) > 0.1


def numbers(state):
    return sum(x.size for x in jax.tree.leaves(state[1:4]))


def test_state_size():
    params = {"kernel": jnp.zeros((40, 16))}
    counters = 1  # of an Adam
    adams = sumo_optax.scale_by_online_subspace_descent(RANK).init(params)
    assert numbers(adams) == 3 * 16 * RANK + 2 * 40 * RANK + 2 * counters
    sgd = sumo_optax.scale_by_online_subspace_descent(RANK, basis_optimizer=optax.identity())
    assert numbers(sgd.init(params)) == 16 * RANK + 2 * 40 * RANK + counters
    galore = sumo_optax.scale_in_subspace(optax.scale_by_adam(), RANK)
    assert numbers(galore.init(params)) == 40 * RANK + 2 * 16 * RANK + counters


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_adam(),
        optax.scale_by_lion(),
        optax.scale_by_factored_rms(min_dim_size_to_factor=4),
        optax.trace(0.9),
    ],
    ids=["adam", "lion", "adafactor", "momentum"],
)
def test_inner_optimizers_train(inner):
    """Least squares on a matrix of rank below r: all of the loss is in reach."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(24, 3)) @ rng.normal(size=(3, 12)), jnp.float32)
    tx = optax.chain(
        sumo_optax.scale_by_online_subspace_descent(RANK, inner=inner),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, 300)),
    )
    loss = lambda params: jnp.sum((params["kernel"] - target) ** 2)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((24, 12))}
    trained, _ = jax.jit(lambda c: jax.lax.scan(body, c, length=300)[0])((params, tx.init(params)))
    assert loss(trained) < 0.1 * loss(params)


def test_zero_gradient_moves_neither_basis_nor_weights():
    sequence = gradients((40, 16), 4)
    sequence[0] = sequence[2] = np.zeros_like(sequence[0])
    updates, states = run(sumo_optax.scale_by_online_subspace_descent(RANK), {"w": sequence}, 4)
    for t in (0, 2):
        assert np.all(updates[t]["w"] == 0)
        jax.tree.map(np.testing.assert_array_equal, states[t][1:4], states[t + 1][1:4])
    assert np.any(updates[3]["w"])


def test_projector_rate_has_the_shape_of_the_main_schedule():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.03, 3, 8, 0.0)
    sequence = gradients((40, 16), 9)
    plain = sumo_optax.scale_by_online_subspace_descent(
        RANK, basis_learning_rate=lambda t: 0.2 * schedule(t) / 0.03
    )
    whole = sumo_optax.online_subspace_descent(schedule, RANK, basis_learning_rate=0.2)
    _, expected = run(plain, {"w": sequence}, 9)
    _, states = run(whole, {"w": sequence}, 9)
    for state, other in zip(states, expected, strict=True):
        # The peak lasts a step; between the steps looked at the schedule may be 1 % higher.
        np.testing.assert_allclose(
            state[0].basis["w"]["kernel"], other.basis["w"]["kernel"], atol=1e-5
        )
    still = states[-1][0].basis["w"]["kernel"] - states[-2][0].basis["w"]["kernel"]
    assert np.abs(still).max() == 0, "the rate ends at 0"


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: sumo_optax.scale_in_subspace(optax.scale_by_adam(), 0), "rank must be .* got 0"),
        (
            lambda: sumo_optax.scale_in_subspace(optax.scale_by_adam(), basis="tracking"),
            "basis must be one of .*'online_pca'.* got 'tracking'",
        ),
        (
            lambda: sumo_optax.scale_in_subspace(optax.scale_by_adam(), refresh_every=0),
            "refresh_every must be an integer of at least 1, got 0",
        ),
        (
            lambda: sumo_optax.scale_in_subspace(optax.scale_by_adam(), side="left"),
            "side must be one of .*'long'.* got 'left'",
        ),
        (
            lambda: sumo_optax.scale_in_subspace(optax.scale_by_adam(), scale=0),
            "scale must be a number > 0, got 0",
        ),
        (
            lambda: sumo_optax.scale_in_subspace(
                optax.scale_by_adam(), basis="online_pca", transport=True
            ),
            "basis='online_pca' moves at every step and takes no transport, got True",
        ),
        (
            lambda: sumo_optax.scale_in_subspace(
                optax.scale_by_adam(), basis="online_pca", refresh_every=50
            ),
            "basis='online_pca' moves at every step and takes no refresh_every, got 50",
        ),
        (
            lambda: sumo_optax.online_subspace_descent(1e-3, orthogonality_penalty=-1),
            "orthogonality_penalty must be a number >= 0, got -1",
        ),
        (
            lambda: sumo_optax.online_subspace_descent(1e-3, basis_learning_rate=-1),
            "basis_learning_rate must be a number >= 0, got -1",
        ),
    ],
)
def test_wrong_arguments(make, error):
    with pytest.raises(ValueError, match=error):
        make()
