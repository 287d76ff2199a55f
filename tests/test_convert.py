"""States of another rank or optimizer: what is kept of them, to NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_equal, like
from optax.contrib import MuonDimensionNumbers

import sumo_optax
from sumo_optax._paths import named_leaves

# Tall, wide, square, stacked, and split over two axes on either side; and leaves that are none.
SHAPES = {
    "tall": {"kernel": (12, 6), "bias": (6,)},
    "wide": {"kernel": (6, 12)},
    "square": {"kernel": (6, 6)},
    "layers": {"up": {"kernel": (3, 6, 12), "bias": (3, 12)}},
    "query": {"kernel": (6, 3, 4), "bias": (3, 4)},
    "out": {"kernel": (3, 4, 6), "bias": (6,)},
    "embed": {"embedding": (9, 6)},
}
PARAMS = like(
    jax.tree.map(lambda s: np.zeros(s, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)),
    0,
)
# Each leaf as a matrix with its inputs first, by hand.
FLAT = {
    "tall": (12, 6),
    "wide": (6, 12),
    "square": (6, 6),
    "layers": (3, 6, 12),
    "query": (6, 12),
    "out": (12, 6),
}
# float32 rounding of a few factorisations of well-conditioned matrices.
ROUNDING = 1e-5


def leaf(tree, name):
    tree = tree[name]["up"] if name == "layers" else tree[name]
    return np.asarray(tree["kernel"], np.float64)


def as_matrix(tree, name):
    """The leaf as (*batch, m, n), m >= n."""
    return tall(leaf(tree, name).reshape(FLAT[name]))


def tall(x):
    return x if x.shape[-2] >= x.shape[-1] else np.swapaxes(x, -1, -2)


def moment(state, name):
    """The whole first moment of a SUMO or MoFaSGD state."""
    if isinstance(state, sumo_optax.SumoState):
        return tall(leaf(state.basis, name) @ leaf(state.moment, name))
    U, s, V = (leaf(field, name) for field in state[1:4])
    return (U * s[..., None, :]) @ np.swapaxes(V, -1, -2)


def best(M, r):
    """The best approximation of rank r."""
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    return (U[..., :r] * s[..., None, :r]) @ Vt[..., :r, :]


def assert_near(a, b):
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= ROUNDING * np.linalg.norm(b)


def assert_orthonormal(Q):
    gram = np.swapaxes(Q, -1, -2) @ Q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=1e-5)


def bases(state, name):
    fields = ("basis", "row_basis") if isinstance(state, sumo_optax.MofasgdState) else ("basis",)
    return [leaf(getattr(state, field), name) for field in fields]


def filled(tx, params=PARAMS):
    """The state after four steps, for all that anyone can tell; and with nothing to compile."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        names = jax.tree_util.keystr(path)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.full_like(x, 4)
        values, positive = rng.normal(size=x.shape), "singular" in names or ".nu" in names
        if ("basis" in names or "projector" in names) and x.size:
            values = np.linalg.qr(values)[0]
        return jnp.asarray(np.abs(values) if positive else values, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(tx.init, params))


def sumo(rank, basis="svd", **kw):  # whose start is zeros, with nothing to compile
    tx = sumo_optax.sumo(SCHEDULE, rank, basis=basis, **kw)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def mofasgd(rank, **kw):
    return optax.chain(optax.clip_by_global_norm(1.0), sumo_optax.mofasgd(SCHEDULE, rank, **kw))


NONE = optax.MaskedNode()
SCHEDULE = optax.linear_schedule(1e-2, 0.0, 10)
MAKE = {"sumo": sumo, "mofasgd": mofasgd}


@pytest.fixture(scope="module")
def states():
    """States of rank 3, by optimizer."""
    return {name: filled(make(3)) for name, make in MAKE.items()}


SLOW = [pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 20)]


@pytest.mark.parametrize("rank", [2, 5, *SLOW])
@pytest.mark.parametrize("before, after", [("sumo", "sumo"), ("mofasgd", "mofasgd")])
def test_another_rank_keeps_the_moment_or_the_best_of_it(states, before, after, rank):
    check_moments(states[before], MAKE[after](rank), 3, rank)


@pytest.mark.parametrize("before, after", [("sumo", "mofasgd"), ("mofasgd", "sumo")])
def test_sumo_and_mofasgd_start_from_each_other(states, before, after):
    check_moments(states[before], MAKE[after](2), 3, 2)


@pytest.mark.parametrize("name", MAKE)
def test_a_rank_may_be_a_function_then(states, name):
    of_leaf = lambda path, shape: 1.0 if path.startswith("square") else 2
    found = sumo_optax.convert_state(states[name], MAKE[name](of_leaf), PARAMS)
    ranks = {path: Q.shape[-1] for path, Q in named_leaves(found[1][0].basis).items()}
    assert {rank for path, rank in ranks.items() if path[0] != "square"} == {2}
    assert ranks["square", "kernel"] == 6
    assert_near(moment(found[1][0], "square"), moment(states[name][1][0], "square"))
    expected = sumo_optax.convert_state(states[name], MAKE[name](2), PARAMS)
    assert_near(moment(found[1][0], "tall"), moment(expected[1][0], "tall"))


def check_moments(state, tx, old_rank, rank):
    converted = sumo_optax.convert_state(state, tx, PARAMS)
    old, new = state[1][0], converted[1][0]
    sumo_optax.check_state(converted, jax.eval_shape(tx.init, PARAMS))
    for name in FLAT:
        M = moment(old, name)
        assert_near(moment(new, name), best(M, rank))
        if rank < old_rank:  # or the test could not tell
            assert np.linalg.norm(best(M, rank) - M) > 1e-2 * np.linalg.norm(M)
        for Q in bases(new, name):
            assert Q.shape[-1] == min(rank, *as_matrix(PARAMS, name).shape[-2:])
            assert_orthonormal(Q)
    assert new.count == 4 and new.skipped == old.skipped
    assert_equal(new.fallback, old.fallback)
    assert_equal(converted[1][1], state[1][1])  # schedules


@pytest.mark.slow
def test_training_goes_on_from_the_moment(states):
    """What the next step makes of a state of a larger rank, by the formulas."""
    tx = sumo(5, residual=None, momentum=0.9, nesterov=False, norm_growth_limit=None)
    state = sumo_optax.convert_state(states["sumo"], tx, PARAMS)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, after = jax.jit(tx.update)(zero, state, PARAMS)
    for name in FLAT:
        M = moment(states["sumo"][1][0], name)
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
        polar = U[..., :3] @ Vt[..., :3, :]  # the two new directions have nothing to say yet
        D = as_matrix(updates, name)
        D = D if D.shape == M.shape else np.swapaxes(D, -1, -2)
        expected = -SCHEDULE(4) * M.shape[-2] ** 0.5 * polar
        if M.shape[-1] > 3:
            assert np.linalg.norm(D - expected) < 1e-3 * np.linalg.norm(expected)
        assert_near(moment(after[1][0], name), 0.9 * M)
    updates, _ = jax.jit(tx.update)(like(PARAMS, 9), after, PARAMS)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(updates))


def test_the_limit_on_the_norm_starts_afresh(states):
    """Or a step of rank 5 would be held to the norm of one of rank 3."""
    new = sumo_optax.convert_state(states["sumo"], sumo(5), PARAMS)[1][0]
    for x in jax.tree.leaves(new.update_norm):
        np.testing.assert_array_equal(x, 0)
    for x in jax.tree.leaves(new.captured):
        np.testing.assert_array_equal(x, 1)


@pytest.mark.parametrize("name", MAKE)
def test_the_same_rank_changes_nothing(states, name):
    assert_equal(sumo_optax.convert_state(states[name], MAKE[name](3), PARAMS), states[name])


@pytest.mark.slow
def test_tracking_starts_from_a_random_basis_where_there_is_no_moment(states):
    tx = sumo(2, "tracking")
    assert_equal(sumo_optax.convert_state(sumo(3).init(PARAMS), tx, PARAMS), tx.init(PARAMS))
    check_moments(states["sumo"], tx, 3, 2)


def test_a_matrix_without_a_moment_starts_as_ever(states):
    """A basis that is none yet stays none; and one of a batch does not hold for the others."""
    state = sumo_optax.convert_state(sumo(3).init(PARAMS), sumo(2), PARAMS)
    assert_equal(state, sumo(2).init(PARAMS))
    clip, (ours, rates) = states["sumo"]
    M = ours.moment["layers"]["up"]["kernel"]
    moment = ours.moment | {"layers": {"up": {"kernel": M.at[1].set(0)} | {"bias": NONE}}}
    state = sumo_optax.convert_state((clip, (ours._replace(moment=moment), rates)), sumo(2), PARAMS)
    Q = leaf(state[1][0].basis, "layers")
    assert np.all(Q[1] == 0)
    assert_orthonormal(Q[[0, 2]])


B1 = 0.8


def test_adamw_gives_its_moment_as_a_sum():
    """Its mean of gradients over 1 - b1; for leaves that are no matrices, both of its moments."""
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE, b1=B1))
    state = filled(adamw)
    adam = state[1][0]
    for tx in (sumo(3), mofasgd(3)):
        converted = sumo_optax.convert_state(state, tx, PARAMS, adam_b1=B1)
        sumo_optax.check_state(converted, jax.eval_shape(tx.init, PARAMS))
        ours, rates = converted[1]
        for name in FLAT:
            M = as_matrix(adam.mu, name) / (1 - B1)
            assert_near(moment(ours, name), best(M, 3))
            Q = leaf(ours.basis, name)  # the dominant subspace, whatever its basis
            M = M if Q.shape[-2] == M.shape[-2] else np.swapaxes(M, -1, -2)
            U, s, _ = np.linalg.svd(M.astype(np.float64), full_matrices=False)
            error = Q @ np.swapaxes(Q, -1, -2) - U[..., :3] @ np.swapaxes(U[..., :3], -1, -2)
            # A perturbation turns a subspace by its size over the gap in the spectrum.
            gap = np.min((s[..., 2] - s[..., 3]) / s[..., 0])
            assert np.linalg.norm(error, axis=(-2, -1)).max() <= ROUNDING / gap
        for field in ("mu", "nu"):
            theirs, kept = getattr(adam, field), getattr(ours.fallback, field)
            for name in ("tall", "query"):
                np.testing.assert_array_equal(kept[name]["bias"], theirs[name]["bias"])
            np.testing.assert_array_equal(kept["embed"]["embedding"], theirs["embed"]["embedding"])
        counters = [x for x in jax.tree.leaves(rates) if x.ndim == 0]
        assert counters and all(x == 4 for x in (*counters, ours.count, ours.fallback.count))


def test_galore_gives_its_subspace():
    """The whole of it at a larger rank, and its best part at a smaller one."""
    dimensions = optax.contrib.GaLoreDimensionNumbers
    names = {
        "tall": dimensions(0, 1),
        "wide": dimensions(0, 1),
        "square": dimensions(0, 1),
        "query": dimensions(0, (1, 2)),
        "out": dimensions((0, 1), 2),
    }

    params = {k: PARAMS[k] for k in (*names, "embed")}
    specs = {k: jax.tree.map(lambda _: None, v) for k, v in params.items()}
    for name, spec in names.items():
        specs[name]["kernel"] = spec
    galore = optax.contrib.galore(SCHEDULE, 3, 2, weight_dimension_numbers=lambda _: specs)
    state = filled(galore, params)
    inner = state[0]
    for rank in (2, 5):
        tx = sumo(rank)
        converted = sumo_optax.convert_state(state, tx, params)
        sumo_optax.check_state(converted, jax.eval_shape(tx.init, params))
        ours = converted[1][0]
        for name in names:
            P, mu = leaf(inner.projector, name), leaf(inner.base_optimizer_state.mu, name)
            M = P @ mu if P.shape[1] == mu.shape[0] else P @ mu.T
            assert_near(moment(ours, name), best(M / (1 - 0.9), rank))
            assert_orthonormal(leaf(ours.basis, name))
        mu = inner.base_optimizer_state.mu["tall"]["bias"]
        np.testing.assert_array_equal(ours.fallback.mu["tall"]["bias"], mu)
        assert ours.count == 4


def test_state_dtype_and_the_batch_axes_of_a_spec():
    """bfloat16 state, and a stack that only its spec tells."""
    params = {"experts": jnp.zeros((6, 2, 4))}
    spec = MuonDimensionNumbers(0, 2)
    adam = filled(optax.scale_by_adam(), params)
    tx = sumo_optax.scale_by_sumo(
        2, basis="svd", weight_dimension_numbers=spec, state_dtype=jnp.bfloat16
    )
    state = sumo_optax.convert_state(adam, tx, params, weight_dimension_numbers=spec)
    Q, M = state.basis["experts"], state.moment["experts"]
    assert Q.shape == (2, 4, 2) and M.shape == (2, 2, 6) and Q.dtype == M.dtype == jnp.bfloat16
    expected = np.moveaxis(np.float64(adam.mu["experts"]), (1, 2), (0, 1)) * 10
    M = np.float64(Q) @ np.float64(M)
    assert np.linalg.norm(M - best(expected, 2)) < 0.02 * np.linalg.norm(M)  # eight bits


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 3),
    "inject_hyperparams": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, {k: k != "wide" for k in PARAMS}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_keep_all_else(name):
    wrap = WRAPPERS[name]
    if name == "inject_hyperparams":
        inject = optax.inject_hyperparams(sumo_optax.sumo, static_args=("rank",))
        small, large = (inject(learning_rate=SCHEDULE, rank=r) for r in (3, 4))
    else:
        small, large = wrap(sumo(3)), wrap(sumo(4))
    state = filled(small)
    converted = sumo_optax.convert_state(state, large, PARAMS)
    is_ours = lambda x: isinstance(x, sumo_optax.SumoState)
    without = lambda state: jax.tree.map(lambda x: 0 if is_ours(x) else x, state, is_leaf=is_ours)
    assert_equal(
        jax.tree.map(np.asarray, without(converted)), jax.tree.map(np.asarray, without(state))
    )
    sumo_optax.check_state(converted, jax.eval_shape(large.init, PARAMS))
    old, new = (
        next(filter(is_ours, jax.tree.leaves(s, is_leaf=is_ours))) for s in (state, converted)
    )
    assert_near(moment(new, "tall"), moment(old, "tall"))


def other_shape(state):
    return sumo_optax.convert_state(
        state, sumo(2), PARAMS | {"tall": {"kernel": jnp.zeros((8, 6))}}
    )


REFUSED = {
    "tx": (
        lambda s: (s, optax.adamw(1e-3), PARAMS),
        "tx must hold SUMO or MoFaSGD, got one with Sc",
    ),
    "state": (
        lambda s: (optax.sgd(1e-3, 0.9).init(PARAMS), sumo(2), PARAMS),
        "state must hold first moments of SUMO, .* got one with none of these",
    ),
    "subspace": (
        lambda s: (sumo_optax.scale_by_online_subspace_descent(2).init(PARAMS), sumo(2), PARAMS),
        "holds no first moment of layers/up/kernel",
    ),
    "shape": (
        lambda s: (
            s,
            sumo(2),
            PARAMS | {"tall": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}},
        ),
        "at tall/kernel state has a matrix 6 x 12, tx has a matrix 6 x 8",
    ),
    "batch": (
        lambda s: (
            s,
            sumo(2),
            PARAMS
            | {"layers": {"up": {"kernel": jnp.zeros((2, 6, 12)), "bias": jnp.zeros((2, 12))}}},
        ),
        "at layers/up/kernel state has .3. matrices 6 x 12, tx has .2. matrices 6 x 12",
    ),
    "new leaf": (
        lambda s: (s, sumo(2), PARAMS | {"new": {"kernel": jnp.zeros((8, 6))}}),
        "no first moment of new/kernel; it has: ",
    ),
    "new bias": (
        lambda s: (s, sumo(2), PARAMS | {"new": {"bias": jnp.zeros(6)}}),
        "Adam for new/bias, but state has no moments of Adam of shape",
    ),
    "spec": (
        lambda s: (
            optax.adam(1e-3).init(PARAMS),
            sumo_optax.scale_by_sumo(
                2, basis="svd", weight_dimension_numbers=MuonDimensionNumbers(0, 1)
            ),
            PARAMS,
        ),
        "tx has a matrix at embed/embedding, weight_dimension_numbers has none there",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(states, case):
    arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        sumo_optax.convert_state(*arguments(states["sumo"]))


def test_adam_b1_is_checked(states):
    with pytest.raises(ValueError, match="adam_b1 must be a number >= 0 and < 1, got 1"):
        sumo_optax.convert_state(states["sumo"], sumo(2), PARAMS, adam_b1=1)


def test_differences_are_named_and_counted():
    state = sumo_optax.scale_by_sumo(2).init(PARAMS)
    same = jax.eval_shape(sumo_optax.scale_by_sumo(2).init, PARAMS)
    assert sumo_optax.check_state(state, same) is None
    with pytest.raises(ValueError) as error:
        sumo_optax.check_state(state, jax.eval_shape(sumo_optax.scale_by_sumo(3).init, PARAMS))
    message = str(error.value)
    assert message.startswith("basis/layers/up/kernel was float32[3, 6, 2], now float32[3, 6, 3]")
    assert message.endswith("; and 7 more")
    half = sumo_optax.scale_by_sumo(2, state_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="was float32.*, now bfloat16"):
        sumo_optax.check_state(state, jax.eval_shape(half.init, PARAMS))
