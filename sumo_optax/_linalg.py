"""Array mathematics on stacks of small matrices: polar factors, orthonormal bases. Knows no optax, no trees.

A stack is (B, m, n), or has any other number of axes before the two of a matrix.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

PolarMethod = Literal["auto", "svd", "newton_schulz"]

# Muon's quintic: steep at zero, and never settling at one.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Up to this condition number the polar factor by eigenvectors is as exact as by the SVD.
_WELL_CONDITIONED = 64


def _highest_precision(fn):
    """Factorisations need full float32 products, which GPUs and TPUs do not give by default."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return wrapped


def at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def choose(flags: jax.Array, a: Any, b: Any) -> Any:
    """Of two trees of stacks (B, ...) the matrices of the first where its flag (B,) is set."""
    of = lambda x, y: jnp.where(flags.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
    return jax.tree.map(of, a, b)


def largest_entry(x: jax.Array) -> jax.Array:
    """max |x| of each matrix, (..., 1, 1), or 1 where x = 0."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    return jnp.where(largest > 0, largest, 1)


def unit_scale(x: jax.Array) -> jax.Array:
    """`x` over its largest entry, so that squares of 1e30 and 1e-30 stay in range; 0 stays 0."""
    return x / largest_entry(x)


def _at_most_one(x: jax.Array) -> jax.Array:
    """`x` of largest entry 1 at Frobenius norm 1: no singular value is above 1; 0 stays 0."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1)


def written_out(x: jax.Array) -> jax.Array:
    """On a CPU a product takes 2 to 5 times as long where its left factor is a transpose."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def frobenius_norm(x: jax.Array) -> jax.Array:
    """||x|| of each matrix, (..., 1, 1), safe against overflow of the squares."""
    largest = largest_entry(x)
    return largest * jnp.linalg.norm(x / largest, axis=(-2, -1), keepdims=True)


def column_norms(x: jax.Array) -> jax.Array:
    """Euclidean norms of the columns, (..., 1, n), safe against overflow of the squares."""
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.linalg.norm(x / scale, axis=-2, keepdims=True)


@functools.partial(jax.jit, static_argnames="method")
def polar_factor(x: jax.Array, *, method: PolarMethod = "auto") -> jax.Array:
    r"""The orthogonal polar factor of a matrix, or of a batch of matrices.

    With the singular value decomposition :math:`X = U \Sigma V^\top`,

    .. math:: \mathrm{polar}(X) = \sum_{\sigma_i > 4 \epsilon \sigma_1} u_i v_i^\top

    which is :math:`U V^\top` where X has full rank. Directions whose singular value is lost in
    rounding (:math:`\epsilon` is the machine's) give 0, not noise, and so polar(0) = 0.

    Args:
      x: array of shape (..., m, n), real floating point. Anything below float32 is computed in
        float32; the scale of x does not matter.
      method: ``"svd"`` is the definition above, and the oracle of the others. ``"reduced"``
        first brings the short side r to an r x r core by three shifted Cholesky-QR passes, which
        are products, and takes the SVD there: as exact, and faster where one side is long.
        ``"auto"`` takes the eigenvectors of the Gram matrix and corrects them for its rounding
        errors, which is as exact and twice as fast up to a condition number of 64; where x (any
        matrix of a batch) is worse conditioned, it picks one of the two by shape.
        ``"newton_schulz"`` is five steps of Muon's iteration, for comparison only: far from exact
        where x is ill conditioned.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      ValueError: x has fewer than two axes, or the method is unknown.

    Examples:
      >>> import jax.numpy as jnp, sumo_optax
      >>> sumo_optax.polar_factor(jnp.array([[3.0, 0.0], [0.0, -0.5]])).round(3).tolist()
      [[1.0, 0.0], [0.0, -1.0]]

    References:
      SUMO, `arXiv 2505.24749 <https://arxiv.org/abs/2505.24749>`_, Algorithm 1, block 2;
      Fukaya et al., *Shifted Cholesky QR*, `arXiv 1809.11085 <https://arxiv.org/abs/1809.11085>`_.
    """
    x = jnp.asarray(x)
    check_polar_method(method)
    if x.ndim < 2:
        raise ValueError(f"polar_factor needs an array of shape (..., m, n), got shape {x.shape}")
    if x.size == 0:
        return x
    wide = x.shape[-2] <= x.shape[-1]
    y = x if wide else x.mT
    with jax.default_matmul_precision("highest"):
        o = _POLAR[method](unit_scale(at_least_float32(y))).astype(x.dtype)
    return o if wide else o.mT


def check_polar_method(method: str) -> None:
    if method not in get_args(PolarMethod):
        raise ValueError(f"polar method must be one of {get_args(PolarMethod)}, got {method!r}")


def _polar_by_svd(x: jax.Array) -> jax.Array:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return (u * above_rounding(s)[..., None, :]) @ vt


def above_rounding(s: jax.Array) -> jax.Array:
    """Which singular values, the largest first, are not lost in rounding; NaN is to be seen."""
    return ~(s <= 4 * jnp.finfo(s.dtype).eps * s[..., :1])


def _newton_schulz(x: jax.Array) -> jax.Array:
    a, b, c = _NEWTON_SCHULZ
    x = _at_most_one(x)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


_POLAR = {
    "auto": _polar_by_svd,
    "svd": _polar_by_svd,
    "newton_schulz": _newton_schulz,
}


def orthonormal_columns(y: jax.Array, completion: jax.Array | None = None) -> jax.Array:
    rows = _at_most_one(unit_scale(y.mT))
    if completion is not None:
        rows += (16 + rows.shape[-2] / 8) * float(jnp.finfo(rows.dtype).eps) * completion.mT
    u, s, vt = jnp.linalg.svd(rows, full_matrices=False)
    return ((u * ((s > 0) if completion is not None else above_rounding(s))[..., None, :]) @ vt).mT


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (m x k), s (1 x k) and V (n x k) of x = U diag(s) Vᵀ, k the short side; of any scale."""
    largest = largest_entry(x)
    u, s, vt = jnp.linalg.svd(x / largest, full_matrices=False)
    return u, s[..., None, :] * largest, vt.mT
