"""Values and types that matrices may have, and those that they may not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import (
    assert_close,
    every_optimizer,
    every_transformation,
    every_transformation_slowly,
    like,
    small_params,
)
from jax.sharding import NamedSharding, PartitionSpec

import sumo_optax
from sumo_optax._quantize import dequantized


@every_transformation
def test_complex_matrices_are_refused(make):
    params = {
        "up": {"kernel": jnp.ones((8, 6), jnp.complex64)},
        "phase": jnp.ones(3, jnp.complex64),
    }
    with pytest.raises(TypeError, match="up/kernel must be real.*split_real_and_imaginary"):
        make().init(params)


@pytest.mark.slow
@every_transformation
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_matrices_of_integers_are_refused(make, dtype):
    params = {"up": {"kernel": jnp.ones((8, 6), dtype)}}
    name = jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=f"up/kernel must be floating-point, got {name}.*masked"):
        make().init(params)


def test_numbers_of_python_are_scalars():
    tx = sumo_optax.sumo(1e-3)
    updates, _ = tx.update({"gain": 0.5}, tx.init({"gain": 1.0}), {"gain": 1.0})
    np.testing.assert_allclose(updates["gain"], -1e-3, rtol=1e-5)


def test_complex_matrices_train_as_real_and_imaginary_ones():
    target = jax.random.normal(jax.random.key(0), (8, 6), jnp.complex64)
    params = {"w": jnp.zeros((8, 6), jnp.complex64)}
    tx = optax.contrib.split_real_and_imaginary(sumo_optax.sumo(0.1, 6))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(100):
        grads = {"w": params["w"] - target}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.linalg.norm(params["w"] - target) < 0.5 * jnp.linalg.norm(target)


@every_transformation_slowly
@pytest.mark.parametrize(
    "dtype", [jnp.float8_e4m3fn, pytest.param(jnp.float8_e5m2, marks=pytest.mark.slow)]
)
def test_eight_bit_gradients_train_like_the_bfloat16_ones_that_they_are(make, dtype):
    small = jax.tree.map(lambda x: x.astype(dtype), like({"w": jnp.ones((12, 6))}, 0))
    large = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small)
    tx = make()
    updates, state = jax.jit(tx.update)(small, tx.init(small))
    expected, expected_state = jax.jit(tx.update)(large, tx.init(large))
    assert updates["w"].dtype == dtype
    basis, expected_basis = (dequantized(x.basis)["w"] for x in (state, expected_state))
    assert basis.dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"], expected["w"].astype(dtype))
    np.testing.assert_array_equal(basis, expected_basis)


@every_optimizer
def test_leaves_without_numbers(make):
    params = {
        "w": jnp.ones((8, 6)),
        "none": jnp.ones((0, 6)),
        "of": {"kernel": jnp.ones((2, 0, 6))},
    }
    tx = make()
    state = tx.init(params)
    assert isinstance(dequantized(state[0]).basis["none"], optax.MaskedNode)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_leaves_without_numbers_whatever_the_spec_says():
    spec = optax.contrib.MuonDimensionNumbers(-2, -1)
    tx = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=spec)
    state = tx.init({"w": jnp.ones((8, 6)), "none": jnp.ones((0, 6))})
    assert isinstance(state.basis["none"], optax.MaskedNode)


def on_mesh(params, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    return jax.device_put(params, NamedSharding(mesh, PartitionSpec("a", "b"))), mesh


KINDS = [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]


@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=pytest.mark.slow), KINDS[1]])
def test_a_rank_of_a_million_is_the_short_side(kind):
    params = like({"w": jnp.ones((16, 8))}, 0)
    tx = sumo_optax.scale_by_sumo(10**6)
    expected, _ = jax.jit(tx.update)(params, tx.init(params))
    sharded, mesh = on_mesh(params, kind)
    with jax.set_mesh(mesh):
        state = tx.init(sharded)
        updates, _ = jax.jit(tx.update)(sharded, state)
    assert state.basis["w"].shape == (8, 8)
    assert_close(updates, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_factored_inner_optimizer_on_a_mesh(kind):
    params = like({"w": jnp.ones((16, 8))}, 0)
    tx = sumo_optax.scale_in_subspace(optax.scale_by_factored_rms(min_dim_size_to_factor=2), 4)
    state = tx.init(params)
    assert {x.shape for x in jax.tree.leaves(state.inner)} >= {(4,), (8,)}, "it factors"
    expected, _ = jax.jit(tx.update)(params, state)
    sharded, mesh = on_mesh(params, kind)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(sharded, tx.init(sharded))
    assert_close(updates, expected)


@pytest.mark.parametrize(
    "tx",
    [
        sumo_optax.scale_by_sumo(2, basis="svd", residual="gradient", norm_growth_limit=None),
        sumo_optax.scale_by_mofasgd(2, complement=0.5),
    ],
    ids=["residual", "complement"],
)
def test_a_projected_gradient_is_no_update_with_weights(tx):
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
    find = sumo_optax.subspace_value_and_grad(loss)

    def step(params, x):
        state = tx.init(params)
        _, grads = find(params, state, x)
        return tx.update(grads, state, params)

    with pytest.raises(ValueError, match="w is projected, but this optimizer reads"):
        jax.eval_shape(step, {"w": jnp.ones((8, 6))}, jnp.ones((4, 8)))


TRACE, NONE = optax.trace(0.9), optax.identity()
# Adam's own bias correction mixes dtypes, and so is none of these.
TRANSFORMATIONS = {
    "sumo": sumo_optax.scale_by_sumo(3, fallback=NONE),
    "sumo, periodic": sumo_optax.scale_by_sumo(
        3, basis="randomized_svd", refresh_every=4, stagger=True, residual="gradient", fallback=NONE
    ),
    "sumo, stale": sumo_optax.scale_by_sumo(
        3, basis="random", refresh_below=0.5, residual=None, polar="svd", fallback=NONE
    ),
    "sumo, orthogonal": sumo_optax.scale_by_sumo(3, residual="orthogonal", fallback=NONE),
    "mofasgd": sumo_optax.scale_by_mofasgd(3, complement=0.5, inverse_limit=3.0, fallback=NONE),
    "in a subspace": sumo_optax.scale_in_subspace(
        TRACE, 3, refresh_every=4, transport=True, fallback=NONE
    ),
    "online subspace descent": sumo_optax.scale_by_online_subspace_descent(
        3, inner=TRACE, basis_optimizer=TRACE, fallback=NONE
    ),
}


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_promotion(tx, dtype):
    """Types are all that it is about, so nothing is compiled."""
    params = jax.tree.map(lambda x: x.astype(dtype), small_params())
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert new_state.basis["dense"]["kernel"].dtype == jnp.float32
