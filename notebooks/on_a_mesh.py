# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # On a mesh
#
# This notebook simulates eight devices on one CPU. It shows where parameters and optimizer state
# lie, and what an update sends between devices. It takes less than a minute.

# %%
import importlib.util
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/sumo-optax"

if importlib.util.find_spec("sumo_optax") is None:  # on Colab, for example
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if subprocess.run([*pip, "sumo-optax"], capture_output=True).returncode:  # no release yet
        subprocess.run([*pip, f"sumo-optax @ git+{REPOSITORY}"], check=True)

# %%
import os

# This simulates eight devices on one CPU, if it is set before jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sumo_optax

mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
print(mesh)

# %% [markdown]
# ## Parameters on the mesh
#
# The model is one matrix and a bias. The mesh axis `fsdp` divides the rows of the matrix, and
# `tensor` divides its columns.

# %%
shardings = {
    "dense": {"kernel": NamedSharding(mesh, P("fsdp", "tensor")), "bias": NamedSharding(mesh, P())}
}
kernel = jax.random.normal(jax.random.key(0), (1024, 512))
params = jax.device_put({"dense": {"kernel": kernel, "bias": jnp.zeros(512)}}, shardings)
jax.debug.visualize_array_sharding(params["dense"]["kernel"])

# %% [markdown]
# ## The optimizer's state
#
# The basis (512 x 64) is divided like the columns of the matrix, and the moment (64 x 1024) like
# its rows. The other mesh axis divides the rank, so each of the eight devices holds an eighth of
# both.

# %%
tx = sumo_optax.sumo(3e-3, rank=64)
state_shardings = sumo_optax.state_shardings(tx, params, shardings)
# Simulated devices share few threads, so let one program end before the next one starts.
state = jax.block_until_ready(jax.jit(tx.init, out_shardings=state_shardings)(params))
basis, moment = (getattr(state[0], name)["dense"]["kernel"] for name in ("basis", "moment"))
print("basis", basis.shape, basis.sharding.spec)
jax.debug.visualize_array_sharding(basis)
print("moment", moment.shape, moment.sharding.spec)
print(
    "on each device",
    basis.addressable_shards[0].data.shape,
    moment.addressable_shards[0].data.shape,
)
assert basis.sharding.spec == P("tensor", "fsdp") and moment.sharding.spec == P("tensor", "fsdp")

# %% [markdown]
# ## One device computes the same update

# %%
update = jax.jit(tx.update, out_shardings=(shardings, state_shardings))
updates, _ = jax.block_until_ready(update(params, state, params))

# Through NumPy, because an array that moves straight to one device keeps the mesh in its type.
alone = jax.device_put(jax.device_get(params), jax.devices()[0])
alone_updates, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
a, b = (np.asarray(x["dense"]["kernel"]) for x in (updates, alone_updates))
print("relative difference", np.linalg.norm(a - b) / np.linalg.norm(b))
assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)

# %% [markdown]
# ## Communication
#
# This cell counts the collectives in the compiled program and finds the largest one. The matrix has
# 2 MiB. No collective of SUMO is larger than the moment, which has an eighth of that. Muon's
# Newton-Schulz steps send much more.

# %%
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(")
ARRAY = re.compile(r"(f32|s32|u32|pred)\[([\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(tx):
    state = sumo_optax.abstract_state(tx, params, shardings)  # shapes are enough to compile
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(tx.update, out_shardings=(shardings, state_shardings))
    program = update.lower(params, state, params).compile().as_text()
    sizes = []
    for results, kind in COLLECTIVE.findall(program):
        for dtype, shape in ARRAY.findall(results):
            count = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
            sizes.append((kind, int(count) * BYTES[dtype]))
    return sizes


sent = {}
for name, tx in {
    "AdamW": optax.adamw(1e-3),
    "SUMO, rank 64": sumo_optax.sumo(3e-3, rank=64),
    "Muon": optax.contrib.muon(1e-2),
}.items():
    sizes = collectives(tx)
    kinds = {kind: sum(k == kind for k, _ in sizes) for kind, _ in sizes}
    sent[name] = max((size for _, size in sizes), default=0)
    total = sum(size for _, size in sizes) / 2**20
    print(f"{name:14} {total:6.2f} MiB in all, largest {sent[name] / 2**20:.2f} MiB, {kinds}")
assert sent["AdamW"] == 0 < sent["SUMO, rank 64"] <= moment.nbytes == kernel.nbytes / 8

# %% [markdown]
# ## Memory of each device
#
# The planner, `python -m sumo_optax plan`, computes this from shapes alone and needs no devices.

# %%
command = "-m sumo_optax plan --preset 1b --rank 256 --mesh fsdp=4,tensor=2 --dtype float32"
print(subprocess.run([sys.executable, *command.split()], capture_output=True, text=True).stdout)
