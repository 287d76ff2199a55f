"""A LLaMA decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU, an untied head and no biases.

Shapes stand in names: B batch, L length, D width, F hidden width, H heads, K width of a head. A
kernel starts with standard deviation 1 / sqrt(width): LLaMA's own 0.02 at the widths of LLaMA, but
0.02 would be far too little for the small models here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; of a preset also how long it trains on what."""

    width: int  # Width of the model.
    hidden: int  # Hidden width of SwiGLU.
    heads: int  # Attention heads.
    layers: int  # Blocks.
    length: int = 0  # Tokens in a window.
    batch: int = 0  # Windows in a step.
    steps: int = 0  # Steps to train.
    scan_layers: bool = False  # Stack the blocks: one compilation for all of them.
    vocab: tyro.conf.Suppress[int] = 256


# `tiny` is for a laptop, the others are GaLore's (arXiv 2403.03507, appendix C).
PRESETS = {
    "tiny": LlamaConfig(128, 344, 4, 4, length=128, batch=16, steps=500),
    "60m": LlamaConfig(512, 1376, 8, 8, length=256, batch=512, steps=10_000),
    "130m": LlamaConfig(768, 2048, 12, 12, length=256, batch=512, steps=20_000),
    "350m": LlamaConfig(1024, 2736, 16, 24, length=256, batch=512, steps=60_000),
    "1b": LlamaConfig(2048, 5461, 32, 24, length=256, batch=512, steps=100_000),
    "7b": LlamaConfig(4096, 11008, 32, 32, length=256, batch=512, steps=150_000),
}


class Linear(nnx.Linear):
    """Flax's own, as one matrix product: on a CPU its gradient is faster than one over two axes."""

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        y_NxD = super().__call__(x_BxLxD.reshape(-1, x_BxLxD.shape[-1]))
        return y_NxD.reshape(*x_BxLxD.shape[:-1], -1)


class Attention(nnx.Module):
    """Self-attention; queries and keys are turned by their positions."""

    def __init__(self, width: int, heads: int, use_bias: bool, rngs: nnx.Rngs):
        if width % (2 * heads):
            raise ValueError(f"width {width} must be a multiple of 2 * heads, heads {heads}")
        linear = functools.partial(Linear, width, width, use_bias=use_bias, rngs=rngs)
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear() for _ in range(4))

    def __call__(self, x_BxLxD: jax.Array, turn=lambda x: x, **seen: Any) -> jax.Array:
        B, L, D = x_BxLxD.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x_BxLxD).reshape(B, L, self.heads, D // self.heads) for f in projections)
        y_BxLxHxK = jax.nn.dot_product_attention(turn(q), turn(k), v, **seen)
        return self.o_proj(y_BxLxHxK.reshape(B, L, D))


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
        self.gate_proj, self.up_proj = (matrix(config.width, config.hidden) for _ in range(2))
        self.down_proj = matrix(config.hidden, config.width)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BxLxD)) * self.up_proj(x_BxLxD))


class Block(nnx.Module):
    """One layer: attention, then SwiGLU, each on a normalised residual stream."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(config.width, rngs=rngs)
        self.self_attn = Attention(config.width, config.heads, use_bias=False, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD += self.self_attn(self.input_layernorm(x_BxLxD), rotate, is_causal=True)
        return x_BxLxD + self.mlp(self.post_attention_layernorm(x_BxLxD))


class Llama(nnx.Module):
    """Tokens to the logits of the next ones."""

    layers: Block | nnx.List[Block]

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocab, config.width, rngs=rngs)
        block = lambda rngs: Block(config, rngs)
        if config.scan_layers:
            # A leading axis of each leaf is of layers: compiled once, however deep the model.
            self.layers = nnx.split_rngs(splits=config.layers)(nnx.vmap(block))(rngs)
        else:
            self.layers = nnx.List(block(rngs) for _ in range(config.layers))
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


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def scan(x_BxLxD: jax.Array, block: Block) -> jax.Array:
    """Runs through stacked blocks one after another."""
    return block(x_BxLxD)
