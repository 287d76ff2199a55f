"""The parameters of Gemma's own package: what is a matrix, and what its state holds."""

import jax
import jax.numpy as jnp
import pytest
import runs
from gemma import gm

import sumo_optax


def params_of(model):
    init = lambda: model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    return jax.eval_shape(init)["params"]


# The model's width, its MLP's, heads, heads of keys, size of a head, layers.
MODELS = {
    "Gemma2_2B": (2304, 9216, 8, 4, 256, 26),
    "Gemma2_9B": (3584, 14336, 16, 8, 256, 42),
    "Gemma3_1B": (1152, 6912, 4, 1, 256, 26),
    "Gemma3_4B": (2560, 10240, 8, 4, 256, 34),
}


@pytest.mark.parametrize("name", MODELS)
def test_matrices(name):
    width, hidden, heads, kv_heads, size, layers = MODELS[name]
    params = params_of(getattr(gm.nn, name)())
    found = runs.matrices(sumo_optax.describe(8, params))
    sides = lambda m, n, batch=(): (max(m, n), min(m, n), batch)
    block = {
        "attn/q_einsum/w": sides(width, heads * size),
        "attn/kv_einsum/w": sides(width, kv_heads * size, (2,)),
        "attn/attn_vec_einsum/w": sides(width, heads * size),
        "mlp/gating_einsum": sides(width, hidden, (2,)),
        "mlp/linear": sides(width, hidden),
    }
    of_text = {k: v for k, v in found.items() if not k.startswith("vision_encoder")}
    assert of_text == {f"layer_{i}/{k}": v for i in range(layers) for k, v in block.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_gates_inputs_are_the_models_width(name):
    """They are (2, inputs, outputs) or (2, outputs, inputs), from one size of Gemma to another."""
    width = MODELS[name][0]
    params = params_of(getattr(gm.nn, name)())
    axes = sumo_optax.flax_dimension_numbers(params)["layer_0"]["mlp"]["gating_einsum"]
    shape = params["layer_0"]["mlp"]["gating_einsum"].shape
    assert [shape[a] for a in axes.reduction_axis] == [width]


def test_state_of_gemma_2_2b_is_its_embeddings():
    report = sumo_optax.describe(8, params_of(gm.nn.Gemma2_2B()))
    total = lambda kind, role: sum(getattr(x, kind) for x in report.leaves if x.role == role)
    assert total("state_bytes", "matrix") < 0.05 * total("adamw_bytes", "matrix")
    [table] = [x for x in report.leaves if x.path == "embedder/input_embedding"]
    assert total("state_bytes", "fallback") < 1.001 * table.adamw_bytes
