"""A BERT encoder with a classifier in Flax NNX, and its weights from a Hugging Face folder.

Shapes stand in names: B batch, L length, D width, F hidden width, H heads, K width of a head.
Dropout is on hidden states alone, attention has none of its own.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from common.linear import Linear
from flax import nnx

Rngs = nnx.Rngs | None


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a model."""

    vocab: int
    width: int
    hidden: int
    heads: int
    layers: int
    positions: int
    types: int
    epsilon: float
    dropout: float


# Names in a Hugging Face config.json.
SHAPE = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "epsilon": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
}
# What else must be so, and is where nothing is said of it.
KIND = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}

# Names in a Hugging Face model.safetensors.
EMBEDDINGS = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "type_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
LAYER = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Those that a model may be without: they start at random, as the classifier does.
HEADS = ("pooler", "classifier")


class Attention(nnx.Module):
    """Self-attention to the tokens that are no padding."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, config.width, config.width, rngs=rngs)
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear() for _ in range(4))

    def __call__(self, x_BxLxD: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        B, L, D = x_BxLxD.shape
        q, k, v = (
            project(x_BxLxD).reshape(B, L, self.heads, D // self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen_Bx1x1xL = mask_BxL[:, None, None, :].astype(bool)
        y_BxLxHxK = jax.nn.dot_product_attention(q, k, v, mask=seen_Bx1x1xL)
        return self.o_proj(y_BxLxHxK.reshape(B, L, D))


class Mlp(nnx.Module):
    """Two matrices and the exact GELU."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.up_proj = Linear(config.width, config.hidden, rngs=rngs)
        self.down_proj = Linear(config.hidden, config.width, rngs=rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.gelu(self.up_proj(x_BxLxD), approximate=False))


class Block(nnx.Module):
    """One layer: attention, then MLP, each added to its input and normalised."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, config.width, epsilon=config.epsilon, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.attention_norm = norm()
        self.mlp = Mlp(config, rngs)
        self.mlp_norm = norm()
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, rngs: Rngs) -> jax.Array:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        x_BxLxD = self.attention_norm(x_BxLxD + drop(self.attention(x_BxLxD, mask_BxL)))
        return self.mlp_norm(x_BxLxD + drop(self.mlp(x_BxLxD)))


class Bert(nnx.Module):
    """Tokens to the logits of classes, read off the first token; with `rngs`, with dropout."""

    def __init__(self, config: BertConfig, classes: int, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.width, rngs=rngs)
        self.word_embeddings = embed(config.vocab)
        self.position_embeddings = embed(config.positions)
        self.type_embeddings = embed(config.types)
        self.embeddings_norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.layers = nnx.List(Block(config, rngs) for _ in range(config.layers))
        self.pooler = Linear(config.width, config.width, rngs=rngs)
        self.classifier = Linear(
            config.width, classes, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        tokens_BxL: jax.Array,
        types_BxL: jax.Array,
        mask_BxL: jax.Array,
        rngs: Rngs = None,
    ) -> jax.Array:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        x_BxLxD = (
            self.word_embeddings(tokens_BxL)
            + self.position_embeddings(jnp.arange(tokens_BxL.shape[1]))
            + self.type_embeddings(types_BxL)
        )
        x_BxLxD = drop(self.embeddings_norm(x_BxLxD))
        for block in self.layers:
            x_BxLxD = block(x_BxLxD, mask_BxL, rngs)
        return self.classifier(drop(jax.nn.tanh(self.pooler(x_BxLxD[:, 0]))))


def read_config(folder: Path) -> BertConfig:
    """The shape of the model in a Hugging Face folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    for name, value in KIND.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path} has {name} {config[name]!r}; this program takes {value!r}")
    absent = [name for name in SHAPE.values() if name not in config]
    if absent:
        raise ValueError(f"{path} has no {', '.join(absent)}: is it that of a BERT?")
    return BertConfig(**{ours: config[theirs] for ours, theirs in SHAPE.items()})


def read_weights(folder: Path, params: Any) -> dict[str, Any]:
    """Parameters with the weights in a Hugging Face folder; of its heads, what it has."""
    path = folder / "model.safetensors"
    try:
        stored = safetensors.numpy.load_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or 'no such file'}") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    weights = {current_name(name): value for name, value in stored.items()}

    def read(key_path: jax.tree_util.KeyPath, random: jax.Array) -> jax.Array | np.ndarray:
        names = [str(getattr(key, "key", key)) for key in key_path]
        name = their_name(names)
        if name not in weights:
            if names[0] in HEADS:
                return random
            raise ValueError(f"{path} has no {name}: is it that of a BERT?")
        value = np.asarray(weights[name], np.float32)
        value = value.T if names[-1] == "kernel" else value
        if value.shape != random.shape:
            raise ValueError(f"{path} has {name} of shape {value.shape}, expected {random.shape}")
        return value

    return jax.tree.map_with_path(read, params)


def current_name(name: str) -> str:
    """Without the prefix of models with other heads, and with today's names of a norm's weights."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def their_name(names: list[str]) -> str:
    """The Hugging Face name of one of our parameters, from its path."""
    *_, module, leaf = names
    leaf = "bias" if leaf == "bias" else "weight"
    if names[0] == "layers":
        return f"encoder.layer.{names[1]}.{LAYER[module]}.{leaf}"
    return f"{EMBEDDINGS.get(module, module)}.{leaf}"
