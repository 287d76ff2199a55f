"""The polar factor: how exact each method is, and what it costs over five Newton-Schulz steps.

python benchmarks/polar.py                 # r of 8 to 512 at n = 2048: seconds
"""

import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import record
import tyro

import sumo_optax

METHODS = ("svd", "auto", "newton_schulz")
CONDITIONS = (1e1, 1e3, 1e5)
TIMED = CONDITIONS[:2]


@dataclasses.dataclass(frozen=True)
class Config:
    """Random matrices with singular values spaced evenly on a log scale."""

    ranks: tuple[int, ...] = (8, 32, 128, 512)
    """Short sides r."""
    n: int = 2048
    """The long side."""
    repeats: int = 21
    """Times each is timed; the median counts."""


def matrix(r: int, n: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix with that condition number; and its polar factor, from float64."""
    rng = np.random.default_rng(r)
    U, V = (np.linalg.qr(rng.normal(size=(side, r)))[0] for side in (r, n))
    x = ((U * np.geomspace(1, 1 / condition, r)) @ V.T).astype(np.float32)
    u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return x, u @ vt


def milliseconds(method: str, x: np.ndarray, repeats: int) -> float:
    fn = functools.partial(sumo_optax.polar_factor, method=method)
    jax.block_until_ready(fn(x))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(fn(x))
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def measure(method: str, r: int, config: Config) -> dict[str, Any]:
    """Relative errors in the Frobenius norm; times, which "auto" has two of."""
    row: dict[str, Any] = {"method": method, "r": r, "n": config.n}
    for condition in CONDITIONS:
        x, exact = matrix(r, config.n, condition)
        error = np.asarray(sumo_optax.polar_factor(x, method=method), np.float64) - exact
        row[f"error_at_{condition:.0e}"] = float(np.linalg.norm(error) / r**0.5)
    for condition in TIMED:
        x, _ = matrix(r, config.n, condition)
        row[f"ms_at_{condition:.0e}"] = milliseconds(method, x, config.repeats)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    rows = []
    for r in config.ranks:
        of_rank = [measure(method, r, config) for method in METHODS]
        for row, condition in itertools.product(of_rank, TIMED):
            ms = f"ms_at_{condition:.0e}"
            row[f"over_newton_schulz_at_{condition:.0e}"] = row[ms] / of_rank[-1][ms]
        rows += of_rank
    print("written:", record.write("polar", rows))
    columns = {"r": "{r}", "method": "{method}"}
    times = {
        f"over Newton-Schulz at {c:.0e}": f"{{over_newton_schulz_at_{c:.0e}:.2f}}" for c in TIMED
    }
    errors = {f"error at {c:.0e}": f"{{error_at_{c:.0e}:.1e}}" for c in CONDITIONS}
    print(record.table(rows, columns | times | errors))


if __name__ == "__main__":
    main()
