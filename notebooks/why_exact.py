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
# # Why exact
#
# SUMO's step is the polar factor of a small moment. It has the same singular vectors as the moment,
# and all of its singular values are one. Muon approximates the polar factor by five Newton-Schulz
# steps, and the error depends on the condition number of the moment. This notebook trains a model
# and measures the error on real moments. It takes about a minute on two cores.

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
# ## Moments through training
#
# This cell keeps the moment of every matrix at every tenth step.

# %%
STEPS, RANK, KERNELS = 200, 16, ("qkv", "out", "up", "down")
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    sumo_optax.sumo(schedule(3e-3, STEPS), RANK, adam_learning_rate=schedule(3e-3, STEPS)),
)
seen = []


def look(step, state):
    if step % 10 == 9:
        moments = state[1][0].moment["layers"]
        kernels = {
            name: [np.asarray(layer[name]["kernel"]) for layer in moments] for name in KERNELS
        }
        seen.append((step + 1, kernels))


_, final = train(tx, STEPS, look)
print(f"loss on other windows: {final:.3f}")


def singular_values(moment):
    return np.linalg.svd(moment.astype(np.float64), compute_uv=False)


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for step, kernels in seen[:: len(seen) // 5]:
    s = singular_values(kernels["up"][0])
    left.semilogy(np.arange(1, RANK + 1), s / s[0], "o-", label=f"step {step}")
left.set(xlabel="number", ylabel="singular value over the largest", title="moment of up 0")
left.legend(frameon=False)
for name in KERNELS:
    for layer in range(LAYERS):
        conditions = [(s := singular_values(k[name][layer]))[0] / s[-1] for _, k in seen]
        right.semilogy([step for step, _ in seen], conditions, label=f"{name} {layer}")
right.set(xlabel="step", ylabel="condition number", title="all moments")
right.legend(frameon=False, ncols=2)
plt.show()

# %% [markdown]
# ## The error of five Newton-Schulz steps
#
# The relative error is $\|O_{NS} - O\| / \|O\|$, where $O$ is the polar factor from an SVD in
# float64. The dots are real moments. The lines are artificial moments, whose singular values are
# evenly spaced on a logarithmic scale.


# %%
def exact(moment):
    u, _, vt = np.linalg.svd(moment.astype(np.float64), full_matrices=False)
    return u @ vt


def error(moment, method):
    o = exact(moment)
    approximate = sumo_optax.polar_factor(jnp.asarray(moment, jnp.float32), method=method)
    return np.linalg.norm(approximate - o) / np.linalg.norm(o)


def made(condition, shape=(RANK, WIDTH)):
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    return (u * np.geomspace(1, 1 / condition, shape[0])) @ vt


grid = np.geomspace(1, 1e5, 16)
line = {method: [error(made(c), method) for c in grid] for method in ("newton_schulz", "auto")}
real = [
    ((s := singular_values(m))[0] / s[-1], error(m, "newton_schulz"), error(m, "auto"))
    for _, kernels in seen
    for stack in kernels.values()
    for m in stack
]
conditions, newton_schulz, ours = map(np.array, zip(*real, strict=True))
quantities = {
    "condition number": conditions,
    "error of Newton-Schulz": newton_schulz,
    "error of polar_factor": ours,
}
for name, values in quantities.items():
    print(f"{name:22}  median {np.median(values):8.2g}  most {max(values):8.2g}")
assert max(ours) < 1e-2 < np.median(newton_schulz)

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.loglog(grid, line["newton_schulz"], color="tab:orange", label="five Newton-Schulz steps")
axes.loglog(grid, line["auto"], color="tab:blue", label="polar_factor, float32")
axes.loglog(conditions, newton_schulz, ".", color="tab:orange", alpha=0.4)
axes.loglog(conditions, ours, ".", color="tab:blue", alpha=0.4)
axes.set(xlabel="condition number of the moment", ylabel="relative error of the polar factor")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Newton-Schulz has an error even at condition number 1, because its polynomial does not converge to
# one. At larger condition numbers the five steps do not bring the weakest directions up to one, so
# the step is too short in those directions.
