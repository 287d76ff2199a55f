"""MaxText's `train`, layers scanned and separate, on a mesh of 8 devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import maxtext
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import runs
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils, muon_utils

import sumo_optax

HERE = Path(__file__).parent
LAST = str(runs.STEPS - 1)  # the last step, and so the last checkpoint
MODEL = {
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 64,
    "base_num_decoder_layers": 3,
    "head_dim": 8,
    "vocab_size": 256,
    "max_target_length": 16,
    "attention": "dot_product",
    "dtype": "float32",
}
RUN = {
    "dataset_type": "synthetic",
    "per_device_batch_size": 1,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_tensorboard": False,
    "async_checkpointing": False,
    "checkpoint_period": 5,
    "learning_rate": 0.03,
    "learning_rate_schedule_steps": runs.STEPS,
    "warmup_steps_fraction": 0.0,
}


def train(folder, *, scanned):
    """Losses of each step, and the last checkpoint. A run goes on from its last checkpoint."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    arguments = MODEL | RUN | {"steps": runs.STEPS, "scan_layers": scanned}
    arguments |= {"run_name": "run", "base_output_directory": folder, "metrics_file": metrics}
    config = Path(maxtext.__file__).parent / "configs" / "base.yml"
    command = [sys.executable, HERE / "maxtext_with_sumo.py", config]
    command += [f"{key}={value}" for key, value in arguments.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["learning/loss"] for line in metrics.read_text().splitlines()]
    return losses, ocp.PyTreeCheckpointer().restore(_checkpoints(folder) / LAST / "items")


def _checkpoints(folder):
    return folder / "run" / "checkpoints"


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "separate"])
def test_ten_steps_and_a_resumed_run(tmp_path, scanned):
    losses, whole = train(tmp_path, scanned=scanned)
    runs.assert_learns(losses)
    shutil.rmtree(_checkpoints(tmp_path) / LAST)
    assert max(int(x.name) for x in _checkpoints(tmp_path).iterdir() if x.name.isdigit()) == 5
    resumed_losses, resumed = train(tmp_path, scanned=scanned)
    assert resumed_losses == losses[-len(resumed_losses) :]
    runs.assert_same_bits(resumed, whole)
    shapes = {
        np.shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(whole)
        if "basis" in jax.tree_util.keystr(path)
    }
    assert shapes == ({(3, 32, 8), (3, 16, 8)} if scanned else {(32, 8), (16, 8)})


# One of each kind of MaxText's configurations.
CONFIGURATIONS = (
    "deepseek2-16b",
    "deepseek3.2-671b",
    "deepseek4-284b",
    "gemma-2b",
    "gemma2-2b",
    "gemma3-4b",
    "gemma4-26b",
    "gpt-oss-20b",
    "gpt3-6b",
    "kimi-k2-1t",
    "llama2-7b",
    "llama4-17b-16e",
    "mistral-7b",
    "mixtral-8x7b",
    "olmo3-7b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
    "qwen3-next-80b-a3b",
)
# What MaxText's table takes for matrices: biases of positions, a head, a scale of each layer.
FALLBACKS = ("position_bias", "hc_fn", "layer_scalar")


def maxtexts_axes(path, shape):
    """As its table means it."""
    if path[-1] in FALLBACKS:
        return None
    # GPT-3's, of which the table makes each head of each third a matrix.
    if path[-2:] == ("qkv_proj", "kernel"):
        return optax.contrib.MuonDimensionNumbers((0,), (-3, -2, -1))
    # It knows attention by its exact name, and so has a matrix for each head of Gemma 2's.
    is_attention = lambda name: name.startswith("self_attention")
    path = tuple("self_attention" if is_attention(name) else name for name in path)
    return muon_utils.transform_logic(path, shape)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_matrices_are_those_of_maxtexts_table_for_muon(name):
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    arguments = {"model_name": name, "skip_jax_distributed_system": True}
    arguments |= {"attention": "dot_product", "override_model_config": True}
    config = pyconfig.initialize(
        [None, str(base), *(f"{key}={value}" for key, value in arguments.items())]
    )
    devices = maxtext_utils.create_device_mesh(config)
    mesh = jax.sharding.Mesh(devices, config.mesh_axes)
    _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    params = nnx.state(model, nnx.Param)
    ours = dict(nnx.to_flat_state(sumo_optax.flax_dimension_numbers(params)))
    compared = 0
    for path, variable in nnx.to_flat_state(params):
        shape = variable.get_value().shape
        names = tuple(map(str, path))
        theirs = maxtexts_axes(names, shape)
        assert sides(ours[path], shape) == sides(theirs, shape), names
        compared += theirs is not None
    assert compared > 3
    report = sumo_optax.describe(8, params)
    assert {leaf.role for leaf in report.leaves} == {"matrix", "fallback"}


def sides(spec, shape):
    """Axes of inputs and outputs, without those of size 1."""
    spec = spec.get_value() if isinstance(spec, nnx.Variable) else spec
    if spec is None:
        return None
    axes = (spec.reduction_axis, spec.output_axis)
    return [[a % len(shape) for a in side if shape[a] > 1] for side in axes]
