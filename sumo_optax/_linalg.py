"""Array mathematics on one matrix: polar factor, orthonormal bases. Knows no optax, no trees."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

PolarMethod = Literal["auto", "svd", "reduced", "newton_schulz"]

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


def largest_entry(x: jax.Array) -> jax.Array:
    """max |x|, or 1 where x = 0."""
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, 1)


def unit_scale(x: jax.Array) -> jax.Array:
    """`x` over its largest entry, so that squares of 1e30 and 1e-30 stay in range; 0 stays 0."""
    return x / largest_entry(x)


def _at_most_one(x: jax.Array) -> jax.Array:
    """`x` of largest entry 1 at Frobenius norm 1: no singular value is above 1; 0 stays 0."""
    return x / jnp.maximum(jnp.linalg.norm(x), 1)


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """On a CPU with the left one written out: a transpose there makes it take 2 to 5 times."""
    return _stored(left) @ right


def _stored(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def frobenius_norm(x: jax.Array, *, scale: jax.Array) -> jax.Array:
    """||x||, safe against overflow of the squares where `scale` has entries of its size."""
    largest = largest_entry(scale)
    return largest * jnp.linalg.norm(x / largest)


def column_norms(x: jax.Array) -> jax.Array:
    """Euclidean norms of the columns, safe against overflow of the squares."""
    largest = jnp.max(jnp.abs(x), axis=-2)
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.linalg.norm(x / scale[..., None, :], axis=-2)


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
    of_one = lambda y: _POLAR[method](unit_scale(y))
    y = y.astype(jnp.promote_types(x.dtype, jnp.float32))
    o = jnp.vectorize(of_one, signature="(r,n)->(r,n)")(y).astype(x.dtype)
    return o if wide else o.mT


def check_polar_method(method: str) -> None:
    if method not in get_args(PolarMethod):
        raise ValueError(f"polar method must be one of {get_args(PolarMethod)}, got {method!r}")


@jax.custom_batching.custom_vmap
@_highest_precision
def _polar_auto(x: jax.Array) -> jax.Array:
    """By eigenvectors of xxᵀ; robustly where x, or any matrix of a batch, is ill conditioned."""
    eigenvectors, eigenvalues = jax.lax.linalg.eigh(x @ x.mT, symmetrize_input=False)
    # False for a NaN, which is one either way, and no matter of the rest of a batch.
    ill = eigenvalues[..., 0] * _WELL_CONDITIONED**2 <= eigenvalues[..., -1]
    short, long = x.shape[-2:]
    robust = jnp.vectorize(
        _polar_reduced if long >= 2 * short else _polar_by_svd, signature="(r,n)->(r,n)"
    )
    return jax.lax.cond(
        jnp.any(ill), lambda x, _: robust(x), _polar_by_eigenvectors, x, eigenvectors
    )


@_polar_auto.def_vmap
def _(_, __, x: jax.Array) -> tuple[jax.Array, bool]:
    """One predicate for all: one each would turn `lax.cond` into doing both."""
    return _polar_auto(x), True


def _polar_by_eigenvectors(x: jax.Array, U: jax.Array) -> jax.Array:
    """polar(x) = U polar(Uᵀx), where Uᵀx = D (I + H) Z: Z has orthonormal rows, and H is small.

    D (I + H) = (I + K) P with K antisymmetric and P symmetric, so to first order in H the polar
    factor is U (I + K - H) D⁻¹Uᵀx with K_ij = H_ij (d_i - d_j) / (d_i + d_j).
    """
    rows = U.mT @ x
    d = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    rows = rows / d
    H = (rows @ rows.mT - jnp.eye(x.shape[-2], dtype=x.dtype)) / 2
    return (U - U @ (H * (2 * d.mT / (d + d.mT)))) @ rows


def _polar_by_svd(x: jax.Array) -> jax.Array:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return (u * above_rounding(s)) @ vt


def above_rounding(s: jax.Array) -> jax.Array:
    """Which singular values, the largest first, are not lost in rounding; NaN is to be seen."""
    return ~(s <= 4 * jnp.finfo(s.dtype).eps * s[0])


@_highest_precision
def _polar_reduced(x: jax.Array) -> jax.Array:
    """polar(x) = polar(x Zᵀ) Z, where the rows of Z (r x n) are a basis of the rows of x.

    Z = T Y, so that the last Cholesky-QR pass is r x r. Where x is rank deficient so is Z, up to
    rows of rounding noise; there x Zᵀ is noise as well, which the polar factor drops.
    """
    Y = _at_most_one(x)
    for _ in range(2):
        _, Y = _cholesky_pass(Y)
    T = _whitening(Y @ Y.T)
    return (_polar_by_svd(x @ Y.T @ T.T) @ T) @ Y


def _whitening(gram: jax.Array) -> jax.Array:
    """L⁻¹ with LLᵀ = gram + shift: one shifted Cholesky-QR pass is Y <- L⁻¹ Y, gram = YYᵀ.

    Y has singular values of at most 1; a pass takes its condition number k to about k / 500.
    """
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    lower = jax.lax.linalg.cholesky(gram + _shift(gram) * identity, symmetrize_input=False)
    # The inverse, since a triangular solve with long right-hand sides is slow and serial.
    inverse = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return inverse * (1 + _shift(gram)) ** 0.5


def _shift(gram: jax.Array) -> float:
    """Above the rounding error of a Gram matrix, or the factorisation of a singular one fails."""
    return (16 + gram.shape[0] / 8) * float(jnp.finfo(gram.dtype).eps)


@_highest_precision
def _newton_schulz(x: jax.Array) -> jax.Array:
    a, b, c = _NEWTON_SCHULZ
    x = _at_most_one(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


_POLAR = {
    "auto": _polar_auto,
    "svd": _polar_by_svd,
    "reduced": _polar_reduced,
    "newton_schulz": _newton_schulz,
}


@_highest_precision
def orthonormal_columns(
    y: jax.Array, completion: jax.Array | None = None, *, passes: int = 3
) -> jax.Array:
    """An orthonormal basis of the columns of y (m x r), completed where they are dependent.

    The completion, of y's shape, with columns of about unit length, enters at the level of
    rounding, from which three passes raise it to one. Without it, columns of 0 remain so. Fewer
    passes leave the directions of y shorter that are small: those below 1e-5 of the largest after
    two, while after one the condition number has fallen by about 500.
    """
    rows = _at_most_one(unit_scale(y.T))
    if completion is not None:
        rows += _shift(rows) * completion.T
    whitening, rows = _cholesky_pass(_stored(rows))
    if passes > 1:
        _, rows = _cholesky_pass(rows)
    if passes > 2:
        # ||L⁻¹|| is at least one over the least singular value: where that is above the root of
        # the shift, two passes leave errors below the shift.
        enough = jnp.sum(whitening**2) * _shift(whitening) < 1
        rows = jax.lax.cond(enough, lambda rows: rows, lambda rows: _cholesky_pass(rows)[1], rows)
    return rows.T


def _cholesky_pass(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    whitening = _whitening(rows @ rows.T)
    return whitening, whitening @ rows


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (m x k), s and V (n x k) of x = U diag(s) Vᵀ, k the short side; of any scale."""
    largest = largest_entry(x)
    u, s, vt = jnp.linalg.svd(x / largest, full_matrices=False)
    return u, s * largest, vt.T
