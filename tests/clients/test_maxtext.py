"""MaxText's `train`, layers scanned and separate, on a mesh of 8 devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import maxtext
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs

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
    shapes = {np.shape(x) for x in _leaves(whole, "basis")}
    assert shapes == ({(3, 32, 8), (3, 16, 8)} if scanned else {(32, 8), (16, 8)})


def _leaves(tree, name):
    """All arrays under any branch of this name."""
    if not isinstance(tree, dict):
        return []
    inside = [x for k, sub in tree.items() if k != name for x in _leaves(sub, name)]
    flat = lambda x: [y for sub in x.values() for y in flat(sub)] if isinstance(x, dict) else [x]
    own = flat(tree[name]) if name in tree else []
    return inside + [x for x in own if hasattr(x, "shape")]
