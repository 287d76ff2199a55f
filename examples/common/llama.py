"""A LLaMA decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU, an untied head and no biases.

Shapes stand in names: B batch, L length, D width, F hidden width, H heads, K width of a head. A
kernel starts with standard deviation 1 / sqrt(width): LLaMA's own 0.02 at the widths of LLaMA, but
0.02 would be far too little for the small models here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from common.layers import Attention, Linear
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model."""

    vocab: int
    width: int
    hidden: int
    heads: int
    layers: int
    scan_layers: bool = False

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads, got width {self.width}"
                f" and heads {self.heads}"
            )


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's shape and how long it trains on what."""

    width: int
    hidden: int
    heads: int
    layers: int
    length: int
    batch: int
    steps: int


# `tiny` is for a laptop, the others are GaLore's (arXiv 2403.03507, appendix C).
PRESETS = {
    "tiny": Preset(128, 344, 4, 4, length=128, batch=16, steps=500),
    "60m": Preset(512, 1376, 8, 8, length=256, batch=512, steps=10_000),
    "130m": Preset(768, 2048, 12, 12, length=256, batch=512, steps=20_000),
    "350m": Preset(1024, 2736, 16, 24, length=256, batch=512, steps=60_000),
    "1b": Preset(2048, 5461, 32, 24, length=256, batch=512, steps=100_000),
    "7b": Preset(4096, 11008, 32, 32, length=256, batch=512, steps=150_000),
}


def rotate(x_BxLxHxK: jax.Array) -> jax.Array:
    """Rotary positions: turns each pair of features by an angle that grows with the position."""
    _, length, _, width = x_BxLxHxK.shape
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle_LxK = jnp.outer(jnp.arange(length), frequency)
    cos, sin = (f(angle_LxK)[:, None, :].astype(x_BxLxHxK.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BxLxHxK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        matrix = functools.partial(Linear, use_bias=False, rngs=rngs)
        self.gate_proj = matrix(config.width, config.hidden)
        self.up_proj = matrix(config.width, config.hidden)
        self.down_proj = matrix(config.hidden, config.width)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        h_BxLxF = jax.nn.silu(self.gate_proj(x_BxLxD)) * self.up_proj(x_BxLxD)
        return self.down_proj(h_BxLxF)


class Block(nnx.Module):
    """One layer: attention, then SwiGLU, each on a normalised residual stream."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(config.width, rngs=rngs)
        self.self_attn = Attention(config.width, config.heads, use_bias=False, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD += self.self_attn(self.input_layernorm(x_BxLxD), rotate, is_causal=True)
        x_BxLxD += self.mlp(self.post_attention_layernorm(x_BxLxD))
        return x_BxLxD


class Llama(nnx.Module):
    """Tokens to the logits of the next ones."""

    layers: Block | nnx.List[Block]

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocab, config.width, rngs=rngs)
        if config.scan_layers:
            self.layers = stacked(config, rngs)
        else:
            self.layers = nnx.List(Block(config, rngs) for _ in range(config.layers))
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.lm_head = Linear(config.width, config.vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        x_BxLxD = self.embed_tokens(tokens_BxL)
        if isinstance(self.layers, Block):
            x_BxLxD = scan(x_BxLxD, self.layers)
        else:
            for block in self.layers:
                x_BxLxD = block(x_BxLxD)
        return self.lm_head(self.norm(x_BxLxD))


def stacked(config: LlamaConfig, rngs: nnx.Rngs) -> Block:
    """One block whose leaves have a leading layer axis: compiled once, however deep the model."""

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs)

    return create(rngs)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def scan(x_BxLxD: jax.Array, block: Block) -> jax.Array:
    """Runs through stacked blocks one after another."""
    return block(x_BxLxD)
