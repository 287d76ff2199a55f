"""The polar factor and the orthonormal bases against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sumo_optax
from sumo_optax import _linalg

EPS32 = np.finfo(np.float32).eps
SHAPES = [(40, 12), (12, 40), (24, 24), (6, 200), (1, 30), (30, 1), (1, 1)]
EXACT = ["svd", "auto"]
# Of min(shape) singular values the largest is 1 and the least one over the condition number c.
SPECTRA = {
    "even on a log scale": lambda r, c: np.logspace(0, -np.log10(c), r),
    "one large": lambda r, c: np.where(np.arange(r) == 0, 1, 1 / c),
    "one small": lambda r, c: np.where(np.arange(r) == r - 1, 1 / c, 1),
    "three clusters": lambda r, c: c ** (-(3 * np.arange(r) // r) / 2),
}


def with_condition(shape, condition, seed=0, spectrum="even on a log scale"):
    rng = np.random.default_rng(seed)
    r = min(shape)
    U, V = (np.linalg.qr(rng.normal(size=(k, r)))[0] for k in shape)
    return ((U * SPECTRA[spectrum](r, float(condition))) @ V.T).astype(np.float32)


def error(O, X):
    reference = oracles.polar(X)
    return np.linalg.norm(np.asarray(O, np.float64) - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor_is_exact(shape, method):
    X = with_condition(shape, 10)
    # A backward error of 10 roundings, amplified by the condition number.
    assert error(sumo_optax.polar_factor(X, method=method), X) < 10 * 10 * EPS32


@pytest.mark.parametrize("r", [8, 32, 128, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("condition", [1.5, 30, 1e3, 1e6])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_products_are_as_exact_as_the_svd(r, condition, spectrum):
    X = with_condition((r, 4 * r), condition, spectrum=spectrum)
    plain = error(sumo_optax.polar_factor(X, method="svd"), X)
    assert error(sumo_optax.polar_factor(X), X) < 2 * plain


@pytest.mark.parametrize("condition", [30, 1e3, 1e6])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_products_are_exact_for_square_matrices(condition, spectrum):
    X = with_condition((64, 64), condition, spectrum=spectrum)
    plain = error(sumo_optax.polar_factor(X, method="svd"), X)
    # With no rows outside its own space the SVD is exact to rounding where one value is small;
    # products are so to 64 roundings.
    assert error(sumo_optax.polar_factor(X), X) < max(2 * plain, 64 * EPS32)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (24, 24), (128, 512)])
@pytest.mark.parametrize("rank", [1, 5])
def test_polar_factor_drops_what_is_rounding_noise(shape, rank, method):
    rng = np.random.default_rng(1)
    X = (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))).astype(np.float32)
    O = np.asarray(sumo_optax.polar_factor(X, method=method), np.float64)
    # The kept directions have a condition number below 10, but seven rounds of products each turn
    # them by some 20 roundings; a dropped one that is not adds 1.
    assert error(O, X) < (100 if method == "svd" else 200) * EPS32
    assert abs(np.linalg.norm(O) ** 2 - rank) < 1e-3


@pytest.mark.parametrize("method", [*EXACT, "newton_schulz"])
def test_polar_factor_of_zero_is_zero(method):
    O = sumo_optax.polar_factor(jnp.zeros((3, 8)), method=method)
    np.testing.assert_array_equal(O, np.zeros((3, 8)))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_polar_factor_does_not_depend_on_scale(scale, method):
    X = with_condition((8, 40), 10)
    O = sumo_optax.polar_factor((scale * X).astype(np.float32), method=method)
    assert error(O, X) < 100 * EPS32


def test_polar_factor_is_batched_and_keeps_the_dtype():
    X = np.stack([with_condition((6, 20), 10, seed) for seed in range(4)]).reshape(2, 2, 6, 20)
    O = sumo_optax.polar_factor(X)
    for i in np.ndindex(2, 2):
        assert error(O[i], X[i]) < 100 * EPS32
    half = sumo_optax.polar_factor(jnp.asarray(X, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), O, atol=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    "polar",
    [
        sumo_optax.polar_factor,
        lambda X: _linalg._by_products(jnp.asarray(X), drop=True, product=jnp.matmul, unroll=3),
    ],
    ids=["one by one as on a CPU", "together as on a GPU"],
)
def test_a_stack_has_matrices_of_all_kinds(polar):
    X = np.stack([with_condition((16, 80), condition) for condition in (10, 1e5, 60, 1, 1)])
    X[3], X[4, 2, 3] = 0, np.nan
    O, plain = np.asarray(polar(X)), sumo_optax.polar_factor(X[:3], method="svd")
    assert all(error(o, x) < 2 * error(p, x) for o, p, x in zip(O, plain, X, strict=False))
    np.testing.assert_array_equal(O[3], 0)
    assert not np.isfinite(O[4]).all()


@pytest.mark.parametrize("tries", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_polar_factors_of_random_matrices_are_finite_and_not_above_one(tries):
    """Singular values spread over nine orders of magnitude, rows of 0, any scale."""
    rng = np.random.default_rng(0)
    rows = 10 ** rng.uniform(-9, 0, size=(tries, 8, 1)) * (rng.uniform(size=(tries, 8, 1)) < 0.9)
    scale = 10 ** rng.uniform(-28, 28, size=(tries, 1, 1))
    X = (scale * rows * rng.normal(size=(tries, 8, 12))).astype(np.float32)
    O = np.asarray(sumo_optax.polar_factor(X), np.float64)
    # Rounding of products of 12 numbers; NaN fails too.
    assert np.linalg.svd(O, compute_uv=False).max() < 1 + 20 * EPS32


def test_polar_factor_in_float64():
    with jax.enable_x64(True):
        for condition in (1.5, 30, 1e4):
            X = np.float64(with_condition((16, 64), condition))
            U, _, Vt = np.linalg.svd(X, full_matrices=False)
            O = sumo_optax.polar_factor(X)
            # A backward error of 40 roundings, amplified by the condition number.
            assert np.linalg.norm(O - U @ Vt) < 40 * np.finfo(float).eps * condition


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4)])
def test_polar_factor_differentiates(shape):
    with jax.enable_x64(True):
        X, dX, weight = np.random.default_rng(3).normal(size=(3, 2, *shape))
        of = lambda X: jnp.sum(weight * sumo_optax.polar_factor(X))
        by_svd = lambda X: jnp.sum(weight * sumo_optax.polar_factor(X, method="svd"))
        # Central differences with steps of 1e-6: truncation 1e-12, rounding 1e-10 of values near 1.
        difference = (of(X + 1e-6 * dX) - of(X - 1e-6 * dX)) / 2e-6
        np.testing.assert_allclose(jax.jvp(of, (X,), (dX,))[1], difference, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(jax.grad(of)(X), jax.grad(by_svd)(X), atol=1e-10)


def test_the_derivative_of_a_deficient_matrix_is_finite():
    X = np.stack([np.zeros((4, 9), np.float32), np.ones((4, 9), np.float32)])
    assert np.isfinite(jax.grad(lambda X: jnp.sum(sumo_optax.polar_factor(X) * X))(X)).all()


@pytest.mark.parametrize("method", ["auto", "newton_schulz"])
def test_only_exact_polar_factors_want_full_products(method):
    """Inside of a step as well, where all products of small matrices are full ones."""
    with jax.default_matmul_precision("highest"):
        of = functools.partial(sumo_optax.polar_factor, method=method)
        program = str(jax.make_jaxpr(of)(jnp.ones((4, 8))))
    assert program.count("dot_general") > 5
    assert ("Precision.HIGHEST" in program) == (method == "auto")


def test_newton_schulz_is_muons_five_steps():
    X = with_condition((8, 40), 1e3)
    O = sumo_optax.polar_factor(X, method="newton_schulz")
    np.testing.assert_allclose(O, oracles.newton_schulz(X.astype(np.float64)), atol=1e-4)
    assert error(O, X) > 0.2, "it is far from the polar factor, which is the point of SUMO"


def test_polar_factor_refuses():
    with pytest.raises(ValueError, match=r"\(\.\.\., m, n\), got shape \(3,\)"):
        sumo_optax.polar_factor(jnp.ones(3))
    with pytest.raises(ValueError, match="one of .*'svd'.* got 'qr'"):
        sumo_optax.polar_factor(jnp.ones((3, 3)), method="qr")


def test_polar_factor_of_an_empty_batch():
    assert sumo_optax.polar_factor(jnp.ones((0, 3, 4))).shape == (0, 3, 4)


@pytest.mark.parametrize("rank", [0, 1, 5, 16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthonormal_columns_are_that_and_span_the_input(rank, scale):
    rng = np.random.default_rng(2)
    Y = rng.normal(size=(64, rank)) @ rng.normal(size=(rank, 16))
    completion = np.linalg.qr(rng.normal(size=(64, 16)))[0]
    Q = _linalg.orthonormal_columns((scale * Y).astype(np.float32), completion.astype(np.float32))
    Q = np.asarray(Q, np.float64)
    np.testing.assert_allclose(Q.T @ Q, np.eye(16), atol=1e-5)  # 3 passes: rounding of 16 products
    # The completion enters at 100 roundings of a matrix with condition number about 10.
    outside = Y - Q @ (Q.T @ Y)
    assert np.linalg.norm(outside) <= 1000 * EPS32 * np.linalg.norm(Y)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_svd_of_any_scale(scale):
    X = np.float32(scale) * with_condition((8, 40), 10).astype(np.float32)
    U, s, V = (np.asarray(x[0], np.float64) for x in _linalg.svd(jnp.asarray(X)[None]))
    assert U.shape == (8, 8) and V.shape == (40, 8)
    np.testing.assert_allclose((U * s) @ V.T, X, atol=1e-5 * scale)
    np.testing.assert_allclose(s[0], scale * np.logspace(0, -1, 8), rtol=1e-5)


def test_column_norms_do_not_overflow():
    X = jnp.array([[3e30, 0.0, 3e-30], [4e30, 0.0, 4e-30]])
    np.testing.assert_allclose(_linalg.column_norms(X), [[5e30, 0, 5e-30]], rtol=1e-6)
    assert jax.jit(_linalg.column_norms)(X).dtype == jnp.float32
