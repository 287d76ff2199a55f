"""Where the coefficients of `polar_factor` come from: odd quintics, closest to 1 on an interval.

python benchmarks/quintics.py

Polar Express, arXiv 2505.16932, section 3, with a floor: no polynomial is made for less than the
interval [FLOOR, HIGHEST], so that none of them dips towards 0 inside the spectrum.
"""

import math

import numpy as np

FLOOR, HIGHEST = 0.07, 1.003
LAST = 0.6  # where the last three quintics take over
Quintic = tuple[float, float, float]  # a x + b x³ + c x⁵


def closest_to_one(low: float, high: float) -> tuple[Quintic, float]:
    """The quintic with the least largest distance from 1 on [low, high], by Remez; the distance."""
    second, third = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = error = 0.0
    for _ in range(100):
        points = np.array([low, second, third, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)  # of the derivative
        second, third = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return (a, b, c), error


def in_a_row(low: float, high: float, steps: int) -> tuple[list[Quintic], float]:
    """Each the closest to 1 on what the one before it makes of the interval."""
    quintics, error = [], 0.0
    for _ in range(steps):
        quintic, error = closest_to_one(low, high)
        quintics.append(quintic)
        low, high = 1 - error, 1 + error
    return quintics, error


def main() -> None:
    rounded = lambda quintic: tuple(round(float(x), 6) for x in quintic)
    steep, error = in_a_row(FLOOR * HIGHEST, HIGHEST, 3)
    print("steep:", *map(rounded, steep), f"within {error:.1e} of 1")
    print("slope at 0:", round(math.prod(a for a, _, _ in steep), 1))
    last, error = closest_to_one(LAST, HIGHEST)
    print("last:", rounded(last), f"within {error:.1e} of 1")


if __name__ == "__main__":
    main()
