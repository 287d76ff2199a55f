"""A gradient and the update it gives, stored as they are and transposed: the same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from sumo_optax._gradient import Update, WholeGradient, left_product, right_product

RANK, M, N = 3, 10, 6
# float32 sums of 10 products of numbers of about 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

rng = np.random.default_rng(0)
G, Q, V, X = (
    rng.normal(size=shape).astype(np.float32) for shape in ((M, N), (M, RANK), (N, RANK), (RANK, N))
)


@pytest.fixture(params=[False, True], ids=["as it is", "transposed"])
def transposed(request):
    return request.param


def stored(G, transposed):
    return WholeGradient(jnp.asarray(G.T if transposed else G), transposed)


def test_products_are_those_of_the_matrix(transposed):
    gradient = stored(G, transposed)
    assert gradient.shape == (M, N)
    np.testing.assert_array_equal(gradient.matrix, G)
    np.testing.assert_allclose(left_product(Q, gradient), Q.T @ G, **TOLERANCE)
    np.testing.assert_allclose(right_product(gradient, V), G @ V, **TOLERANCE)


@pytest.mark.parametrize("size", [1e-30, 1, 1e30])
def test_norms_do_not_overflow(transposed, size):
    gradient = stored(np.float32(size) * G, transposed)
    whole = size * np.linalg.norm(G.astype(np.float64))
    columns = size * np.linalg.norm(G.astype(np.float64), axis=0)
    np.testing.assert_allclose(gradient.norm(scale=size * X), whole, rtol=1e-5)
    np.testing.assert_allclose(gradient.column_norms(scale=size * X), columns, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, np.arange(N, dtype=np.float32)])
def test_an_update_is_multiplied_out_either_way(transposed, weights):
    expected = Q @ X if weights is None else Q @ X + G * weights
    D = Update(Q, X, weights).of(stored(G, transposed), transposed=transposed)
    np.testing.assert_allclose(D, expected.T if transposed else expected, **TOLERANCE)
