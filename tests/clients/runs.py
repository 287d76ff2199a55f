"""What every trainer's test asserts: ten steps learn, and five and five are the same bits."""

from collections.abc import Sequence

import jax
import numpy as np

STEPS, VOCAB, BATCH, LENGTH = 10, 32, 8, 12


def tokens(step: int) -> np.ndarray:
    """Of a batch, which counts up by ones from places that depend on the step alone."""
    start = np.random.default_rng(step).integers(0, VOCAB, (BATCH, 1))
    return (start + np.arange(LENGTH)) % VOCAB


def assert_learns(losses: Sequence[float]) -> None:
    assert len(losses) == STEPS and np.all(np.isfinite(losses))
    assert losses[-1] < 0.9 * losses[0], losses


def assert_same_bits(a, b) -> None:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    same = [np.array_equal(_bits(x), _bits(y)) for x, y in pairs if hasattr(x, "dtype")]
    assert same and all(same)


def _bits(x) -> np.ndarray:
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def matrices(report) -> dict[str, tuple]:
    """Path, sides and batch of each leaf that is a matrix. No leaf may be ambiguous."""
    assert {leaf.role for leaf in report.leaves} <= {"matrix", "fallback"}
    return {x.path: (x.m, x.n, x.batch) for x in report.leaves if x.role == "matrix"}
