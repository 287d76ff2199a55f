"""Gradients of a group, stored as they are and transposed: the numbers of each matrix by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from sumo_optax._gradient import ProjectedGradients, Update, WholeGradients

RANK, M, N = 3, 10, 6
BATCHES = [(1,), (2,), (1,)]  # of three leaves
B = 4
# float32 sums of 10 products of numbers of about 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

rng = np.random.default_rng(0)
G, Q, V, X = (
    rng.normal(size=(B, *shape)).astype(np.float32)
    for shape in ((M, N), (M, RANK), (N, RANK), (RANK, N))
)


ORIENTATIONS = {"as they are": [False] * 3, "transposed": [True] * 3, "mixed": [False, True, True]}


@pytest.fixture(params=ORIENTATIONS.values(), ids=ORIENTATIONS)
def transposed(request):
    return request.param


def in_leaves(stack, transposed):
    leaves = zip((stack[:1], stack[1:3], stack[3:]), transposed, strict=True)
    return [jnp.asarray(np.swapaxes(x, -1, -2) if turned else x) for x, turned in leaves]


def stored(G, transposed):
    leaves = in_leaves(G, transposed)
    batches = [x.shape[:-2] for x in leaves]
    return WholeGradients(batches, transposed, leaves[0].dtype, None, leaves)


def test_products_are_those_of_each_matrix(transposed):
    gradients = stored(G, transposed)
    assert gradients.shape == (M, N)
    np.testing.assert_allclose(gradients.left_product(Q), np.swapaxes(Q, 1, 2) @ G, **TOLERANCE)
    np.testing.assert_allclose(gradients.right_product(V), G @ V, **TOLERANCE)


def test_bfloat16_is_read_as_it_is_and_summed_in_float32(transposed):
    gradients = stored(jnp.asarray(G, jnp.bfloat16), transposed)
    found = gradients.left_product(Q)
    assert found.dtype == jnp.float32
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(found, np.swapaxes(rounded(Q), 1, 2) @ rounded(G), **TOLERANCE)


@pytest.mark.parametrize("size", [1e-30, 1, 1e30])
def test_norms_do_not_overflow(transposed, size):
    gradients = stored(np.float32(size) * G, transposed)
    whole = size * np.linalg.norm(G.astype(np.float64), axis=(1, 2), keepdims=True)
    columns = size * np.linalg.norm(G.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(gradients.norms(scale=size * X), whole, rtol=1e-5)
    np.testing.assert_allclose(gradients.column_norms(scale=size * X), columns, rtol=1e-5)


def test_singular_vectors_and_zeros(transposed):
    some = G * np.array([1, 0, 1, 1], np.float32)[:, None, None]
    gradients = stored(some, transposed)
    np.testing.assert_array_equal(gradients.are_zero().ravel(), [False, True, False, False])
    U = gradients.left_singular_vectors(RANK)
    for i in (0, 2, 3):
        expected = np.linalg.svd(some[i])[0][:, :RANK]
        np.testing.assert_allclose(U[i] @ U[i].T, expected @ expected.T, **TOLERANCE)


@pytest.mark.parametrize("weights", [None, rng.normal(size=(B, 1, N)).astype(np.float32)])
def test_updates_are_multiplied_out_either_way_and_0_where_not_good(transposed, weights):
    good = np.array([True, True, False, True])[:, None, None]
    expected = np.where(good, Q @ X if weights is None else Q @ X + G * weights, 0)
    found = stored(G, transposed).updates(Update(Q, X, weights), jnp.asarray(good))
    for x, y in zip(found, in_leaves(expected, transposed), strict=True):
        np.testing.assert_allclose(x, y, **TOLERANCE)


def test_a_function_of_an_update_sees_all_of_it_in_float32(transposed):
    D = Update(
        Q, X, jnp.ones((B, 1, N)), lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) * x
    )
    expected = Q @ X + G
    expected = np.linalg.norm(expected, axis=(1, 2), keepdims=True) * expected
    found = stored(G, transposed).updates(D, None)
    for x, y in zip(found, in_leaves(expected, transposed), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_projected_gradients_refuse_what_they_do_not_hold():
    held = ProjectedGradients(
        BATCHES, [False] * 3, jnp.float32, None, [None] * 3, jnp.asarray(X), None, (M, N), "w"
    )
    np.testing.assert_array_equal(held.left_product(Q), X)
    for read in (
        lambda: held.right_product(V),
        lambda: held.norms(scale=X),
        lambda: held.column_norms(scale=X),
        held.are_zero,
        lambda: held.left_singular_vectors(2),
        lambda: held.updates(Update(Q, X, jnp.ones((B, 1, N))), None),
    ):
        with pytest.raises(ValueError, match="the gradient of w is projected, but this optimizer"):
            read()
