"""What `subspace_metrics` says, against NumPy float64; and that `metrics=True` changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import (
    ALL_BUT_ONE,
    IN_FEW_BITS,
    assert_equal,
    every,
    every_optimizer_slowly,
    like,
    small_params,
)
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sumo_optax

KERNELS = {"dense/kernel": ("dense", "kernel"), "layers/up/kernel": ("layers", "up", "kernel")}


def leaf(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


def spectrum(s):
    """Condition number and effective rank, by their definitions."""
    p = s / s.sum()
    return s[0] / s[-1], np.exp(-(p * np.log(p)).sum())


def movement(G, Q_old, Q):
    """Captured energy and the root mean square sine of the principal angles."""
    Q_old, Q = (np.linalg.qr(x.astype(np.float64))[0] for x in (Q_old, Q))
    cosines = np.linalg.svd(Q_old.T @ Q, compute_uv=False)
    return (
        np.linalg.norm(Q_old.T @ G) ** 2 / np.linalg.norm(G) ** 2,
        np.sqrt(np.mean(1 - np.minimum(cosines, 1) ** 2)),
    )


def moment(state, path):
    """Singular values of each matrix's moment, batch first."""
    if isinstance(state, sumo_optax.MofasgdState):
        s = np.asarray(leaf(state.singular_values, path), np.float64)
        return s.reshape(-1, s.shape[-1])
    tree = state.moment if hasattr(state, "moment") else getattr(state, "inner", state).mu
    M = np.asarray(leaf(tree, path), np.float64)
    return np.linalg.svd(M.reshape(-1, *M.shape[-2:]), compute_uv=False)


@every(1, ALL_BUT_ONE, IN_FEW_BITS)
def test_agrees_with_the_definitions(make):
    params, plain, tx = small_params(), make(), make(metrics=True)
    state, plain_state = tx.init(params), plain.init(params)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    read = jax.jit(sumo_optax.subspace_metrics)
    for t in range(1, 7):
        grads, before = like(params, t), state.inner
        updates, state = update(grads, state, params)
        plain_updates, plain_state = plain_update(grads, plain_state, params)
        assert_equal(updates, plain_updates)
        assert_equal(state.inner, plain_state)
        metrics = read(state)
        assert set(metrics.leaves) == set(KERNELS)
        for name, path in KERNELS.items():
            got = {k: np.ravel(x) for k, x in metrics.leaves[name].items()}
            each = lambda x: np.asarray(x, np.float64).reshape(-1, *np.shape(x)[-2:])
            bases = zip(
                each(leaf(before.basis, path)),
                each(leaf(state.inner.basis, path)),
                strict=True,
            )
            for i, (Q_old, Q) in enumerate(bases):
                G = each(leaf(grads, path))[i]
                G = G if len(G) == len(Q) else G.T
                captured, rotation = movement(G, Q_old, Q)
                if np.any(Q_old):
                    assert got["captured"][i] == pytest.approx(captured, rel=1e-4)
                    if np.any(Q_old != Q):
                        assert got["rotation"][i] == pytest.approx(rotation, rel=1e-4, abs=1e-6)
                else:
                    assert got["captured"][i] == 0 and got["rotation"][i] == pytest.approx(1)
                condition, rank = spectrum(moment(state.inner, path)[i])
                assert got["condition_number"][i] == pytest.approx(condition, rel=1e-3)
                assert got["effective_rank"][i] == pytest.approx(rank, rel=1e-4)


def test_moments_with_known_spectra():
    moments = [
        np.eye(3, 4),
        1e30 * np.diag([4.0, 2, 2, 0])[:3],  # p = 1/2, 1/4, 1/4
        np.diag([1.0, 0, 0, 0])[:3],
        np.zeros((3, 4)),
    ]
    tree = {"dense": {"kernel": jnp.asarray(np.stack(moments), jnp.float32)}}
    state = sumo_optax.scale_by_sumo(3).init({"dense": {"kernel": jnp.ones((5, 4))}})
    state = state._replace(moment=tree, skipped=jnp.int32(2))
    metrics = sumo_optax.subspace_metrics(state)
    of_leaf = metrics.leaves["dense/kernel"]
    condition, rank = of_leaf["condition_number"], of_leaf["effective_rank"]
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(condition, [1, 2, 1 / eps, 1], rtol=1e-5)
    np.testing.assert_allclose(rank, [3, 2 * 2**0.5, 1, 0], rtol=1e-3)
    assert metrics.summary["condition_number"] == condition[2], "the worst"
    assert float(metrics.summary["effective_rank"]) == pytest.approx(float(rank.mean()))
    assert int(metrics.summary["skipped"]) == 2
    assert "captured" not in metrics.summary, "only a measured state has it"


def periodic(**kw):
    return sumo_optax.scale_by_sumo(2, basis="random", refresh_every=3, residual=None, **kw)


def test_counts_and_holds_between_refreshes_and_skips():
    params = {"dense": {"kernel": jnp.ones((8, 4))}}
    tx = periodic(metrics=True)
    state, update = tx.init(params), jax.jit(tx.update, donate_argnums=1)
    steps, rotations, captured = [], [], []
    for t in range(7):
        grads = like(params, t)
        if t == 5:
            grads = {"dense": {"kernel": grads["dense"]["kernel"].at[0, 0].set(jnp.nan)}}
        _, state = update(grads, state, params)
        summary = sumo_optax.subspace_metrics(state).summary
        steps.append(int(summary["steps_since_refresh"]))
        rotations.append(float(summary["rotation"]))
        captured.append(float(summary["captured"]))
    assert steps == [0, 1, 2, 0, 1, 1, 0], "a skipped step is none"
    assert rotations[0] == pytest.approx(1), "there was no basis before"
    assert rotations[1] == rotations[2] == rotations[0] != rotations[3] == rotations[4]
    assert 0 < rotations[3] < 1
    assert captured[0] == 0 and captured[5] == captured[4] != captured[6]
    assert int(summary["skipped"]) == 1


def test_refuses_a_state_without_subspace():
    params = {"dense": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="no optimizer of sumo_optax"):
        sumo_optax.subspace_metrics(optax.adam(1e-3).init(params))
    plain, measured = periodic(), periodic(metrics=True)
    for tx, state in ((measured, plain.init(params)), (plain, measured.init(params))):
        with pytest.raises(TypeError, match="sumo_optax.convert_state converts other states"):
            tx.update(params, state, params)


@every_optimizer_slowly
def test_costs_three_numbers_a_matrix_and_nothing_without(make):
    params = small_params()
    with_metrics, without = (sumo_optax.state_bytes(make(metrics=x), params) for x in (True, False))
    assert with_metrics - without == 3 * 3 * 4, "of one matrix and of two in a stack"


@pytest.mark.slow
def test_states_convert_both_ways():
    params, (plain, measured) = small_params(), (periodic(), periodic(metrics=True))
    _, state = jax.jit(plain.update)(like(params, 1), plain.init(params), params)
    turned_on = sumo_optax.convert_state(state, measured, params)
    assert_equal(turned_on.inner, state)
    assert_equal(turned_on[1:], measured.init(params)[1:])
    assert_equal(sumo_optax.convert_state(turned_on, plain, params), state)
    _, state = jax.jit(measured.update)(like(params, 2), turned_on, params)
    assert_equal(sumo_optax.convert_state(state, measured, params), state)


@pytest.mark.slow
def test_projected_gradients_keep_what_was_captured():
    params = {"dense": {"kernel": jnp.ones((8, 4))}}
    tx = periodic(metrics=True)
    _, state = tx.update(like(params, 0), tx.init(params), params)
    _, state = tx.update(like(params, 1), state, params)
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["dense"]["kernel"]))
    _, grads = sumo_optax.subspace_value_and_grad(loss)(params, state, jnp.ones((2, 8)))
    _, after = tx.update(grads, state, params)
    assert_equal(after.captured, state.captured)
    assert float(after.captured["dense"]["kernel"]) > 0
    assert int(after.steps_since_refresh["dense"]["kernel"]) == 2


@pytest.mark.slow
def test_inside_the_backward_pass():
    params = small_params()
    tx = sumo_optax.sumo(1e-2, 3, metrics=True)
    loss = lambda p: sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(p))
    value_and_update = jax.jit(sumo_optax.value_and_update(loss, tx))
    fused, state, plain = params, tx.init(params), tx.init(params)
    for _ in range(2):
        updates, plain = jax.jit(tx.update)(jax.grad(loss)(fused), plain, fused)
        _, fused, state = value_and_update(fused, state)
    one, other = (sumo_optax.subspace_metrics(x) for x in (state, plain))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["long", "short"])
def test_square_matrices_of_either_side(side):
    """A gradient of rank 2: the basis of its own side captures all of a like one, no other does."""
    left, right = (np.linalg.qr(np.random.default_rng(i).normal(size=(6, 2)))[0] for i in (0, 1))
    params = {"dense": {"kernel": jnp.asarray(left @ right.T, jnp.float32)}}
    tx = sumo_optax.scale_in_subspace(optax.trace(0.9), 2, side=side, metrics=True)
    _, state = tx.update(params, tx.init(params))
    _, state = tx.update(params, state)
    summary = sumo_optax.subspace_metrics(state).summary
    assert float(summary["captured"]) == pytest.approx(1, rel=1e-5)
    assert float(summary["condition_number"]) == pytest.approx(1, rel=1e-4), "trace is a moment"


@pytest.mark.slow
def test_inside_optax_combinators():
    params = small_params()
    inner = optax.chain(optax.clip_by_global_norm(1.0), sumo_optax.sumo(1e-2, 3, metrics=True))
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    state = tx.init(params)
    for t in range(4):
        _, state = jax.jit(tx.update)(like(params, t), state, params)
    assert set(sumo_optax.subspace_metrics(state).leaves) == set(KERNELS)
    doubled = optax.tree_map_params(tx, lambda x: 2 * x, state, transform_non_params=lambda x: x)
    get = lambda s: s.inner_opt_state[1][0].inner.basis["dense"]["kernel"]
    np.testing.assert_array_equal(get(doubled), 2 * get(state))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_as_on_one_device(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params = {"dense": {"kernel": like(jnp.zeros((16, 8)), 0)}}
    tx = sumo_optax.scale_by_sumo(3, metrics=True)

    def run(params):
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(3):
            _, state = update(params, state, params)
        return jax.jit(sumo_optax.subspace_metrics)(state)

    with jax.set_mesh(mesh):
        sharded = run(jax.device_put(params, NamedSharding(mesh, P("x", "y"))))
    alone = run(params)
    for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


@pytest.mark.slow
def test_nnx_optimizer_on_a_partitioned_model():
    """Variables there name the axes of their arrays, which are others for the metrics."""
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))

    def create():
        model = nnx.Linear(16, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        tx = sumo_optax.sumo(1e-2, 3, metrics=True)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - x[:, :8]) ** 2))(model)
        optimizer.update(model, grads)
        return sumo_optax.subspace_metrics(optimizer.opt_state)

    x = jax.random.normal(jax.random.key(0), (32, 16))
    metrics = []
    for shape in ((4, 2), (1, 1)):
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        with jax.set_mesh(mesh):
            model, optimizer = nnx.jit(create)()
            metrics.append([step(model, optimizer, x) for _ in range(3)][-1])
    assert list(metrics[0].leaves) == ["kernel"]
    for a, b in zip(*map(jax.tree.leaves, metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
