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
# # Tuning the rank and the refresh interval
#
# This notebook trains the same small transformer at several ranks and with several ways to move the
# basis. It plots the loss curves and the metrics of each run. It takes about two minutes on two
# cores.

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


# %%
STEPS = 120


def run(rank, **options):
    """Loss on other windows, the curve, and the subspace's metrics every ten steps."""
    sumo = sumo_optax.sumo(
        schedule(3e-3, STEPS),
        rank,
        adam_learning_rate=schedule(3e-3, STEPS),
        metrics=True,
        **options,
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), sumo)
    read = jax.jit(lambda state: sumo_optax.subspace_metrics(state).summary)
    rows = []

    def look(step, state):
        if step % 10 == 9:
            summary = read(state)
            rows.append({"step": step + 1} | {name: float(x) for name, x in summary.items()})

    losses, final = train(tx, STEPS, look)
    return losses, final, rows


def plot(runs, title):
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, (losses, final, rows) in runs.items():
        axes[0].plot(smooth(losses), label=f"{name}: {final:.3f}")
        for panel, metric in zip(axes[1:], ("captured", "effective_rank"), strict=True):
            panel.plot([r["step"] for r in rows], [r[metric] for r in rows], label=name)
    axes[0].set(title=title, xlabel="step", ylabel="loss, nats per byte")
    axes[1].set(title="captured gradient energy", xlabel="step", ylim=(0, 1.05))
    axes[2].set(title="effective rank of the moment", xlabel="step")
    axes[0].legend(frameon=False)
    plt.show()


# %% [markdown]
# ## The rank
#
# The width of the model is 64. The state and the cost of a step grow with the rank.

# %%
by_rank = {f"rank {rank}": run(rank) for rank in (4, 16, 64)}
plot(by_rank, "tracking, several ranks")
for name, (_, final, _) in by_rank.items():
    count = sumo_optax.state_bytes(sumo_optax.scale_by_sumo(int(name.split()[1])), init_params())
    print(f"{name:8} {final:.3f} nats per byte, {count / 2**10:6.1f} KiB of state")
assert by_rank["rank 64"][1] < by_rank["rank 4"][1]

# %% [markdown]
# ## How often the basis moves
#
# At rank 16, tracking moves the basis a little at a time, and a refresh moves it all the way to the
# dominant subspace of the gradient.

# %%
periodic = {"basis": "randomized_svd"}
by_interval = {
    "tracking every 10 steps": by_rank["rank 16"],
    "tracking every step": run(16, refresh_every=1),
    "refreshed every 10 steps": run(16, refresh_every=10, **periodic),
    "refreshed every 50 steps": run(16, refresh_every=50, **periodic),
}
plot(by_interval, "rank 16, several intervals")
for name, (_, final, _) in by_interval.items():
    print(f"{name:24} {final:.3f} nats per byte")

# %% [markdown]
# Each curve has one seed, so a difference of 0.01 means nothing. Draw these curves for your own
# model before you choose.
