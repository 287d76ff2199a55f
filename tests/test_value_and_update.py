"""Updates inside the backward pass are those of the ordinary step, on any model and mesh."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contracts import TABLE, assert_close, assert_equal
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Axes

import sumo_optax

VOCAB, WIDTH, HIDDEN, LAYERS = 16, 8, 16, 4
normal = lambda seed, *shape: 0.3 * jax.random.normal(jax.random.key(seed), shape)


def batches(steps):
    rows = jax.random.randint(jax.random.key(0), (steps, 8, 9), 0, VOCAB)
    return list(rows)


def next_token_loss(logits, x):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], x[:, 1:]).mean()


def block(x, w):
    h = x * w["norm"]["scale"]
    return x + jnp.tanh(h @ w["up"]["kernel"]) @ w["down"]["kernel"]


def layer(seed, *stack):
    return {
        "norm": {"scale": jnp.ones((*stack, WIDTH))},
        "up": {"kernel": normal(seed, *stack, WIDTH, HIDDEN)},
        "down": {"kernel": normal(seed + 1, *stack, HIDDEN, WIDTH)},
    }


def tables():
    return {
        "embed": {"embedding": normal(8, VOCAB, WIDTH)},
        "head": {"kernel": normal(9, WIDTH, VOCAB)},
    }


def through(params, x, one, checkpoint=False):
    """Embeds, scans over layers and gives the loss; the loop has outputs of its own."""
    one = jax.checkpoint(one) if checkpoint else one
    h = params["embed"]["embedding"][x]
    h, sizes = jax.lax.scan(lambda h, w: (one(h, w), jnp.mean(h**2)), h, params["layers"])
    return next_token_loss(h @ params["head"]["kernel"], x) + 1e-3 * jnp.mean(sizes)


def scan():
    return tables() | {"layers": layer(0, LAYERS)}, functools.partial(through, one=block)


def checkpointed():
    return scan()[0], functools.partial(through, one=block, checkpoint=True)


def half_precision():
    """Weights are cast before the loop."""

    def loss(params, x):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return through(params, x, block).astype(jnp.float32)

    return scan()[0], loss


def separate():
    params = tables() | {"layers": {str(i): layer(2 * i) for i in range(LAYERS)}}

    def loss(params, x):
        h = params["embed"]["embedding"][x]
        for w in params["layers"].values():
            h = block(h, w)
        return next_token_loss(h @ params["head"]["kernel"], x)

    return params, loss


def tied():
    """The embedding is the head, and enters every layer too."""
    params = {k: x for k, x in scan()[0].items() if k != "head"}

    def loss(params, x):
        table = params["embed"]["embedding"]
        h, _ = jax.lax.scan(
            lambda h, w: (block(h, w) + jnp.tanh(h @ table.T) @ table, None),
            table[x],
            params["layers"],
        )
        return next_token_loss(h @ table.T, x)

    return params, loss


def shared():
    """Two loops over the same layers, and a second stack in a loop that runs backwards."""
    params = scan()[0] | {"more": layer(4, LAYERS)}

    def loss(params, x):
        h = params["embed"]["embedding"][x]
        once = lambda h, w: (block(h, w), None)
        for _ in range(2):
            h, _ = jax.lax.scan(once, h, params["layers"])
        h, _ = jax.lax.scan(once, h, params["more"], reverse=True)
        return next_token_loss(h @ params["head"]["kernel"], x)

    return params, loss


def experts():
    stack = (LAYERS, 2)
    expert = {
        "up": {"kernel": normal(0, *stack, WIDTH, HIDDEN)},
        "down": {"kernel": normal(1, *stack, HIDDEN, WIDTH)},
    }
    router = {"kernel": normal(2, LAYERS, WIDTH, 2)}
    norm = {"scale": 1 + normal(3, LAYERS, WIDTH)}  # tells that layers are stacked
    params = tables() | {"layers": {"experts": expert, "norm": norm, "router": router}}

    def one(h, w):
        up, down = w["experts"]["up"]["kernel"], w["experts"]["down"]["kernel"]
        # A softmax's gradients have a direction of rounding alone, which a polar factor enlarges.
        gates = jax.nn.sigmoid(h @ w["router"]["kernel"])
        x = h * w["norm"]["scale"]
        each = jnp.einsum("bled,edf->blef", x[..., None, :] * gates[..., None], up)
        return h + jnp.einsum("blef,efd->bld", jnp.tanh(each), down)

    return params, functools.partial(through, one=one)


def linen():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(2, use_bias=False)(
                h, mask=nn.make_causal_mask(x[..., 0])
            )
            return x + nn.Dense(WIDTH)(jax.nn.gelu(nn.Dense(HIDDEN, use_bias=False)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(VOCAB, WIDTH)(x)
            stack = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = stack()(x, None)
            return nn.Dense(VOCAB, name="head")(x)

    model = Model()
    params = model.init(jax.random.key(0), batches(1)[0])["params"]
    return params, lambda params, x: next_token_loss(model.apply({"params": params}, x), x)


def nnx_scan():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def create(rngs):
        return Block(rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
        return x + block.down(jax.nn.gelu(block.up(block.norm(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.layers = create(rngs)
            self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss(params, x):
        model = nnx.merge(graph, params)
        return next_token_loss(model.head(run(model.embed(x), model.layers)), x)

    return params, loss


MODELS = {
    f.__name__: functools.cache(f)
    for f in (scan, checkpointed, half_precision, separate, tied, shared, experts, linen, nnx_scan)
}


def axes_of(params):
    """Of kernels in layers; a stack of layers, or of experts, comes first."""

    def axes(path, x):
        kernel = "layers" in jax.tree_util.keystr(path) and x.ndim > 2
        return Axes(x.ndim - 2, x.ndim - 1) if kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)


# Small steps: rounding grows with them.
SMALL = {"consistent_rms": 0.2}
OPTIMIZERS = {
    name: functools.partial(row[0], **(SMALL if name.startswith(("sumo", "mofasgd")) else {}))
    for name, row in TABLE.items()
} | {
    "sumo_random": lambda: sumo_optax.sumo(
        1e-2, 3, **SMALL, basis="random", refresh_every=3, stagger=True
    ),
    "sumo_bfloat16": lambda: sumo_optax.sumo(1e-2, 3, **SMALL, state_dtype="bfloat16"),
    "adamw": lambda: optax.adamw(
        optax.linear_schedule(1e-2, 1e-3, 20), mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "muon": lambda: optax.contrib.muon(1e-2, muon_weight_dimension_numbers=axes_of),
    "lion": lambda: optax.lion(1e-3),
    "injected": lambda: optax.inject_hyperparams(sumo_optax.sumo, static_args=("rank",))(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, 20), rank=3
    ),
    "clipped": lambda: optax.chain(sumo_optax.clip_by_last_norm(0.1), optax.sgd(0.01, 0.9)),
}


def ordinary(loss, tx):
    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    return step


def trained(step, tx, params, data):
    state, values, step = tx.init(params), [], jax.jit(step)
    for x in data:
        value, params, state = step(params, state, x)
        values.append(value)
    return values, params, state


# Of each leaf's norm: float32 rounding in sums that XLA fuses otherwise, through 30 steps of which
# each multiplies it by the condition of a moment.
ROUNDING = 1e-4


def check_equal(loss, tx, params, data, rtol=ROUNDING):
    expected = trained(ordinary(loss, tx), tx, params, data)
    found = trained(sumo_optax.value_and_update(loss, tx), tx, params, data)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_close(found[1], expected[1], rtol)
    assert_equal(counters(found[2]), counters(expected[2]))


def counters(state):
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]


QUICK = ("sumo", "adamw", "clipped")
slowly = lambda name: pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [x if x in QUICK else slowly(x) for x in OPTIMIZERS])
def test_every_optimizer_makes_the_same_step(name):
    params, loss = MODELS["scan"]()
    check_equal(loss, OPTIMIZERS[name](), params, batches(30))


@pytest.mark.parametrize(
    "model",
    [
        slowly(x) if x in ("shared", "linen", "experts", "half_precision") else x
        for x in MODELS
        if x != "scan"
    ],
)
def test_on_every_model(model):
    params, loss = MODELS[model]()
    check_equal(loss, OPTIMIZERS["sumo"](), params, batches(30))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["linen", "nnx_scan", "separate", "tied", "experts"])
@pytest.mark.parametrize("name", [*TABLE, "adamw", "muon", "lion", "clipped"])
def test_every_optimizer_on_every_model(name, model):
    params, loss = MODELS[model]()
    check_equal(loss, OPTIMIZERS[name](), params, batches(30))


def test_a_rank_function_sees_whole_leaves():
    """Though an update inside the backward pass sees a layer at a time."""
    params, loss = MODELS["scan"]()
    asked = set()

    def rank(path, shape):
        asked.add((path, shape))
        return 0.5 if shape[0] == LAYERS and "up" in path else 2

    tx = sumo_optax.sumo(1e-2, rank)
    state = jax.eval_shape(tx.init, params)
    matrices = {"layers/up/kernel": (LAYERS, WIDTH, HIDDEN)}
    matrices |= {"layers/down/kernel": (LAYERS, HIDDEN, WIDTH)}
    assert asked == set(matrices.items())
    _, _, after = jax.eval_shape(
        sumo_optax.value_and_update(loss, tx), params, state, batches(1)[0]
    )
    assert asked == set(matrices.items())
    basis = after[0].basis["layers"]
    assert (basis["up"]["kernel"].shape[-1], basis["down"]["kernel"].shape[-1]) == (8, 2)


def on_mesh(tree, mesh, axes):
    """Kernels of layers by rows and columns, other leaves by rows, where the mesh divides them."""

    def spec(path, x):
        inside = "layers" in jax.tree_util.keystr(path)
        entries = [None] * inside + list(axes)
        entries = [entries[k] if k < len(entries) else None for k in range(x.ndim)]
        sizes = [1 if e is None else mesh.shape[e] for e in entries]
        return P(
            *(e if n % k == 0 else None for e, n, k in zip(entries, x.shape, sizes, strict=True))
        )

    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, NamedSharding(mesh, spec(path, x))), tree
    )


@pytest.mark.parametrize(
    "shape, axes",
    [
        pytest.param({"fsdp": 8}, ("fsdp", None), id="fsdp", marks=pytest.mark.slow),
        pytest.param(
            {"data": 2, "fsdp": 2, "tensor": 2},
            ("fsdp", "tensor"),
            id="three axes",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("model", ["checkpointed", *map(slowly, ["separate", "experts", "tied"])])
def test_on_meshes(model, shape, axes):
    params, loss = MODELS[model]()
    tx, data = OPTIMIZERS["sumo"](), batches(30)
    expected = trained(ordinary(loss, tx), tx, params, data)
    names = tuple(shape)
    mesh = jax.make_mesh(tuple(shape.values()), names, axis_types=(AxisType.Auto,) * len(names))
    rows = NamedSharding(mesh, P(names[0]))
    data = [jax.device_put(x, rows) for x in data]
    params = on_mesh(params, mesh, axes)
    step = jax.jit(sumo_optax.value_and_update(loss, tx, strict=True))
    state = tx.init(params)
    for x in data:
        _, params, state = step(params, state, x)
    assert_close(params, expected[1], ROUNDING)


@pytest.mark.parametrize("model", ["scan", "separate"])
def test_a_layer_with_a_bad_gradient_stays_as_it_was(model):
    """The NaN is in the gradient of one layer's weight alone, not in what goes on to others."""

    @jax.custom_vjp
    def spoiled(w, bad):
        return w

    spoiled.defvjp(lambda w, bad: (w, bad), lambda bad, d: (jnp.where(bad, jnp.nan, d), None))
    params, _ = MODELS[model]()

    def one(h, w):
        up = spoiled(w["up"]["kernel"], w["bad"])
        return block(h, w | {"up": {"kernel": up}})

    def loss(params, x, bad):
        marked = params["layers"] | {"bad": bad}
        if model == "scan":
            return through(params | {"layers": marked}, x, one)
        h = params["embed"]["embedding"][x]
        for i in range(LAYERS):
            h = one(h, params["layers"][str(i)] | {"bad": bad[i]})
        return next_token_loss(h @ params["head"]["kernel"], x)

    tx = OPTIMIZERS["sumo"]()
    step = jax.jit(sumo_optax.value_and_update(loss, tx))
    good, third = jnp.zeros(LAYERS, bool), jnp.arange(LAYERS) == 2
    x, y = batches(2)
    _, params, state = step(params, tx.init(params), x, good)
    _, new, new_state = step(params, state, y, third)
    kernel = (
        (lambda tree, i: tree["layers"]["up"]["kernel"][i])
        if model == "scan"
        else (lambda tree, i: tree["layers"][str(i)]["up"]["kernel"])
    )
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(new))
    for i in range(LAYERS):
        for old, later in ((params, new), (state[0].moment, new_state[0].moment)):
            assert bool(jnp.array_equal(kernel(old, i), kernel(later, i))) == (i == 2)
    assert int(new_state[0].skipped) == 1


@pytest.mark.parametrize("model", ["checkpointed", slowly("separate")])
def test_a_resumed_run_equals_an_unbroken_one(model, tmp_path):
    params, loss = MODELS[model]()
    tx, data = OPTIMIZERS["sumo_random"](), batches(8)
    step = jax.jit(sumo_optax.value_and_update(loss, tx), donate_argnums=(0, 1))
    run = lambda params, state, data: functools.reduce(
        lambda s, x: step(*s[1:], x), data, (None, params, state)
    )
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    whole = run(copy(params), tx.init(params), data)
    half = run(copy(params), tx.init(params), data[:4])
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "half", half[1:])
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "half", jax.tree.map(jnp.zeros_like, half[1:]))
    assert_equal(run(*restored, data[4:])[1:], whole[1:])


@pytest.mark.slow
def test_auxiliary_outputs_dropout_and_whole_numbers():
    """Keys for each layer, a count that the loop carries, and outputs beside the loss."""
    params, _ = MODELS["scan"]()

    def loss(params, x, key):
        def one(carry, w_and_key):
            (h, count), (w, key) = carry, w_and_key
            kept = jax.random.bernoulli(key, 0.9, h.shape)
            h = jnp.where(kept, block(h, w), h)
            return (h, count + 1), jnp.mean(h**2)

        h = params["embed"]["embedding"][x]
        keys = jax.random.split(key, LAYERS)
        (h, count), sizes = jax.lax.scan(one, (h, jnp.zeros([], int)), (params["layers"], keys))
        return next_token_loss(h @ params["head"]["kernel"], x), {"sizes": sizes, "count": count}

    tx = OPTIMIZERS["sumo"]()
    fused = jax.jit(sumo_optax.value_and_update(loss, tx, has_aux=True, strict=True))
    a = b = (params, tx.init(params))
    for i, x in enumerate(batches(5)):
        key = jax.random.key(i)
        value, grads = jax.value_and_grad(loss, has_aux=True)(a[0], x, key)
        updates, state = tx.update(grads, a[1], a[0])
        a = optax.apply_updates(a[0], updates), state
        found, *b = fused(*b, x, key)
        assert_close(found, value)
        assert int(found[1]["count"]) == LAYERS
    assert_close(b[0], a[0], ROUNDING)


def test_what_looks_at_all_gradients_is_refused():
    params, loss = MODELS["scan"]()
    tx = optax.chain(optax.clip_by_global_norm(1.0), sumo_optax.sumo(1e-2, 3))
    with pytest.raises(ValueError, match="such as clip_by_global_norm need"):
        sumo_optax.value_and_update(loss, tx)(params, tx.init(params), batches(1)[0])
    tx = optax.MultiSteps(optax.adamw(1e-3), 2)
    with pytest.raises(ValueError, match="depends on the gradient of"):
        sumo_optax.value_and_update(loss, tx)(params, tx.init(params), batches(1)[0])
    alone = {"layers": params["layers"]}
    with pytest.raises(ValueError, match="a state of shape .* depends on the gradient of"):
        sumo_optax.value_and_update(lambda p, x: loss(params | p, x), tx)(
            alone, tx.init(alone), batches(1)[0]
        )


def test_a_state_that_is_not_stacked_is_refused():
    params = {"layers": jnp.ones((4, 8, 8))}
    loss = lambda params, x: jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0].sum()
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    with pytest.raises(ValueError, match="layers, of shape .* not stacked like the layers"):
        sumo_optax.value_and_update(loss, tx)(params, tx.init(params), jnp.eye(8))


def test_strict_names_what_a_loop_cannot_update():
    params, loss = MODELS["shared"]()
    tx = OPTIMIZERS["sumo"]()
    with pytest.raises(ValueError, match="layers/down/kernel.*cannot update"):
        sumo_optax.value_and_update(loss, tx, strict=True)(params, tx.init(params), batches(1)[0])


@pytest.mark.parametrize("max_norm", [0, -1.0, "one"])
def test_norms_to_clip_at_are_positive(max_norm):
    with pytest.raises((ValueError, TypeError), match="max_norm"):
        sumo_optax.clip_by_last_norm(max_norm)


def test_gradients_are_clipped_by_the_norm_before():
    tx = sumo_optax.clip_by_last_norm(1.0)
    state = tx.init({"a": jnp.zeros(2)})
    seen = []
    for size in (2.0, 8.0, 0.5, jnp.nan, 3.0, 3.0):
        clipped, state = tx.update({"a": jnp.array([0.6 * size, 0.8 * size])}, state)
        seen.append(float(jnp.linalg.norm(clipped["a"])))
    np.testing.assert_allclose(seen, [2, 4, 0.0625, np.nan, 3, 1], rtol=1e-6)


def test_a_gradient_of_a_stack_is_never_there():
    """No array of the size of a stacked weight but weights and states, which loops carry."""
    params, loss = MODELS["checkpointed"]()
    tx = optax.sgd(1e-2)
    step = sumo_optax.value_and_update(loss, tx)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), batches(1)[0])
    ordinarily = jax.jit(ordinary(loss, tx), donate_argnums=(0, 1))
    plain = ordinarily.lower(params, tx.init(params), batches(1)[0]).compile()
    stack = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
    saved = plain.memory_analysis().temp_size_in_bytes - (
        lowered.compile().memory_analysis().temp_size_in_bytes
    )
    assert saved > 0.5 * stack
