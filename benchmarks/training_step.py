"""A LLaMA's training step as shapes: what to compile, without making any of it.

The block is that of `examples/common/llama.py` in bfloat16 or float32, but for the rotation of
positions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import sumo_optax

Tree = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A LLaMA's shape, and how its parameters are kept."""

    width: int
    hidden: int
    layers: int
    heads: int
    vocab: int = 32_000
    dtype: str = "float32"
    stacked: bool = False
    """One leaf for a matrix of all layers, and a scan over them."""
    length: int = 2048
    """Of the sequence that each device takes."""


def parameters(model: Model, mesh: Mesh) -> Tree:
    """Shapes of the parameters; rows lie along "x", columns of projections along "tensor"."""
    d, f = model.width, model.hidden
    stack = (model.layers,) if model.stacked else ()

    def along(axis: str, size: int) -> str | None:
        devices = mesh.shape.get(axis, 1)
        return axis if devices > 1 and size % devices == 0 else None

    def array(*shape: int, spec: tuple[str | None, ...] = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, jnp.dtype(model.dtype), sharding=NamedSharding(mesh, P(*spec))
        )

    def kernel(m: int, n: int) -> Tree:
        spec = (*[None] * len(stack), along("x", m), along("tensor", n))
        return {"kernel": array(*stack, m, n, spec=spec)}

    layer = lambda: {
        "input_layernorm": {"scale": array(*stack, d)},
        "self_attn": {f"{name}_proj": kernel(d, d) for name in "qkvo"},
        "post_attention_layernorm": {"scale": array(*stack, d)},
        "mlp": {"gate_proj": kernel(d, f), "up_proj": kernel(d, f), "down_proj": kernel(f, d)},
    }
    return {
        "embed_tokens": {"embedding": array(model.vocab, d, spec=(along("x", model.vocab),))},
        "layers": layer() if model.stacked else {str(i): layer() for i in range(model.layers)},
        "norm": {"scale": array(d)},
        "lm_head": {"kernel": array(d, model.vocab, spec=(along("x", d),))},
    }


def projections(params: Tree) -> Tree:
    """Dimension numbers of the projections, None for all else: every optimizer is told the same."""

    def numbers(path, x):
        if "_proj" not in jax.tree_util.keystr(path):
            return None
        return MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,))

    return jax.tree.map_with_path(numbers, params)


def normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6).astype(x.dtype) * scale


def block(model: Model, x_BxLxD: jax.Array, layer: Tree) -> jax.Array:
    weight = {name: leaf["kernel"] for name, leaf in (layer["self_attn"] | layer["mlp"]).items()}
    h = normalized(x_BxLxD, layer["input_layernorm"]["scale"])
    q, k, v = (
        (h @ weight[f"{name}_proj"]).reshape(*h.shape[:2], model.heads, -1) for name in "qkv"
    )
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x_BxLxD += y.reshape(h.shape) @ weight["o_proj"]
    h = normalized(x_BxLxD, layer["post_attention_layernorm"]["scale"])
    hidden = jax.nn.silu(h @ weight["gate_proj"]) * (h @ weight["up_proj"])
    return x_BxLxD + hidden @ weight["down_proj"]


def loss(model: Model, params: Tree, tokens: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """Of the next tokens; each block's activations are computed again in the backward pass."""
    x = params["embed_tokens"]["embedding"][tokens[:, :-1]]
    if rows is not None:
        x = jax.lax.with_sharding_constraint(x, rows)
    one = jax.checkpoint(lambda x, layer: (block(model, x, layer), None))
    if model.stacked:
        x, _ = jax.lax.scan(one, x, params["layers"])
    else:
        for layer in params["layers"].values():
            x, _ = one(x, layer)
    logits = normalized(x, params["norm"]["scale"]) @ params["lm_head"]["kernel"]
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train_step(
    model: Model, tx: optax.GradientTransformation, rows: NamedSharding | None
) -> Callable[..., Tree]:
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss, argnums=1)(model, params, tokens, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def fused_step(
    model: Model, tx: optax.GradientTransformation, rows: NamedSharding | None
) -> Callable[..., Tree]:
    """The same with updates inside the backward pass."""
    step = sumo_optax.value_and_update(
        lambda params, tokens: loss(model, params, tokens, rows), tx, strict=True
    )

    def ordered(params, state, tokens):
        value, params, state = step(params, state, tokens)
        return params, state, value

    return ordered


def update_step(tx: optax.GradientTransformation) -> Callable[..., Tree]:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, 0.0

    return step
