"""Numbers in 8 or 4 bits: whole numbers v, and the largest number of every block of 128.

With u = v / top a number is `largest` u in 8 bits; in 4 bits `largest` (a u + (1 - a) u³), whose 16
levels are closer together near 0. Squares are never negative and are divided by: they are `largest`
u⁴, and v = 0 is an exact zero alone, so that what is not 0 does not become 0. The largest number of
a block is kept as it is, and what was dequantised and not changed is held again bit for bit.

Four bits are packed: two neighbours share a byte, along the blocks or, where that length is odd,
along the axis beside it. Matrices odd both ways take 8 bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sumo_optax._linalg import at_least_float32

_BLOCK = 128
# a above: with it the squared error of Gaussian numbers is 0.6 of that with 15 even levels.
_SLOPE = 0.67

# Parts of 2^32 whose multiples spread evenly, for steps and for places.
_GOLDEN = (np.uint32(2654435769), np.uint32(2246822519), np.uint32(3266489917))


class Code(NamedTuple):
    values: jax.Array
    largest: jax.Array


def encoded(
    x: jax.Array, t: jax.Array, *, bits: int, axis: int, squares: bool, nearest: bool
) -> Code:
    if axis == -2:
        code = encoded(x.mT, t, bits=bits, axis=-1, squares=squares, nearest=nearest)
        return Code(*(y.mT for y in code))
    packed = _packed_axis(x.shape) if bits == 4 else None
    top, offset = _code(8 if packed is None else 4, squares)
    largest = _largest(_blocks(x))
    x = at_least_float32(x)
    unit = x / _spread(jnp.where(largest == 0, 1, largest), x.shape[-1])
    threshold = 0.5 if nearest else _thresholds(x.shape, t)
    if squares:
        below = jnp.clip(jnp.floor(top * jnp.sqrt(jnp.sqrt(unit))), 1, top - 1)
        part = (unit * float(top) ** 4 - below**4) / ((below + 1) ** 4 - below**4)
        v = jnp.where(x > 0, below + (part > threshold), 0)
    elif packed is None:
        v = jnp.clip(jnp.ceil(top * unit - threshold), -offset, top)
    else:
        levels = _bent(np.arange(-offset, top + 1) / top)
        gaps = zip(levels[:-1], np.diff(levels), strict=True)
        passed = (unit > level + threshold * gap for level, gap in gaps)
        v = sum(passed, start=jnp.full(x.shape, -offset))
    v = v.astype(jnp.int32) + offset
    if packed is None:
        return Code((v - 128).astype(jnp.int8), largest)
    return Code(_packed(v.astype(jnp.uint8), packed), largest)


def decoded(values: jax.Array, largest: jax.Array, *, axis: int, squares: bool) -> jax.Array:
    if axis == -2:
        return decoded(values.mT, largest.mT, axis=-1, squares=squares).mT
    if values.dtype == jnp.uint8:
        beside = values.ndim > 1 and values.shape[-2] != largest.shape[-2]
        v, (top, offset) = _unpacked(values, -2 if beside else -1), _code(4, squares)
    else:
        v, (top, offset) = values.astype(jnp.int32) + 128, _code(8, squares)
    unit = (v.astype(jnp.int32) - offset).astype(at_least_float32(largest).dtype) / top
    if squares:
        unit = unit**4
    elif values.dtype == jnp.uint8:
        unit = _bent(unit)
    return (_spread(at_least_float32(largest), v.shape[-1]) * unit).astype(largest.dtype)


def _code(bits: int, squares: bool) -> tuple[int, int]:
    """The largest v, and what makes the least one 0."""
    return (2**bits - 1, 0) if squares else (2 ** (bits - 1), 2 ** (bits - 1) - 1)


def _bent(unit: Any) -> Any:
    """Levels closer together near 0, where most numbers are. 1 stays 1."""
    return _SLOPE * unit + (1 - _SLOPE) * unit**3


def _largest(blocks: jax.Array) -> jax.Array:
    """Of each block the number of the largest magnitude, with its sign."""
    most, least = jnp.max(blocks, axis=-1), jnp.min(blocks, axis=-1)
    return jnp.where(most >= -least, most, least)


def _thresholds(shape: tuple[int, ...], t: jax.Array) -> jax.Array:
    """Numbers inside (0, 1), spread evenly over the steps t in each place.

    The ends are left out, so that a number on a level stays there if rounding moved it a little.
    """
    last = shape[-2:]
    places = [jax.lax.broadcasted_iota(jnp.uint32, last, k) for k in range(len(last))]
    turns = _GOLDEN[0] * t.astype(jnp.uint32)
    turns += sum(step * place for step, place in zip(_GOLDEN[1:], places, strict=False))
    return jnp.clip((turns >> 8).astype(jnp.float32) * 2.0**-24, 2**-8, 1 - 2**-8)


def _blocks(x: jax.Array) -> jax.Array:
    """(..., n) as (..., blocks, up to 128), with zeros for what is missing of the last."""
    n = x.shape[-1]
    size = min(_BLOCK, max(n, 1))
    count = -(-n // size)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * size - n)])
    return padded.reshape(*x.shape[:-1], count, size)


def _spread(largest: jax.Array, n: int) -> jax.Array:
    """Of each of n numbers that of its block."""
    return jnp.repeat(largest, _BLOCK, axis=-1, total_repeat_length=_BLOCK * largest.shape[-1])[
        ..., :n
    ]


def _packed_axis(shape: tuple[int, ...]) -> int | None:
    return next((axis for axis in (-1, -2)[: len(shape)] if shape[axis] % 2 == 0), None)


def _packed(v: jax.Array, axis: int) -> jax.Array:
    axis += v.ndim
    pairs = v.reshape(*v.shape[:axis], v.shape[axis] // 2, 2, *v.shape[axis + 1 :])
    low, high = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    return low | high << 4


def _unpacked(values: jax.Array, axis: int) -> jax.Array:
    axis += values.ndim
    pairs = jnp.stack([values & 15, values >> 4], axis=axis + 1)
    return pairs.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])
