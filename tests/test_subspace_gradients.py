"""Projected gradients are the projections of the gradients, however a loss uses its weights."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common.llama import Llama, LlamaConfig
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import sumo_optax

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import collectives

TALL, WIDE = (24, 8), (8, 24)
HEADS = (12, 3, 4)  # d, heads, head_dim
RANK = 4
SPECS = {
    "heads_in": MuonDimensionNumbers((0,), (1, 2)),
    "heads_out": MuonDimensionNumbers((0, 1), (2,)),
    "stack": MuonDimensionNumbers((1,), (2,)),
    "filter": MuonDimensionNumbers((0, 1, 2), (3,)),
}


def through_layers(stack, x, body):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, stack)[0]


# Each uses the weight `w` in another way; x has whatever axes it takes.
USES = {
    "tall": (TALL, (5, 24), lambda w, x: x @ w),
    "wide": (WIDE, (5, 8), lambda w, x: x @ w),
    "three axes of x": (TALL, (2, 5, 24), lambda w, x: x @ w),
    "a vector": (TALL, (24,), lambda w, x: x @ w),
    "transposed": (TALL, (5, 8), lambda w, x: x @ w.T),
    "from the left": (WIDE, (24, 5), lambda w, x: w @ x),
    "into heads": (HEADS, (5, 12), lambda w, x: jnp.einsum("td,dhk->thk", x, w)),
    "into heads, reshaped": (HEADS, (5, 12), lambda w, x: x @ w.reshape(12, 12)),
    "out of heads": ((3, 4, 12), (5, 3, 4), lambda w, x: jnp.einsum("thk,hkd->td", x, w)),
    "out of heads, axes swapped": (
        (3, 4, 12),
        (5, 4, 3),
        lambda w, x: jnp.einsum("tkh,hkd->dt", x, w),
    ),
    "some axes summed over": (HEADS, (5, 3, 4), lambda w, x: jnp.einsum("thk,dhk->thd", x, w)),
    "twice, once elementwise": (TALL, (5, 24), lambda w, x: x @ jnp.tanh(w) + x @ w),
    "half precision": (TALL, (5, 24), lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16")),
    "called": (TALL, (5, 24), lambda w, x: jax.jit(jnp.matmul)(x, w)),
    "checkpointed": (TALL, (5, 24), lambda w, x: jax.checkpoint(lambda w: jnp.sin(x @ w))(w)),
    "mapped": (TALL, (2, 5, 24), lambda w, x: jax.vmap(lambda x: x @ w)(x)),
    "in a loop": (
        (8, 8),
        (5, 8),
        lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x),
    ),
    "in a branch": (
        TALL,
        (5, 24),
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: 2 * x @ w),
    ),
    "stacked layers": ((3, 8, 8), (5, 8), lambda w, x: through_layers(w, x, jnp.matmul)),
    "stacked, checkpointed": (
        (3, 8, 8),
        (5, 8),
        lambda w, x: through_layers(w, x, jax.checkpoint(lambda x, w: jnp.tanh(x @ w))),
    ),
    "experts": ((3, 8, 12), (3, 5, 8), lambda w, x: jnp.einsum("etd,edf->etf", x, w)),
    "convolution": (
        (3, 3, 4, 8),
        (2, 6, 6, 4),
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
    ),
}


def spec_of(shape):
    kind = {HEADS: "heads_in", (3, 4, 12): "heads_out"}.get(shape)
    kind = kind or {3: "stack", 4: "filter"}.get(len(shape))
    return SPECS[kind] if kind else MuonDimensionNumbers((0,), (1,))


QUICK = {"wide", "twice, once elementwise"}


@pytest.mark.parametrize(
    "use", [pytest.param(u, marks=() if u in QUICK else pytest.mark.slow) for u in USES]
)
def test_equal_to_projections_of_whole_gradients(use):
    shape, x_shape, forward = USES[use]
    spec = spec_of(shape)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], shape)}
    x = jax.random.normal(keys[1], x_shape)
    loss = lambda params, x: jnp.mean(jnp.sin(forward(params["w"], x).astype(jnp.float32)))
    tx = sumo_optax.scale_by_mofasgd(RANK, weight_dimension_numbers=spec)
    _, state = tx.update({"w": jax.random.normal(keys[2], shape)}, tx.init(params), params)

    find = sumo_optax.subspace_value_and_grad(loss, weight_dimension_numbers=spec)
    value, projected = jax.jit(find)(params, state, x)
    y, whole = jax.value_and_grad(loss)(params, x)

    G = to_matrices(np.asarray(whole["w"], np.float64), spec)
    Q, V = np.asarray(state.basis["w"]), np.asarray(state.row_basis["w"])
    # bfloat16 has eight bits, and rounds the two orders of the products differently.
    tolerance = 2e-2 if use == "half precision" else 1e-5
    near = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=tolerance * np.abs(G).max() * G.shape[-1] ** 0.5
    )
    assert np.abs(G).max() > 1e-4
    # The loss is a mean of numbers of size one.
    np.testing.assert_allclose(value, y, rtol=0, atol=1e-2 if use == "half precision" else 1e-6)
    near(projected["w"].left, Q.swapaxes(-1, -2) @ G)
    near(projected["w"].right, G @ V)
    assert projected["w"].shape == shape


def to_matrices(G, spec):
    rows, columns = spec
    batch = [a for a in range(G.ndim) if a not in (*rows, *columns)]
    sizes = [int(np.prod([G.shape[a] for a in axes])) for axes in spec]
    G = G.transpose(*batch, *rows, *columns).reshape(*[G.shape[a] for a in batch], *sizes)
    return G if sizes[0] >= sizes[1] else G.swapaxes(-1, -2)


def byte_llama(scan_layers=False, width=32):
    config = LlamaConfig(
        vocab=64, width=width, hidden=48, heads=4, layers=2, scan_layers=scan_layers
    )
    model = Llama(config, nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return nnx.to_pure_dict(params), loss


def tokens_of(step, batch=4):
    return jax.random.randint(jax.random.key(step), (batch, 17), 0, 64)


# Each with the steps between two refreshes, 0 for none.
OPTIMIZERS = {
    "sumo": (
        lambda: sumo_optax.sumo(
            1e-2,
            8,
            basis="randomized_svd",
            refresh_every=10,
            residual=None,
            consistent_rms=0.2,
            weight_decay=0.1,
        ),
        10,
    ),
    "sumo, followed every 10 steps": (
        lambda: sumo_optax.sumo(1e-2, 8, refresh_every=10, residual=None, consistent_rms=0.2),
        10,
    ),
    "mofasgd": (lambda: sumo_optax.mofasgd(1e-2, 8), 0),
    "galore": (
        lambda: optax.chain(
            sumo_optax.scale_in_subspace(optax.scale_by_adam(), 8, basis="svd", refresh_every=10),
            optax.scale_by_learning_rate(1e-2),
        ),
        10,
    ),
    "galore, short side": (
        lambda: optax.chain(
            sumo_optax.scale_in_subspace(
                optax.scale_by_adam(), 8, basis="svd", refresh_every=10, side="short"
            ),
            optax.scale_by_learning_rate(1e-2),
        ),
        10,
    ),
}


# On 4 windows a step training is chaotic: it makes 1e-5 of float32's roundings in 50 steps, while
# in float64 nothing but a difference of the mathematics could come up to 1e-12.
@pytest.mark.slow
@pytest.mark.parametrize(
    "scan_layers, dtype, batch, bound",
    [(False, "float32", 16, 1e-5), (True, "float32", 16, 1e-5), (False, "float64", 4, 1e-12)],
    ids=["unrolled", "stacked", "unrolled in float64"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectories_equal_the_ordinary_ones(name, scan_layers, dtype, batch, bound):
    with jax.enable_x64(dtype == "float64"):
        compare_trajectories(name, scan_layers, dtype, batch, bound)


def compare_trajectories(name, scan_layers, dtype, batch, bound):
    make, every = OPTIMIZERS[name]
    tx = make()
    params, loss = byte_llama(scan_layers)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    ways = {
        "ordinary": lambda params, state, tokens, full: jax.value_and_grad(loss)(params, tokens),
        "projected": sumo_optax.subspace_value_and_grad(loss),
    }
    ends = {}
    for way, value_and_grad in ways.items():

        @functools.partial(jax.jit, static_argnames="full")
        def train_step(params, state, tokens, full, value_and_grad=value_and_grad):
            _, grads = value_and_grad(params, state, tokens, full=full)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        p, s = params, tx.init(params)
        for t in range(50):
            full = t % every == 0 if every else t == 0
            p, s = train_step(p, s, tokens_of(t, batch), full)
        ends[way] = p
    moved = max(
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (params, p)), strict=True)
    )
    assert moved > 0.1
    for a, b in zip(*map(jax.tree.leaves, ends.values()), strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(a - b) < bound * np.linalg.norm(a)


@pytest.mark.slow
def test_linen_layers_need_not_know():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)(x)
            return linen.remat(linen.Dense)(24)(x)

    model, x = Model(), jax.random.normal(jax.random.key(0), (2, 6, 16))
    params = model.init(jax.random.key(1), x)["params"]
    loss = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
    tx = sumo_optax.scale_by_sumo(RANK, basis="svd", residual=None)
    grads = jax.grad(loss)(params, x)
    _, state = tx.update(grads, tx.init(params), params)
    _, projected = jax.jit(sumo_optax.subspace_value_and_grad(loss))(params, state, x)
    kernel = lambda tree: tree["CheckpointDense_0"]["kernel"]  # 16 x 24: the basis is of its rows
    np.testing.assert_allclose(
        kernel(projected).right, kernel(grads).T @ kernel(state.basis), atol=1e-6
    )
    # Biases have whole gradients.
    bias = lambda tree: tree["CheckpointDense_0"]["bias"]
    np.testing.assert_allclose(bias(projected), bias(grads), atol=1e-6)


def test_whole_gradients_are_not_formed():
    """Tokens t, a matrix m x n: forward and dx cost 2 t m n each, and the rest is thin."""
    m, n, t, r = 256, 192, 512, 8
    params = {"in": jnp.ones((m, n)), "out": jnp.ones((n, m))}
    loss = lambda params, x: jnp.sum(jnp.sin(x @ params["in"]) @ params["out"])
    tx = sumo_optax.scale_by_sumo(r, basis="svd", side="long", residual=None)
    x = jax.ShapeDtypeStruct((t, m), jnp.float32)
    find = jax.jit(sumo_optax.subspace_value_and_grad(loss), static_argnames="full")
    compiled = find.lower(params, jax.eval_shape(tx.init, params), x).compile()
    whole = find.lower(params, jax.eval_shape(tx.init, params), x, full=True).compile()
    products = lambda program: program.cost_analysis()["flops"]
    # Two matrices forward, dx of the second, two thin gradients; sin and cos are some per cent.
    thin = 3 * 2 * t * m * n + 2 * 2 * t * r * (m + n)
    assert products(compiled) < 1.05 * thin < 0.75 * products(whole)
    returned = compiled.memory_analysis().output_size_in_bytes
    assert returned < 1.01 * 4 * 2 * r * n + 64


@pytest.mark.slow
def test_micro_batches_add_up_in_the_subspace():
    params, loss = byte_llama()
    tx = sumo_optax.scale_by_sumo(8, basis="randomized_svd", residual=None)
    find = sumo_optax.subspace_value_and_grad(loss)
    tokens = tokens_of(0, batch=8)
    state = tx.init(params)
    _, state = jax.jit(tx.update)(jax.grad(loss)(params, tokens), state, params)

    @jax.jit
    def accumulated(params, state, tokens):
        def add(total, part):
            return jax.tree.map(lambda a, b: a + b / 4, total, find(params, state, part)[1]), None

        parts = tokens.reshape(4, 2, -1)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(find, params, state, parts[0])[1])
        return jax.lax.scan(add, zero, parts)[0]

    total = accumulated(params, state, tokens)
    gate = total["layers"][0]["mlp"]["gate_proj"]["kernel"]
    assert gate.left is None and gate.right.shape == (48, 8)
    for a, b in zip(*map(jax.tree.leaves, (total, find(params, state, tokens)[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_clipping_is_by_the_norm_of_what_is_kept():
    tx = sumo_optax.scale_by_sumo(2, basis="svd", residual=None)
    params = {"w": {"kernel": jnp.eye(8, 4)}}
    _, state = tx.update(params, tx.init(params), params)
    loss = lambda params, x: jnp.sum(x @ params["w"]["kernel"])
    _, grads = sumo_optax.subspace_value_and_grad(loss)(params, state, jnp.ones((3, 8)))
    clip = optax.clip_by_global_norm(1e-3)
    clipped, _ = clip.update(grads, clip.init(params))
    np.testing.assert_allclose(optax.tree.norm(clipped), 1e-3, rtol=1e-6)
    updates, _ = tx.update(clipped, state, params)
    assert updates["w"]["kernel"].shape == (8, 4)


def test_data_parallel_steps_reduce_projected_gradients_alone():
    """m n = 128 x 64 at rank 8: r / m of the bytes, as 8 x 64 numbers to 128 x 64."""
    m, n, r = 128, 64, 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": {"kernel": jnp.ones((m, n))}}
    loss = lambda params, x: jnp.mean(jnp.sin(x @ params["w"]["kernel"]))
    tx = sumo_optax.scale_by_sumo(r, basis="svd", side="long", residual=None)
    x = jax.ShapeDtypeStruct((64, m), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    one = lambda tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())), tree
    )
    find = jax.jit(sumo_optax.subspace_value_and_grad(loss), static_argnames="full")
    state = jax.eval_shape(tx.init, params)

    def reduced(full):
        hlo = find.lower(one(params), one(state), x, full=full).compile().as_text()
        always, sometimes = collectives.collectives(hlo)
        assert not sometimes and {kind for kind, _ in always} == {"all-reduce"}
        return sum(sum(sizes) for _, sizes in always) - 1  # the loss

    assert reduced(full=True) == m * n
    assert reduced(full=False) <= 1.05 * r / m * m * n


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda: sumo_optax.scale_by_sumo(2),
            "reads the norms of its columns, for which it needs whole",
        ),
        (
            lambda: sumo_optax.scale_by_sumo(2, refresh_every=1),
            "the norms of its columns",
        ),
        (
            lambda: sumo_optax.scale_by_sumo(2, basis="svd", residual="gradient"),
            "the gradient of w/kernel is projected, but this optimizer reads the part outside",
        ),
        (
            lambda: sumo_optax.scale_by_sumo(2, basis="svd", residual="orthogonal"),
            "reads the part outside the subspace, for which it needs whole gradients",
        ),
        (
            lambda: sumo_optax.scale_by_sumo(2, basis="svd", residual=None, refresh_below=0.1),
            "reads its norm",
        ),
        (lambda: sumo_optax.scale_by_online_subspace_descent(2), "reads its norm"),
        (
            lambda: sumo_optax.scale_by_mofasgd(2, complement=1.0),
            "reads the part outside the subspace",
        ),
    ],
)
def test_optimizers_that_read_more_refuse(make, error):
    tx, params = make(), {"w": {"kernel": jnp.ones((8, 4))}}
    loss = lambda params: jnp.sum(params["w"]["kernel"])
    state = tx.init(params)
    _, grads = sumo_optax.subspace_value_and_grad(loss)(params, state)
    with pytest.raises(ValueError, match=error):
        tx.update(grads, state, params)


def test_a_projected_gradient_of_no_matrix_is_refused():
    tx = sumo_optax.scale_by_mofasgd(2)
    params = {"w": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    projected = sumo_optax.ProjectedGradient(jnp.ones((2, 4)), None, (4,))
    grads = {"w": params["w"] | {"bias": projected}}
    with pytest.raises(ValueError, match="of w/bias is projected, but weight_dimension_numbers"):
        tx.update(grads, tx.init(params), params)


def test_parameters_are_needed_and_a_basis():
    tx, params = sumo_optax.scale_by_mofasgd(2), {"w": {"kernel": jnp.ones((8, 4))}}
    loss = lambda params: jnp.sum(params["w"]["kernel"])
    state = tx.init(params)
    _, grads = sumo_optax.subspace_value_and_grad(loss)(params, state)
    with pytest.raises(ValueError, match="so `update` needs the parameters"):
        tx.update(grads, state)
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match="has no basis"):
        sumo_optax.subspace_value_and_grad(loss)(params, adam.init(params))
