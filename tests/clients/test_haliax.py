"""A loop over a Haliax model: named axes, layers stacked by `Stacked`."""

import equinox as eqx
import haliax as hax
import in_equinox
import jax
import runs

import sumo_optax

Batch, Position = hax.Axis("batch", runs.BATCH), hax.Axis("position", runs.LENGTH - 1)
Vocab, Embed, Mlp = hax.Axis("vocab", runs.VOCAB), hax.Axis("embed", 16), hax.Axis("mlp", 40)
Heads, HeadSize, Layers = hax.Axis("heads", 2), hax.Axis("head_size", 8), hax.Axis("layers", 3)


class Block(eqx.Module):
    norm: hax.nn.LayerNorm
    query: hax.nn.Linear
    key: hax.nn.Linear
    value: hax.nn.Linear
    out: hax.nn.Linear
    mlp: hax.nn.MLP

    @staticmethod
    def init(*, key):
        keys = jax.random.split(key, 5)
        into = lambda k: hax.nn.Linear.init(Embed, (Heads, HeadSize), key=k, use_bias=False)
        return Block(
            hax.nn.LayerNorm.init(Embed),
            *map(into, keys[:3]),
            hax.nn.Linear.init((Heads, HeadSize), Embed, key=keys[3]),
            hax.nn.MLP.init(Embed, Embed, Mlp, 1, key=keys[4]),
        )

    def __call__(self, x):
        h = self.norm(x)
        Key = Position.alias("key_position")
        k, v = (part(h).rename({"position": "key_position"}) for part in (self.key, self.value))
        mask = hax.nn.attention.causal_mask(Position, Key)
        x += self.out(
            hax.nn.attention.dot_product_attention(Key, HeadSize, self.query(h), k, v, mask)
        )
        return x + self.mlp(x)


class Model(eqx.Module):
    embedding: hax.nn.Embedding
    blocks: hax.nn.Stacked
    head: hax.nn.Linear

    @staticmethod
    def init(key):
        keys = jax.random.split(key, 3)
        return Model(
            hax.nn.Embedding.init(Vocab, Embed, key=keys[0]),
            hax.nn.Stacked.init(Layers, Block)(key=jax.random.split(keys[1], Layers.size)),
            hax.nn.Linear.init(Embed, Vocab, key=keys[2]),
        )

    def __call__(self, x):
        return self.head(self.blocks.fold(self.embedding(x)))


def loss_of(model, x):
    named = lambda x: hax.named(x, (Batch, Position))
    target = hax.nn.one_hot(named(x[:, 1:]), Vocab)
    loss = hax.nn.cross_entropy_loss(model(named(x[:, :-1])), Vocab, target)
    return loss.scalar()


# start
tx = sumo_optax.sumo(6e-3, rank=4)


def start(model):
    return tx.init(eqx.filter(model, eqx.is_inexact_array))


@hax.named_jit
def step(model, state, x):
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, x)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def test_ten_steps_and_a_resumed_run(tmp_path):
    in_equinox.assert_resumes(Model.init, start, step, tmp_path)


def test_axes_say_what_is_what():
    params = eqx.filter(Model.init(jax.random.key(0)), eqx.is_inexact_array)
    found = runs.matrices(sumo_optax.describe(4, params))
    block = "blocks/stacked"
    attention = {f"{block}/{x}/weight/0": (16, 16, (3,)) for x in ("query", "key", "value", "out")}
    mlp = {f"{block}/mlp/layers/{i}/weight/0": (40, 16, (3,)) for i in range(2)}
    assert found == attention | mlp
