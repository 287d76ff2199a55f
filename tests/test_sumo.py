"""SUMO against Algorithm 1 in float64, whole and block by block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sumo_optax

SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (24, 24)}
RANK = 6
# float32 rounding (1e-7) through a polar factor of condition number below 100, over 50 steps.
TRAJECTORY = 1e-4


def gradients(shape, steps, seed=0, rank=RANK):
    """Slowly moving gradients with a gap after the singular value `rank`, as float32 numbers."""
    rng = np.random.default_rng(seed)
    m, n = shape
    r = min(rank, m, n)
    spectrum = np.r_[np.linspace(1.0, 0.5, r), np.full(min(m, n) - r, 0.1)]
    out = []
    for t in range(steps):
        if t % 9 == 0:
            U, V = (np.linalg.qr(rng.normal(size=(k, min(m, n))))[0] for k in (m, n))
        noise = 0.05 * rng.normal(size=shape) / np.sqrt(max(m, n))
        out.append(((U * spectrum) @ V.T + noise).astype(np.float32))
    return out


def kernels(arrays):
    return {name: {"kernel": jnp.asarray(x)} for name, x in arrays.items()}


def run(tx, sequences, steps):
    """The updates of every step, and the states before and after them."""
    params = kernels({name: np.zeros(s[0].shape, np.float32) for name, s in sequences.items()})
    state = tx.init(params)
    update = jax.jit(lambda *args: tx.update(*args))  # whose compilations are its own
    updates, states = [], [state]
    for t in range(steps):
        grads = kernels({name: s[t] for name, s in sequences.items()})
        D, state = update(grads, state, params)
        updates.append({name: np.asarray(D[name]["kernel"], np.float64) for name in sequences})
        states.append(state)
    assert update._cache_size() == 1
    return updates, states


def relative(x, reference):
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


def starting_state(states, name):
    """The optimizer's own start, as the oracle's: tracking begins from a random subspace."""
    leaf = lambda field: np.asarray(field[name]["kernel"], np.float64)
    return leaf(states[0].basis), leaf(states[0].moment), leaf(states[0].update_norm)


CASES = list(itertools.product([None, "gradient", "scaled"], [None, 0.97, 1.1], [False, True]))


@pytest.mark.parametrize("side", ["long", "short"])
@pytest.mark.parametrize("residual, limit, nesterov", CASES)
def test_trajectories_agree_with_algorithm_1(residual, limit, nesterov, side):
    """50 steps through three refreshes. The limit 0.97 acts at every step, 1.1 at some or none."""
    rule = dict(
        refresh_every=15,
        momentum=0.9,
        nesterov=nesterov,
        residual=residual,
        norm_growth_limit=limit,
        consistent_rms=0.2,
    )
    sequences = {name: gradients(shape, 50) for name, shape in SHAPES.items()}
    tx = sumo_optax.scale_by_sumo(RANK, basis="svd", polar="svd", side=side, **rule)
    updates, states = run(tx, sequences, 50)
    for name, sequence in sequences.items():
        state = starting_state(states, name)
        for t, G in enumerate(sequence):
            D, state = oracles.oriented(
                lambda G, s, t=t: oracles.sumo_step(G, s, t, rank=RANK, **rule), side
            )(np.float64(G), state)
            assert relative(updates[t][name], D) < TRAJECTORY, (name, t)


@pytest.mark.parametrize("side", ["long", "short"])
@pytest.mark.parametrize("refresh_every", [1, 10])
def test_tracking_agrees_with_float64(refresh_every, side):
    follow_tracking("scaled", side, refresh_every, nesterov=True)


@pytest.mark.parametrize("nesterov", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", [pytest.param("long", marks=pytest.mark.slow), "short"])
def test_the_whole_polar_step_agrees_with_float64(side, nesterov):
    follow_tracking("orthogonal", side, 3, nesterov=nesterov, norm_growth_limit=0.5)


def follow_tracking(residual, side, refresh_every, **rule):
    rule = (
        dict(
            refresh_every=refresh_every,
            momentum=0.9,
            residual=residual,
            norm_growth_limit=None,
            consistent_rms=None,
        )
        | rule
    )
    sequences = {name: gradients(shape, 30) for name, shape in SHAPES.items()}
    tx = sumo_optax.scale_by_sumo(RANK, basis="tracking", side=side, **rule)
    updates, states = run(tx, sequences, 30)
    for name, sequence in sequences.items():
        state = starting_state(states, name)
        for t, G in enumerate(sequence):
            D, state = oracles.oriented(
                lambda G, s, t=t: oracles.sumo_step(G, s, t, rank=RANK, tracking=True, **rule), side
            )(np.float64(G), state)
            assert relative(updates[t][name], D) < TRAJECTORY, (name, t)


def test_moment_is_carried_into_the_new_basis():
    sequence = gradients((40, 16), 2)
    tx = sumo_optax.scale_by_sumo(RANK, refresh_every=1, basis="svd", side="long", momentum=0.9)
    _, states = run(tx, {"w": sequence}, 2)
    Q0, M0, _ = starting_state(states[1:], "w")
    Q1, M1, _ = starting_state(states[2:], "w")
    G1 = np.float64(sequence[1])
    np.testing.assert_allclose(M1, 0.9 * Q1.T @ Q0 @ M0 + Q1.T @ G1, atol=1e-5)
    assert relative(M1, 0.9 * M0 + Q1.T @ G1) > 0.1, "without transport it would be another moment"


@pytest.mark.parametrize("basis", ["svd", "randomized_svd", "random"])
def test_basis_changes_at_refreshes_only(basis):
    tx = sumo_optax.scale_by_sumo(RANK, refresh_every=4, basis=basis)
    _, states = run(tx, {"w": gradients((40, 16), 10)}, 10)
    bases = [starting_state(states[i:], "w")[0] for i in range(11)]
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [t % 4 == 0 for t in range(10)]
    for Q in bases[1:]:
        np.testing.assert_allclose(Q.T @ Q, np.eye(RANK), atol=1e-5)  # float32, m products


def moved_at(tx, sequences, steps):
    """For each matrix the steps at which its basis changed."""
    _, states = run(tx, sequences, steps)
    bases = {name: [np.asarray(s.basis[name]["kernel"]) for s in states] for name in sequences}
    return {
        name: [t for t in range(steps) if not np.array_equal(qs[t], qs[t + 1])]
        for name, qs in bases.items()
    }


@pytest.mark.slow
def test_stagger_gives_each_leaf_a_step_of_its_own():
    sequences = {f"w{i}": gradients((20, 12), 18, seed=i) for i in range(4)}
    rule = dict(basis="randomized_svd", refresh_every=8)
    tx = sumo_optax.scale_by_sumo(RANK, stagger=True, **rule)
    moved = moved_at(tx, sequences, 18)
    assert moved == {"w0": [0, 8, 16], "w1": [0, 2, 10], "w2": [0, 4, 12], "w3": [0, 6, 14]}
    inner = optax.scale_by_adam()
    tx = sumo_optax.scale_in_subspace(inner, RANK, stagger=True, **rule)
    assert moved_at(tx, sequences, 18) == moved
    tx = sumo_optax.scale_by_sumo(RANK, **rule)
    assert moved_at(tx, sequences, 18) == dict.fromkeys(sequences, [0, 8, 16])


def test_a_stale_subspace_is_left_at_the_next_step():
    """Two of three sequences turn to other directions at step 5: they alone move, once, at 6."""
    turn = gradients((16, 40), 5, seed=1), gradients((16, 40), 5, seed=2)
    sequences = {"turns": turn[0] + turn[1], "stays": turn[0] + turn[0]}
    tx = sumo_optax.scale_by_sumo(RANK, basis="svd", refresh_every=100, refresh_below=0.7)
    assert moved_at(tx, sequences, 10) == {"turns": [0, 6], "stays": [0]}
    _, states = run(tx, sequences, 10)
    Q, G = starting_state(states[10:], "stays")[0], np.float64(sequences["stays"][9])
    captured = states[10].captured["stays"]["kernel"]
    np.testing.assert_allclose(captured, oracles.captured_energy(Q, G), rtol=1e-5)


def test_a_stale_matrix_of_a_stack_moves_alone():
    turn = gradients((40, 16), 5, seed=1), gradients((40, 16), 5, seed=2)
    stack = [np.stack(pair) for pair in zip(turn[0] + turn[1], turn[0] + turn[0], strict=True)]
    tx = sumo_optax.scale_by_sumo(
        RANK,
        basis="svd",
        refresh_every=100,
        refresh_below=0.7,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
    )
    _, states = run(tx, {"w": stack}, 10)
    bases = [np.asarray(state.basis["w"]["kernel"]) for state in states]
    moved = [[t for t in range(10) if np.any(bases[t][i] != bases[t + 1][i])] for i in range(2)]
    assert moved == [[0, 6], [0]]


@pytest.mark.parametrize("basis, least", [("randomized_svd", 0.99), ("tracking", 0.98)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bases_capture_the_gradient(basis, least, shape):
    """The energy captured, over that of the best basis, on the last of eight like gradients."""
    sequence = gradients(shape, 8)
    tx = sumo_optax.scale_by_sumo(RANK, basis=basis, refresh_every=1)
    _, states = run(tx, {"w": sequence}, 8)
    Q, _, _ = starting_state(states[8:], "w")
    G = np.float64(sequence[-1])
    G = G if G.shape[0] <= G.shape[1] else G.T
    best = oracles.captured_energy(oracles.top_left_subspace(G, RANK), G)
    assert least * best < oracles.captured_energy(Q, G) <= best + 1e-6


def test_a_leaf_without_a_basis_takes_the_next_good_gradient():
    sequence = gradients((16, 40), 4)
    sequence[0] = np.zeros_like(sequence[0])
    tx = sumo_optax.scale_by_sumo(RANK, refresh_every=100, basis="svd")
    updates, states = run(tx, {"w": sequence}, 4)
    assert np.linalg.norm(updates[0]["w"]) == 0
    Q, _, _ = starting_state(states[4:], "w")
    np.testing.assert_allclose(
        Q @ Q.T,
        (lambda U: U @ U.T)(oracles.top_left_subspace(np.float64(sequence[1]), RANK)),
        atol=1e-5,
    )


def test_scale_follows_the_longer_side():
    sequence = gradients((40, 16), 1)
    plain = sumo_optax.scale_by_sumo(RANK, residual=None, basis="svd", consistent_rms=None)
    rms = 2 / np.sqrt(40)  # twice the update: doubling is exact, wherever it is done
    scaled = sumo_optax.scale_by_sumo(RANK, residual=None, basis="svd", consistent_rms=rms)
    a, b = (run(tx, {"w": sequence}, 1)[0][0]["w"] for tx in (plain, scaled))
    np.testing.assert_allclose(np.linalg.svd(a)[1][:RANK], 1, atol=1e-5)
    np.testing.assert_allclose(b, rms * np.sqrt(40) * a, rtol=1e-5)


def test_the_whole_polar_step_has_all_singular_values_alike():
    """Of a batch of layers, one of which has no gradient, and of float16."""
    G = np.stack([*gradients((40, 16), 2), np.zeros((40, 16))]).astype(np.float16)
    tx = sumo_optax.scale_by_sumo(
        2,
        residual="orthogonal",
        consistent_rms=None,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
    )
    params = {"w": jnp.zeros(G.shape)}
    updates, state = jax.jit(tx.update)({"w": jnp.asarray(G)}, tx.init(params))
    assert state.moment["w"].shape == (3, 2, 40)
    s = np.linalg.svd(np.asarray(updates["w"], np.float64))[1]
    np.testing.assert_allclose(s[:2], 1, atol=2e-3)
    assert not np.any(s[2])


def test_newton_schulz_trains_on_another_direction():
    sequence = gradients((40, 16), 5)
    exact, iterated = (
        run(sumo_optax.scale_by_sumo(RANK, polar=p), {"w": sequence}, 5)[0][-1]["w"]
        for p in ("auto", "newton_schulz")
    )
    assert relative(iterated, exact) > 0.05


def test_rank_above_the_short_side_is_the_short_side():
    sequence = gradients((16, 40), 1)
    for side, shapes in {"short": ((16, 16), (16, 40)), "long": ((40, 16), (16, 16))}.items():
        _, states = run(sumo_optax.scale_by_sumo(100, side=side), {"w": sequence}, 1)
        Q, M, _ = starting_state(states, "w")
        assert (Q.shape, M.shape) == shapes


# The alias.


def params_and_grads():
    rng = np.random.default_rng(3)
    shapes = {"dense": {"kernel": (20, 12), "bias": (12,)}, "embed": {"embedding": (30, 12)}}
    draw = lambda: jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return draw(), draw()


def test_sumo_is_scale_by_sumo_with_decay_and_rate_and_adamw_elsewhere():
    params, grads = params_and_grads()
    tx = sumo_optax.sumo(
        0.1, 4, weight_decay=0.5, adam_learning_rate=0.01, adam_weight_decay=0.2, adam_b1=0.8
    )
    bare = sumo_optax.scale_by_sumo(4)
    adamw = optax.adamw(0.01, b1=0.8, weight_decay=0.2)
    updates, _ = tx.update(grads, tx.init(params), params)
    direction, _ = bare.update(grads, bare.init(params), params)
    others, _ = adamw.update(grads, adamw.init(params), params)
    kernel = -0.1 * (direction["dense"]["kernel"] + 0.5 * params["dense"]["kernel"])
    np.testing.assert_allclose(updates["dense"]["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], others["dense"]["bias"], rtol=1e-5)
    np.testing.assert_allclose(
        updates["embed"]["embedding"], others["embed"]["embedding"], rtol=1e-5
    )


def test_weight_decay_mask_and_schedules():
    params, grads = params_and_grads()
    mask = lambda p: jax.tree.map(lambda x: x.ndim == 1, p)
    tx = sumo_optax.sumo(
        optax.linear_schedule(1.0, 0.0, 2), 4, weight_decay=0.5, weight_decay_mask=mask
    )
    plain = sumo_optax.sumo(1.0, 4)
    updates, state = tx.update(grads, tx.init(params), params)
    expected, other = plain.update(grads, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates["embed"], expected["embed"])
    np.testing.assert_array_equal(updates["dense"]["kernel"], expected["dense"]["kernel"])
    second, state = tx.update(grads, state, params)
    expected, other = plain.update(grads, other, params)
    np.testing.assert_allclose(
        second["dense"]["kernel"], expected["dense"]["kernel"] / 2, rtol=1e-6
    )
    third, _ = tx.update(grads, state, params)
    assert float(optax.tree.norm(third)) == 0


def test_fallback_is_any_transformation():
    params, grads = params_and_grads()
    tx = sumo_optax.scale_by_sumo(4, fallback=optax.scale(-3.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["dense"]["bias"], -3 * grads["dense"]["bias"])


def test_seed_gives_the_start_and_nothing_else_does():
    params, grads = params_and_grads()
    first = lambda seed: sumo_optax.sumo(1.0, 4, seed=seed).update(
        grads, sumo_optax.sumo(1.0, 4, seed=seed).init(params), params
    )[0]["dense"]["kernel"]
    np.testing.assert_array_equal(first(0), first(0))
    assert relative(first(1), first(0)) > 0.01


def test_state_dtype_is_what_is_kept():
    params, grads = params_and_grads()
    tx = sumo_optax.scale_by_sumo(4, state_dtype=jnp.bfloat16)
    exact = sumo_optax.scale_by_sumo(4)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    kept = state.basis["dense"]["kernel"], state.moment["dense"]["kernel"]
    assert all(x.dtype == jnp.bfloat16 for x in kept)
    assert updates["dense"]["kernel"].dtype == jnp.float32
    expected, _ = exact.update(grads, exact.init(params), params)
    assert relative(updates["dense"]["kernel"], expected["dense"]["kernel"]) < 0.05  # 8 bits


@pytest.mark.parametrize(
    "argument, error",
    [
        ({"rank": 0}, "rank must be an integer of at least 1 .* got 0"),
        ({"rank": 2.5}, r"rank must be .* a float in \(0, 1\], .* got 2.5"),
        ({"rank": True}, "rank must be .* a function of a leaf's path and shape, got True"),
        ({"refresh_below": 2}, "refresh_below must be a number >= 0 and <= 1, or None, got 2"),
        ({"refresh_every": 0}, "refresh_every must be an integer of at least 1, got 0"),
        ({"momentum": 1.0}, "momentum must be a number >= 0 and < 1, got 1.0"),
        ({"momentum": "high"}, "momentum must be a number >= 0 and < 1, got 'high'"),
        ({"norm_growth_limit": 0}, "norm_growth_limit must be a number > 0, or None, got 0"),
        ({"consistent_rms": -1}, "consistent_rms must be a number > 0, or None, got -1"),
        ({"residual": "raw"}, "residual must be one of .*'gradient'.*None.*got 'raw'"),
        ({"basis": "qr"}, "basis must be one of .*'tracking'.* got 'qr'"),
        ({"side": "left"}, "side must be one of .*'short'.* got 'left'"),
        ({"polar": "qr"}, "polar method must be one of .* got 'qr'"),
    ],
)
def test_wrong_arguments(argument, error):
    with pytest.raises((ValueError, TypeError), match=error):
        sumo_optax.sumo(1e-3, **argument)
    with pytest.raises((ValueError, TypeError), match=error):
        sumo_optax.scale_by_sumo(**argument)
