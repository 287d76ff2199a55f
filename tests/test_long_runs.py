"""Twenty thousand steps: what may drift, leak, be compiled again or overflow."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import every_transformation

import sumo_optax
from sumo_optax._quantize import Quantized, dequantized

pytestmark = pytest.mark.slow

STEPS, AT_ONCE = 20_000, 10
PARAMS = {
    "dense": {"kernel": jnp.zeros((12, 6)), "bias": jnp.zeros(6)},
    "layers": {"kernel": jnp.zeros((2, 5, 8)), "bias": jnp.zeros((2, 8))},
}
LARGEST = jnp.iinfo(jnp.int32).max
# float32 rounding of a basis that is made orthonormal at every move.
ROUNDING = 1e-5
# Online PCA never makes its basis orthonormal again: its loss alone holds it there.
HELD_BY_ITS_LOSS = 0.3
# Numbers of at most 1 are held to 1/256, and sums have a few of them.
IN_8_BITS = 0.03
# Bytes; the allocator's unrest is a tenth of it, one small array kept per call would be four times.
GROWTH = 2**20


def resident_bytes():
    """Memory of this process, where the system tells."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


@every_transformation
def test_twenty_thousand_steps(make):
    tx = optax.chain(make(), optax.scale(-1e-2))
    target = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), PARAMS)

    @jax.jit
    def some_steps(params, state, first):
        def step(carry, t):
            params, state = carry
            noise = optax.tree.random_like(jax.random.key(t), params, jax.random.normal)
            grads = jax.tree.map(lambda p, x, e: p - x + 0.1 * e, params, target, noise)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), first + jnp.arange(AT_ONCE))[0]

    params, state = PARAMS, tx.init(PARAMS)
    for first in range(0, STEPS, AT_ONCE):
        params, state = some_steps(params, state, first)
        if first == STEPS // 4:
            arrays, resident = len(jax.live_arrays()), resident_bytes()
    assert len(jax.live_arrays()) == arrays
    assert resident_bytes() - resident < GROWTH
    assert some_steps._cache_size() == 1

    ours, in_few_bits = dequantized(state[0]), isinstance(state[0].basis, Quantized)
    assert ours.count == STEPS and ours.skipped == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    distance = lambda params: optax.tree.norm(optax.tree.sub(params, target))
    assert distance(params) < 0.5 * distance(PARAMS)
    online = isinstance(ours, sumo_optax.SubspaceState) and jax.tree.leaves(ours.projector)
    for Q in map(np.float64, jax.tree.leaves((ours.basis, getattr(ours, "row_basis", ())))):
        error = np.abs(np.swapaxes(Q, -1, -2) @ Q - np.eye(Q.shape[-1])).max()
        assert error < (HELD_BY_ITS_LOSS if online else IN_8_BITS if in_few_bits else ROUNDING)


@every_transformation
def test_counters_stay_at_the_largest_number(make):
    tx = make()
    update = jax.jit(tx.update)
    _, state = update(PARAMS, tx.init(PARAMS))
    state = state._replace(count=LARGEST, skipped=LARGEST)
    for grads in (PARAMS, jax.tree.map(lambda x: x + jnp.nan, PARAMS)):
        updates, state = update(grads, state)
        assert state.count == LARGEST and state.skipped == LARGEST
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
