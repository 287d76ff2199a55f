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
# # First steps
#
# This notebook trains a small transformer with AdamW and with SUMO. It shows the loss curves and
# the size of each optimizer's state. It takes about a minute on two cores.

# %%
import importlib.util
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/sumo-optax"

if importlib.util.find_spec("sumo_optax") is None:  # on Colab, for example
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if subprocess.run([*pip, "sumo-optax"], capture_output=True).returncode:  # no release yet
        subprocess.run([*pip, f"sumo-optax @ git+{REPOSITORY}"], check=True)

# %% [markdown]
# ## A small transformer
#
# The model reads bytes and predicts the next one. The text is Python's standard library, which
# every Python has. This cell is the same in all notebooks that train.

# %%
import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads would wait for XLA's

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import sumo_optax

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 64, 2, 4, 64, 32

sources = sorted(Path(os.__file__).parent.glob("*.py"))
text = np.frombuffer(b"".join(path.read_bytes() for path in sources)[:3_000_000], np.uint8)


def windows(seed, count=BATCH):
    """Random windows of the text, one byte longer than what the model reads."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, count)
    return text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)


def init_params(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 4 * LAYERS + 2))

    def kernel(*shape):
        return {"kernel": jax.random.normal(next(keys), shape) / shape[0] ** 0.5}

    def layer():
        return {
            "norm1": {"scale": jnp.ones(WIDTH)},
            "qkv": kernel(WIDTH, 3 * WIDTH),
            "out": kernel(WIDTH, WIDTH),
            "norm2": {"scale": jnp.ones(WIDTH)},
            "up": kernel(WIDTH, 4 * WIDTH),
            "down": kernel(4 * WIDTH, WIDTH),
        }

    return {
        "embed": jax.random.normal(next(keys), (256, WIDTH)),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": {"scale": jnp.ones(WIDTH)},
        "head": kernel(WIDTH, 256),
    }


def normed(x, scale):
    return x * scale / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def block(x, layer):
    h = normed(x, layer["norm1"]["scale"]) @ layer["qkv"]["kernel"]
    q, k, v = jnp.split(h.reshape(*h.shape[:2], HEADS, -1), 3, axis=-1)
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + h @ layer["out"]["kernel"]
    h = jax.nn.gelu(normed(x, layer["norm2"]["scale"]) @ layer["up"]["kernel"])
    return x + h @ layer["down"]["kernel"]


def loss_fn(params, tokens):
    """Mean nats per byte."""
    position = jnp.sin(jnp.arange(LENGTH)[:, None] / 10 ** jnp.linspace(0, 3, WIDTH))
    x = params["embed"][tokens[:, :-1]] + position
    for layer in params["layers"]:
        x = block(x, layer)
    logits = normed(x, params["norm"]["scale"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(tx, steps, look=lambda step, state: None):
    """Losses of all steps, and the loss on other windows; `look` sees every state."""
    params = init_params()
    state = jax.jit(tx.init)(params)

    @jax.jit
    def train_step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for step in range(steps):
        params, state, loss = train_step(params, state, windows(step + 1))
        losses.append(float(loss))
        look(step, state)
    return np.array(losses), float(jax.jit(loss_fn)(params, windows(0, 256)))


def schedule(peak, steps):
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, 0.1 * peak)


def smooth(losses, reach=10):
    return np.convolve(losses, np.ones(reach) / reach, mode="valid")


# %% [markdown]
# ## Two optimizers
#
# SUMO trains the matrices. AdamW trains the embedding, the head and the norms in both runs, with
# the same learning rate.

# %%
STEPS = 300
adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule(3e-3, STEPS)))
sumo = optax.chain(
    optax.clip_by_global_norm(1.0),
    sumo_optax.sumo(
        schedule(3e-3, STEPS), rank=WIDTH // 4, adam_learning_rate=schedule(3e-3, STEPS)
    ),
)

# %% [markdown]
# ## The size of each state
#
# `describe` shows which leaves are matrices and how large the state is. It allocates nothing.

# %%
print(sumo_optax.describe(sumo, init_params()))

# %%
held = {
    name: sumo_optax.state_bytes(tx, init_params())
    for name, tx in {"AdamW": adamw, "SUMO": sumo}.items()
}
for name, count in held.items():
    print(f"{name:6} {count / 2**10:8.1f} KiB")
assert held["SUMO"] < held["AdamW"]

# %% [markdown]
# ## Training

# %%
curves, final = {}, {}
for name, tx in {"AdamW": adamw, "SUMO": sumo}.items():
    curves[name], final[name] = train(tx, STEPS)
    print(f"{name:6} loss on other windows: {final[name]:.3f} nats per byte")
assert all(loss < 3 for loss in final.values()), "a model that knows byte frequencies has 3.2"

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, losses in curves.items():
    axes.plot(smooth(losses), label=f"{name}, {final[name]:.3f} at the end")
axes.set(xlabel="step", ylabel="loss, nats per byte (mean of 10 steps)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# One run of one very small model shows that training works. It does not compare the optimizers. The
# notebook `tuning` varies the rank, and `why_exact` looks inside the moments.
