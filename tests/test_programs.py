"""What a step is as a program: its size, what other platforms are given, its precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import every_transformation, every_transformation_slowly, like, small_params

import sumo_optax

D, F, R = 64, 96, 16


def layers(count):
    """The seven projections of each layer of a LLaMA, as shapes."""
    block = {name: (D, D) for name in "qkvo"} | {"gate": (D, F), "up": (D, F), "down": (F, D)}
    leaf = lambda shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return {f"layers_{i}": {k: leaf(shape) for k, shape in block.items()} for i in range(count)}


def traced(tx, params):
    return jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)


def equations(jaxpr):
    """All of a program's, those inside of others too."""
    inside = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params)]
    programs = [getattr(x, "jaxpr", x) for x in inside]
    return len(jaxpr.eqns) + sum(equations(x) for x in programs if hasattr(x, "eqns"))


def test_a_program_has_a_bounded_number_of_equations():
    """56 matrices had 21,700 when each of them was a program of its own."""
    assert equations(traced(sumo_optax.sumo(1e-2, R), layers(8)).jaxpr.jaxpr) <= 3500


@every_transformation
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_program_is_that_of_the_platform_it_is_lowered_for(make, platform):
    """No call of LAPACK, which a CPU alone has, and no factorisation but MoFaSGD's own SVD."""
    lowered = traced(make(rank=R), layers(2)).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert "lapack" not in text
    if not hasattr(jax.eval_shape(make(rank=R).init, layers(1)), "singular_values"):
        assert not re.search("eigh|syevd|svd|gesvd|cholesky|potrf|geqrf|qr_", text, re.I)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "tx",
    [
        sumo_optax.scale_by_sumo(R),
        sumo_optax.scale_by_sumo(R, basis="randomized_svd"),
        sumo_optax.scale_by_mofasgd(R),
        sumo_optax.scale_by_online_subspace_descent(R),
        sumo_optax.scale_in_subspace(optax.scale_by_adam(), R, transport=True),
    ],
    ids=["sumo", "sumo_periodic", "mofasgd", "online_subspace_descent", "scale_in_subspace"],
)
def test_products_of_small_matrices_are_at_full_precision(tx, platform):
    """GPUs and TPUs give less by default. Products with m x n operands are the user's to choose.

    Those of a stack go one by one on a TPU, which takes ten times as long to compile them batched.
    """
    text = traced(tx, layers(2)).lower(lowering_platforms=(platform,)).as_text()
    whole = {f"{a}x{b}" for a, b in ((D, D), (D, F), (F, D))}
    small = 0
    for line in text.splitlines():
        if "stablehlo.dot_general" not in line:
            continue
        shapes = [re.sub(r"^1x|xf32$", "", x) for x in re.findall(r"tensor<([^>]*)>", line)]
        if whole.isdisjoint(shapes):
            small += 1
            assert "HIGHEST" in line, line
            assert platform != "tpu" or "batching_dims" not in line, line
    assert small


@every_transformation_slowly
def test_no_axis_is_added_without_a_word(make):
    """`jax_numpy_rank_promotion="raise"`, as some users have it."""
    params, tx = small_params(), make()
    with jax.numpy_rank_promotion("raise"):
        jax.jit(tx.update)(like(params, 0), tx.init(params), params)


def test_an_update_differentiates():
    """Through the polar factor and a move of the basis, against central differences."""
    with jax.enable_x64(True):
        G = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 8)))[0]}
        tangent = like(G, 1)
        tx = sumo_optax.scale_by_sumo(4, refresh_every=1)
        _, state = jax.jit(tx.update)(like(G, 2), tx.init(G))

        @jax.jit
        def loss(G):
            updates, new = tx.update(G, state)
            return jnp.sum(updates["kernel"] ** 3) + jnp.sum(new.basis["kernel"] ** 3)

        ahead, behind = (
            loss({"kernel": G["kernel"] + step * tangent["kernel"]}) for step in (1e-6, -1e-6)
        )
        # Truncation 1e-12 and rounding 1e-10 of numbers near 1.
        expected = (ahead - behind) / 2e-6
        along = jnp.vdot(jax.grad(loss)(G)["kernel"], tangent["kernel"])
        np.testing.assert_allclose(along, expected, rtol=1e-6)
