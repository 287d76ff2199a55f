"""Tunix's PeftTrainer on a small Qwen 3, as it is and on a mesh of 4 x 2 devices."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft import hooks, peft_trainer

import sumo_optax

CONFIG = qwen3.ModelConfig(
    num_layers=2,
    vocab_size=runs.VOCAB,
    embed_dim=16,
    hidden_dim=40,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    norm_eps=1e-6,
    rope_theta=10_000,
)


def model_inputs(batch):
    x = batch.input_tokens
    mask = jnp.tril(jnp.ones((runs.LENGTH, runs.LENGTH), bool))
    return {
        "input_tokens": x,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(runs.LENGTH), x.shape),
        "attention_mask": jnp.broadcast_to(mask, (len(x), *mask.shape)),
    }


# start
def trainer(model, steps, folder):
    tx = sumo_optax.sumo(6e-3, rank=4)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=5),
    )
    return peft_trainer.PeftTrainer(model, tx, config).with_gen_model_input_fn(model_inputs)


class Losses(hooks.TrainingHooks):
    def __init__(self):
        self.losses = []

    def on_train_step_end(self, trainer, step, loss):
        self.losses.append(float(loss))

    on_train_start = on_train_end = on_train_step_start = lambda self, *args: None
    on_eval_step_start = on_eval_step_end = lambda self, *args: None


def train(model, steps, folder):
    """The model, the optimizer's state and the losses."""
    whole = np.ones((runs.BATCH, runs.LENGTH), bool)
    data = [
        peft_trainer.TrainingInput(input_tokens=runs.tokens(i), input_mask=whole)
        for i in range(runs.STEPS + 1)
    ]
    hook, trains = Losses(), trainer(model, steps, folder)
    trains.with_training_hooks(hook)
    trains.train(data)
    return nnx.state(model), nnx.state(trains.optimizer), hook.losses


def test_ten_steps_and_a_resumed_run(tmp_path):
    model = lambda seed: qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(seed))
    whole = train(model(0), runs.STEPS, tmp_path / "whole")
    runs.assert_learns(whole[2])
    train(model(0), 5, tmp_path / "parts")
    resumed = train(model(1), runs.STEPS, tmp_path / "parts")
    runs.assert_same_bits(resumed[:2], whole[:2])
    assert resumed[2] == whole[2][5:]


# Tunix restores no state on a mesh that has masked leaves, optax's Muon's neither.
def test_ten_steps_on_a_mesh_are_those_on_one_device(tmp_path):
    one = train(qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(0)), runs.STEPS, tmp_path / "one")[2]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:

        @nnx.jit
        def sharded():
            model = qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(0))
            state = nnx.state(model)
            specs = nnx.get_partition_spec(state)
            nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
            return model

        _, state, losses = train(sharded(), runs.STEPS, tmp_path / "mesh")
    assert losses == pytest.approx(one, rel=1e-3)
    basis = state["opt_state"][0]["basis"]["layers"][0]["mlp"]["up_proj"]["kernel"]
    assert basis.addressable_shards[0].data.size == basis.size // 8


def test_matrices():
    model = qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(0))
    found = runs.matrices(sumo_optax.describe(4, nnx.state(model, nnx.Param)))
    into = {"q_proj/w": (32, 16, ()), "k_proj/w": (16, 16, ()), "v_proj/w": (16, 16, ())}
    attention = {f"attn/{k}": v for k, v in (into | {"o_proj/w": (32, 16, ())}).items()}
    mlp = {f"mlp/{k}_proj/kernel": (40, 16, ()) for k in ("gate", "up", "down")}
    assert found == {f"layers/{i}/{k}": v for i in range(2) for k, v in (attention | mlp).items()}


PUBLISHED = {
    "llama3": "llama3p2_1b",
    "qwen2": "qwen2p5_0p5b",
    "qwen3": "qwen3_30b_a3b",
    "gemma": "gemma2_2b",
    "gemma3": "gemma3_12b_it",
    "gemma4": "gemma4_26b_a4b",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_leaf_of_a_published_model_is_ambiguous(name):
    module = importlib.import_module(f"tunix.models.{name}.model")
    [kind] = [x for k, x in vars(module).items() if k.lower() == name]
    config = getattr(module.ModelConfig, PUBLISHED[name])()
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    found = runs.matrices(sumo_optax.describe(8, nnx.state(model, nnx.Param)))
    assert all(config.embed_dim in (m, n) for m, n, _ in found.values())
