"""Real Flax models, no spec given: what is taken for a matrix; ten steps lower the loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from contracts import assert_equal, every_optimizer, every_optimizer_slowly
from flax import nnx

import sumo_optax

VOCAB, LENGTH, WIDTH = 17, 8, 16


def tokens():
    return jax.random.randint(jax.random.key(0), (8, LENGTH), 0, VOCAB)


def next_token_loss(logits, x):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], x[:, 1:])
    return loss.mean()


def matrices(params):
    """Path, matrix and batch of every leaf that is a matrix."""
    report = sumo_optax.describe(3, params)
    return {leaf.path: (leaf.m, leaf.n, leaf.batch) for leaf in report.leaves if leaf.m}


def nnx_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 40, rngs=rngs)
            self.down = nnx.Linear(40, WIDTH, rngs=rngs)

        def __call__(self, x):
            x += self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.down(jax.nn.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    x = tokens()
    expected = {
        f"blocks/{i}/{name}/kernel": shape
        for i in range(2)
        for name, shape in {
            **{f"attention/{p}": (16, 16, ()) for p in ("query", "key", "value", "out")},
            "up": (40, 16, ()),
            "down": (40, 16, ()),
        }.items()
    }
    return params, lambda p: next_token_loss(nnx.merge(graph, p)(x), x), expected


def scanned_linen_transformer():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(2)(h, mask=nn.make_causal_mask(x[..., 0]))
            return x + nn.Dense(WIDTH)(jax.nn.gelu(nn.Dense(40, use_bias=False)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(VOCAB, WIDTH)(x)
            blocks = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = blocks(name="layers")(x, None)
            return nn.Dense(VOCAB, name="lm_head")(nn.LayerNorm()(x))

    x = tokens()
    params = Model().init(jax.random.key(1), x)
    attention = "params/layers/MultiHeadDotProductAttention_0"
    expected = {
        f"{attention}/{p}/kernel": (16, 16, (3,)) for p in ("query", "key", "value", "out")
    } | {f"params/layers/Dense_{i}/kernel": (40, 16, (3,)) for i in range(2)}
    return params, lambda p: next_token_loss(Model().apply(p, x), x), expected


def resnet():
    class Model(nnx.Module):
        def __init__(self, rngs):
            conv = lambda i, o: nnx.Conv(i, o, (3, 3), use_bias=False, rngs=rngs)
            self.stem, self.conv1, self.conv2 = conv(3, 8), conv(8, 8), conv(8, 8)
            self.norm1, self.norm2 = (nnx.BatchNorm(8, rngs=rngs) for _ in range(2))
            self.classifier = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            h = jax.nn.relu(self.norm1(self.conv1(x)))
            x = jax.nn.relu(x + self.norm2(self.conv2(h)))
            return self.classifier(x.mean((1, 2)))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    labels = jnp.arange(16) % 5

    def loss(p):
        logits = nnx.merge(graph, p, rest, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # Four axes, no bias, and no name that says convolution: the stem is left to the fallback.
    return params, loss, {"conv1/kernel": (72, 8, ()), "conv2/kernel": (72, 8, ())}


def mixture_of_experts():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(VOCAB, WIDTH)(x)
            gates = jax.nn.softmax(nn.Dense(4, name="router")(nn.LayerNorm()(x)))
            up = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=4,
            )
            hidden = jax.nn.relu(up(32, use_bias=False, name="experts_up")(x))
            down = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
            )
            out = down(WIDTH, name="experts_down")(hidden)
            x += jnp.einsum("ebld,ble->bld", out, gates)
            return nn.Dense(VOCAB, name="head")(x)

    x = tokens()
    params = Model().init(jax.random.key(1), x)
    expected = {
        "params/router/kernel": (16, 4, ()),
        "params/experts_up/kernel": (32, 16, (4,)),
        "params/experts_down/kernel": (32, 16, (4,)),
    }
    return params, lambda p: next_token_loss(Model().apply(p, x), x), expected


def lstm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(12))(nn.Embed(VOCAB, WIDTH)(x))
            return nn.Dense(VOCAB, name="head")(x)

    x = tokens()
    params = Model().init(jax.random.key(1), x)
    cell = "params/OptimizedLSTMCell_0"
    expected = {f"{cell}/i{g}/kernel": (16, 12, ()) for g in "ifgo"}
    expected |= {f"{cell}/h{g}/kernel": (12, 12, ()) for g in "ifgo"}
    return params, lambda p: next_token_loss(Model().apply(p, x), x), expected


MODELS = {
    "NNX transformer": nnx_transformer,
    "scanned Linen transformer": scanned_linen_transformer,
    "ResNet": resnet,
    "mixture of experts": mixture_of_experts,
    "LSTM": lstm,
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param()


def test_matrices_of_the_model(model):
    params, _, expected = model
    assert matrices(params) == expected


@every_optimizer_slowly
def test_ten_steps_lower_the_loss(make, model):
    params, loss, _ = model
    tx = make(learning_rate=3e-2)

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, tx.init(params)), length=10)[1]

    losses = run(params)
    assert losses[-1] < 0.9 * losses[0]


# What peers do to users' trees today, and must not happen here.


def test_stacked_biases_are_no_matrix_and_stacked_kernels_are():
    params = {"layers": {"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 4))}}
    assert matrices(params) == {"layers/kernel": (8, 4, (3,))}


@every_optimizer
def test_batch_axes_and_biases_can_be_saved_and_the_next_step_is_the_same(make, tmp_path):
    params = {"layers": {"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 4))}}
    tx = make()
    update = jax.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    assert updates["layers"]["kernel"].shape == (3, 8, 4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert_equal(restored, state)
    assert_equal(update(params, restored, params), update(params, state, params))


@every_optimizer
def test_dimension_numbers_by_a_function_inside_partition(make):
    """The function sees the tree as the partition leaves it, masked nodes and all."""
    params = {"a": {"kernel": jnp.ones((8, 4))}, "b": {"kernel": jnp.ones((8, 4))}}

    def numbers(tree):
        spec = lambda x: optax.contrib.MuonDimensionNumbers() if jnp.ndim(x) == 2 else None
        return jax.tree.map(spec, tree)

    ours = make(weight_dimension_numbers=numbers)
    tx = optax.partition({"ours": ours, "sgd": optax.sgd(0.1)}, {"a": "ours", "b": "sgd"})
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jnp.abs(updates["a"]["kernel"]).max() > 0
    assert jnp.allclose(updates["b"]["kernel"], -0.1)
