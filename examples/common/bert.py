"""A BERT encoder with a classifier in Flax NNX, and its weights from a Hugging Face folder.

Shapes stand in names: B batch, L length, D width, F hidden width.
Dropout is on hidden states alone, attention has none of its own.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from common.llama import Attention, Linear
from flax import nnx

Rngs = nnx.Rngs | None


# The shape of a model, as a Hugging Face config.json has it.
SIZES = "vocab_size hidden_size intermediate_size num_attention_heads num_hidden_layers"
SIZES += " max_position_embeddings type_vocab_size layer_norm_eps hidden_dropout_prob"
SIZES = SIZES.split()
# What else must be so in a config.json, and is where nothing is said of it.
KIND = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}

# Names in a Hugging Face model.safetensors.
NAMES = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "type_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Those that a model may be without: they start at random, and LoRA trains them whole.
HEADS = ("pooler", "classifier")


class Block(nnx.Module):
    """One layer: attention, then MLP, each added to its input and normalised."""

    def __init__(self, config: SimpleNamespace, rngs: nnx.Rngs):
        width = config.hidden_size
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.attention = Attention(width, config.num_attention_heads, use_bias=True, rngs=rngs)
        self.attention_norm = norm()
        self.up_proj = Linear(width, config.intermediate_size, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, width, rngs=rngs)
        self.mlp_norm = norm()
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, rngs: Rngs) -> jax.Array:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        seen_Bx1x1xL = mask_BxL[:, None, None, :].astype(bool)
        x_BxLxD = self.attention_norm(x_BxLxD + drop(self.attention(x_BxLxD, mask=seen_Bx1x1xL)))
        h_BxLxF = jax.nn.gelu(self.up_proj(x_BxLxD), approximate=False)
        return self.mlp_norm(x_BxLxD + drop(self.down_proj(h_BxLxF)))


class Bert(nnx.Module):
    """Tokens to the logits of classes, read off the first token; with `rngs`, with dropout."""

    def __init__(self, config: SimpleNamespace, classes: int, rngs: nnx.Rngs):
        width = config.hidden_size
        embed = functools.partial(nnx.Embed, features=width, rngs=rngs)
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_position_embeddings)
        self.type_embeddings = embed(config.type_vocab_size)
        self.embeddings_norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.layers = nnx.List(Block(config, rngs) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(width, width, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.classifier = Linear(width, classes, kernel_init=small, rngs=rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(self, tokens_BxL, types_BxL, mask_BxL, rngs: Rngs = None) -> jax.Array:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        positions = self.position_embeddings(jnp.arange(tokens_BxL.shape[1]))
        x_BxLxD = self.word_embeddings(tokens_BxL) + positions + self.type_embeddings(types_BxL)
        x_BxLxD = drop(self.embeddings_norm(x_BxLxD))
        for block in self.layers:
            x_BxLxD = block(x_BxLxD, mask_BxL, rngs)
        return self.classifier(drop(jax.nn.tanh(self.pooler(x_BxLxD[:, 0]))))


def read_config(folder: Path) -> SimpleNamespace:
    """The shape of the model in a Hugging Face folder."""
    path = folder / "config.json"
    try:
        config = KIND | json.loads(path.read_text())
        if others := [f"{name} {config[name]!r}" for name in KIND if config[name] != KIND[name]]:
            raise ValueError(f"it has {', '.join(others)}; this program takes {KIND}")
        return SimpleNamespace(**{name: config[name] for name in SIZES})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not that of a BERT: {error!r}") from None


def read_weights(folder: Path, params: Any) -> dict[str, Any]:
    """Parameters with the weights in a Hugging Face folder; of its heads, what it has."""
    path = folder / "model.safetensors"
    try:
        stored = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    # Models with other heads have a prefix, older ones other names of a norm's weights.
    rename = lambda x: x.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    weights = {rename(name.removeprefix("bert.")): value for name, value in stored.items()}

    def read(key_path: jax.tree_util.KeyPath, random: jax.Array) -> jax.Array | np.ndarray:
        *_, module, leaf = keys = [str(getattr(key, "key", key)) for key in key_path]
        layer = f"encoder.layer.{keys[1]}." if keys[0] == "layers" else ""
        name = layer + NAMES.get(module, module) + (".bias" if leaf == "bias" else ".weight")
        if name not in weights:
            if keys[0] in HEADS:
                return random
            raise ValueError(f"{path} has no {name}: is it that of a BERT?")
        value = np.asarray(weights[name], np.float32)
        value = value.T if leaf == "kernel" else value
        if value.shape != random.shape:
            raise ValueError(f"{path} has {name} of shape {value.shape}, expected {random.shape}")
        return value

    return jax.tree.map_with_path(read, params)
