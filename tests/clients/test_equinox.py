"""A loop over an Equinox model whose layers are stacked by `filter_vmap` and scanned."""

import equinox as eqx
import in_equinox
import jax
import jax.numpy as jnp
import optax
import runs

import sumo_optax

WIDTH, LAYERS = 16, 3


class Block(eqx.Module):
    norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[0])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 40, 1, key=keys[1])

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x += self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.mlp)(x)


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(runs.VOCAB, WIDTH, key=keys[0])
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[1], LAYERS))
        self.head = eqx.nn.Linear(WIDTH, runs.VOCAB, key=keys[2])

    def __call__(self, x):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        body = lambda x, block: (eqx.combine(block, static)(x), None)
        x, _ = jax.lax.scan(body, jax.vmap(self.embedding)(x), arrays)
        return jax.vmap(self.head)(x)


def loss_of(model, x):
    logits = jax.vmap(model)(x[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, 1:]).mean()


# start
tx = sumo_optax.sumo(6e-3, rank=4)


def start(model):
    return tx.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def step(model, state, x):
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, x)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def test_ten_steps_and_a_resumed_run(tmp_path):
    in_equinox.assert_resumes(Model, start, step, tmp_path)


def test_layers_are_stacks_of_matrices_that_are_out_in():
    report = sumo_optax.describe(4, eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array))
    attention = {
        f"blocks/attention/{name}_proj/weight": (16, 16, (3,))
        for name in ("query", "key", "value", "output")
    }
    mlp = {f"blocks/mlp/layers/{i}/weight": (40, 16, (3,)) for i in range(2)}
    assert runs.matrices(report) == attention | mlp
