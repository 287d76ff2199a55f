"""Array mathematics on stacks of small matrices: polar factors, orthonormal bases. Knows no optax, no trees.

A stack is (B, m, n), or has any other number of axes before the two of a matrix.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

# Odd quintics a x + b x³ + c x⁵ from coefficients.py. Three in a row take [0.07, 1] to within 0.0014
# of 1 and multiply what is smaller by 27: any steeper, and a float32 Gram matrix is too coarse.
_STEEP = (
    (6.218914, -16.195419, 11.49947),
    (2.317097, -1.68362, 0.420399),
    (1.893016, -1.269875, 0.376993),
)
# Newton-Schulz of third order: an error e of a singular value becomes 5/2 e³.
_POLISH = (15 / 8, -10 / 8, 3 / 8)
# What is below 0.816 goes to 0, the rest to 1. After four steep triples 4 roundings are at 0.25,
# which the quintic before it takes there.
_SMOOTHSTEP = (0, 5 / 2, -3 / 2)
_DROP = (
    ((3.809688, -7.127689, 4.472581), _SMOOTHSTEP, _SMOOTHSTEP),
    (_SMOOTHSTEP, _SMOOTHSTEP, _POLISH),
)
# Singular values whose squares are within this of 1 are 1 to rounding after two or three polishes.
_NEAR = 0.15


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
        y = unit_scale(at_least_float32(y)).reshape(-1, *y.shape[-2:])
        o = _POLAR[method](y).astype(x.dtype).reshape(*x.shape[:-2], *y.shape[-2:])
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def polar(X: jax.Array, drop: bool = True) -> jax.Array:
    """Polar factors of a stack (B, r, n), r <= n, of any scale.

    Directions lost in rounding give 0, or with `drop=False` a row of length 1 like the others,
    unless they are exactly 0.
    """
    together = functools.partial(_by_products, drop=drop)
    if X.shape[0] == 1:
        return together(X)
    # Batched products make a CPU stop for good now and then, and a TPU compile for long.
    one_by_one = functools.partial(jax.lax.map, together)
    return jax.lax.platform_dependent(X, cpu=one_by_one, tpu=one_by_one, default=together)


def _by_products(X: jax.Array, *, drop: bool) -> jax.Array:
    """Y <- W(YYᵀ) Y with polynomials W that enlarge small singular values, until all are about 1."""
    double = X.dtype == jnp.float64
    triples = (_STEEP,) * (10 if double else 4) + (_DROP if drop else (_STEEP,) * 4)
    table = jnp.asarray(np.array(triples).transpose(0, 2, 1), X.dtype)

    def unfinished(carry):
        step, _, A = carry
        far = _norm(A - _identity(A)) > _NEAR  # False for NaN, which stays so
        return (step < len(triples)) & jnp.any(far)

    def enlarge(carry):
        step, Y, A = carry
        Y = _polynomial(A, table[step]) @ Y
        return step + 1, Y, Y @ Y.mT

    polish = jnp.asarray([[x] * (3 if double else 2) for x in _POLISH], X.dtype)
    with jax.default_matmul_precision("highest"):
        _, Y, A = jax.lax.while_loop(unfinished, enlarge, (0, *_scaled(X)))
        return _polynomial(A, polish) @ Y


def _polynomial(A: jax.Array, quintics: jax.Array) -> jax.Array:
    """W such that W Y has the singular values of Y after these quintics (3, k), where A = YYᵀ."""
    I = _identity(A)

    def quintic(carry, coefficients):
        A, W = carry
        a, b, c = coefficients
        w = a * I + b * A + c * (A @ A)
        return (w @ A @ w, w @ W), None

    (_, W), _ = jax.lax.scan(quintic, (A, I), tuple(quintics))
    return W


def _scaled(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X at a norm of just below 1, and XXᵀ; 0 stays 0."""
    Y = unit_scale(X)
    A = Y @ Y.mT
    trace = _or_one(jnp.trace(A, axis1=-2, axis2=-1)[..., None, None])
    # ||A|| <= ||A⁴||_F^(1/4): at most 1.5 times the square of the norm.
    A2 = (A / trace) @ (A / trace)
    bound = trace * _or_one(_norm(A2 @ A2)) ** 0.25
    return Y / bound**0.5, A / bound


def _norm(A):
    return jnp.linalg.norm(A, axis=(-2, -1), keepdims=True)


def _or_one(x):
    return jnp.where(x == 0, 1, x)


def _identity(A):
    return jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)


@polar.defjvp
def _polar_jvp(drop, primals, tangents):
    """dO = Ω O + S⁺ dX (I - OᵀO), S = XOᵀ, ΩS + SΩ = dX Oᵀ - O dXᵀ, in the eigenvectors of S."""
    (X,), (dX,) = primals, tangents
    O = polar(X, drop)
    scale = _or_one(jnp.max(jnp.abs(X), axis=(-2, -1), keepdims=True))
    with jax.default_matmul_precision("highest"):
        s, U = jnp.linalg.eigh((X / scale) @ O.mT)
        s, kept = s[..., None], ~(s <= 4 * jnp.finfo(s.dtype).eps * s[..., -1:])[..., None]
        inverse = lambda s, kept: jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
        O_, dX = U.mT @ O, U.mT @ (dX / scale)
        C = dX @ O_.mT
        Omega = inverse(s + s.mT, kept | kept.mT) * (C - C.mT)
        return O, U @ (Omega @ O_ + inverse(s, kept) * (dX - C @ O_))


def _newton_schulz(x: jax.Array) -> jax.Array:
    a, b, c = _NEWTON_SCHULZ
    x = _at_most_one(x)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


_POLAR = {
    "auto": polar,
    "svd": _polar_by_svd,
    "newton_schulz": _newton_schulz,
}


def orthonormal_columns(y: jax.Array, completion: jax.Array | None = None) -> jax.Array:
    rows = _at_most_one(unit_scale(y.mT))
    if completion is not None:
        rows += (16 + rows.shape[-2] / 8) * float(jnp.finfo(rows.dtype).eps) * completion.mT
    stack = rows.reshape(-1, *rows.shape[-2:])
    return polar(stack, completion is None).reshape(rows.shape).mT


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (m x k), s (1 x k) and V (n x k) of x = U diag(s) Vᵀ, k the short side; of any scale."""
    largest = largest_entry(x)
    u, s, vt = jnp.linalg.svd(x / largest, full_matrices=False)
    return u, s[..., None, :] * largest, vt.mT
