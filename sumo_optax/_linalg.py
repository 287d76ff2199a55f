"""Array mathematics on stacks of matrices: polar factors, orthonormal bases.

A stack is (B, m, n), one matrix m x n after the other. Knows no optax and no trees of parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from sumo_optax._mesh import over_devices

PolarMethod = Literal["auto", "svd", "newton_schulz"]

# Muon's quintic: steep at zero, and never settling at one.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Odd quintics a x + b x³ + c x⁵ for singular values, made by benchmarks/quintics.py. Three steep
# ones in a row take [0.07, 1.003] to within 0.0014 of 1 and multiply what is smaller by 27: steeper
# ones ask more of a Gram matrix than float32 has.
_STEEP = (
    (6.218914, -16.195419, 11.49947),
    (2.317097, -1.68362, 0.420399),
    (1.893016, -1.269875, 0.376993),
)
# Newton-Schulz of third order makes an error e of a singular value 5/2 e³.
_POLISH = (15 / 8, -10 / 8, 3 / 8)
# [0.6, 1] comes to within 0.0101 of 1, and then to 1 but for rounding, in float64 as well.
_LAST = ((2.426874, -2.575145, 1.156922), _POLISH, _POLISH)
# How far the squares of singular values may be from 1 when these take over.
_NEAR = 1 - 0.6**2
# Smoothstep takes what is below 0.816 towards 0 and the rest to 1. Four steep triples bring 2.5
# roundings of the largest singular value to 0.155, three polishes that to 0.816.
_SMOOTHSTEP = (0, 5 / 2, -3 / 2)
_DROP = ((_POLISH,) * 3, (_SMOOTHSTEP,) * 3)


def at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(wide(x.dtype))


def wide(dtype: Any) -> Any:
    """The dtype of small algebra: float32, or float64 for that."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def choose(flags: jax.Array, a: Any, b: Any) -> Any:
    """Of two trees of stacks (B, ...) the matrices of the first where its flag (B,) is set."""
    of = lambda x, y: jnp.where(flags.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
    return jax.tree.map(of, a, b)


def _or_one(x: jax.Array) -> jax.Array:
    return x + (x == 0).astype(x.dtype)


def _square(x: jax.Array) -> jax.Array:
    """||x||² of each matrix, (..., 1, 1)."""
    return jnp.sum(x * x, axis=(-2, -1), keepdims=True)


def largest_entry(x: jax.Array) -> jax.Array:
    """max |x| of each matrix, (..., 1, 1), or 1 where x = 0."""
    return _or_one(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))


def unit_scale(x: jax.Array) -> jax.Array:
    """`x` over its largest entry, so that squares of 1e30 and 1e-30 stay in range; 0 stays 0."""
    return x / largest_entry(x)


def frobenius_norm(x: jax.Array) -> jax.Array:
    """||x|| of each matrix, (..., 1, 1), safe against overflow of the squares."""
    largest = largest_entry(x)
    return largest * _square(x / largest) ** 0.5


def column_norms(x: jax.Array) -> jax.Array:
    """Euclidean norms of the columns, (..., 1, n), safe against overflow of the squares."""
    largest = _or_one(jnp.max(jnp.abs(x), axis=-2, keepdims=True))
    return largest * jnp.sum((x / largest) ** 2, axis=-2, keepdims=True) ** 0.5


def written_out(x: Any) -> Any:
    """On a CPU a product takes 2 to 5 times as long where its left factor is a transpose."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The products of two stacks; for a TPU in blocks, which compile in a tenth of the time."""
    in_blocks = lambda a, b: jax.lax.map(lambda pair: _in_blocks(*pair, rows=128), (a, b))
    return over_devices(
        lambda a, b: jax.lax.platform_dependent(a, b, tpu=in_blocks, default=jnp.matmul), a, b
    )


def _in_blocks(a: jax.Array, b: jax.Array, *, rows: int) -> jax.Array:
    """ab for two matrices, some rows at a time."""
    return a @ b if len(a) <= rows else jax.lax.map(lambda row: row @ b, a, batch_size=rows)


@functools.partial(jax.jit, static_argnames="method")
def polar_factor(x: jax.Array, *, method: PolarMethod = "auto") -> jax.Array:
    r"""The orthogonal polar factor of a matrix, or of a batch of matrices.

    With the singular value decomposition :math:`X = U \Sigma V^\top`,

    .. math:: \mathrm{polar}(X) = \sum_{\sigma_i > 4 \epsilon \sigma_1} u_i v_i^\top

    which is :math:`U V^\top` if X has full rank. A direction whose singular value is lost in
    rounding gives 0 instead of noise, so polar(0) = 0. :math:`\epsilon` is the machine epsilon.

    Args:
      x: array of shape (..., m, n), real floating point. Types below float32 are computed in
        float32. The scale of x does not matter.
      method: ``"svd"`` uses the definition above. ``"auto"`` uses products only: at most 21 odd
        polynomials of degree five (float32) take the singular values to 1, and those lost in
        rounding to 0. It is as exact as ``"svd"``, except for square and rank-deficient matrices,
        where it loses up to 200 roundings. ``"newton_schulz"`` uses five steps of Muon's iteration.
        It is far from exact if x is ill-conditioned, so its products have JAX's default precision,
        as Muon's have, for which a GPU has tensor cores.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      ValueError: x has fewer than two axes, or the method is unknown.
      TypeError: x is not real floating point.

    Examples:
      >>> import jax.numpy as jnp, sumo_optax
      >>> sumo_optax.polar_factor(jnp.array([[3.0, 0.0], [0.0, -0.5]])).round(3).tolist()
      [[1.0, 0.0], [0.0, -1.0]]

    References:
      SUMO, `arXiv 2505.24749 <https://arxiv.org/abs/2505.24749>`_, Algorithm 1, block 2;
      Amsel et al., *The Polar Express*, `arXiv 2505.16932 <https://arxiv.org/abs/2505.16932>`_,
      section 3.
    """
    x = jnp.asarray(x)
    check_polar_method(method)
    if x.ndim < 2:
        raise ValueError(f"polar_factor needs an array of shape (..., m, n), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"polar_factor needs real floating-point numbers, got {x.dtype}")
    if x.size == 0:
        return x
    wide = x.shape[-2] <= x.shape[-1]
    y = at_least_float32(x if wide else x.mT)
    with jax.default_matmul_precision("default" if method == "newton_schulz" else "highest"):
        o = _POLAR[method](y.reshape(-1, *y.shape[-2:])).reshape(y.shape).astype(x.dtype)
    return o if wide else o.mT


def check_polar_method(method: str) -> None:
    if method not in get_args(PolarMethod):
        raise ValueError(f"polar method must be one of {get_args(PolarMethod)}, got {method!r}")


def _on_any_platform(fn: Callable[..., jax.Array], X: jax.Array) -> jax.Array:
    """`fn` of a stack made of products alone.

    A GPU takes the matrices together. A CPU is faster one by one, each in as many steps as it
    needs, and for a TPU that compiles in a tenth of the time. On a TPU blocks of as many rows as
    its matrix unit has make a third of the program of larger ones in loops that are unrolled.
    """

    def one_by_one(X: jax.Array, rows: int, unroll: int) -> jax.Array:
        product = functools.partial(_in_blocks, rows=rows)
        return jax.lax.map(functools.partial(fn, product=product, unroll=unroll), X)

    on_one_device = lambda X: jax.lax.platform_dependent(
        X,
        cpu=functools.partial(one_by_one, rows=256, unroll=3),
        tpu=functools.partial(one_by_one, rows=128, unroll=1),
        default=functools.partial(fn, product=jnp.matmul, unroll=3),
    )
    return over_devices(on_one_device, X)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _polar(X: jax.Array, drop: bool = True) -> jax.Array:
    """Polar factors of a stack (B, r, n), r <= n, of any scale, by products alone.

    Directions lost in rounding give 0 or, without `drop`, rows of length 1 like the others unless
    they are exactly 0.
    """
    return _on_any_platform(functools.partial(_by_products, drop=drop), X)


def _by_products(X: jax.Array, *, drop: bool, product: Callable, unroll: int) -> jax.Array:
    """Y <- W Y, W a polynomial of YYᵀ that enlarges small singular values, until all are 1."""
    enough = 10 if X.dtype == jnp.float64 else 4  # steep triples for all that is above rounding
    triples = (_STEEP,) * enough + (_DROP if drop else (_STEEP,) * enough) + (_LAST,)
    table = jnp.asarray(triples, X.dtype)
    I = jnp.expand_dims(jnp.eye(X.shape[-2], dtype=X.dtype), tuple(range(X.ndim - 2)))

    def factor(A, A2, coefficients):
        a, b, c = coefficients
        return a * I + b * A + c * A2

    def quintic(carry, coefficients):
        A, w, W = carry
        A = product(product(w, A), w)
        w = factor(A, product(A, A), coefficients)
        return (A, w, product(w, W)), None

    def enlarge(carry):
        step, Y = carry
        A = product(Y, Y.mT)
        A2 = product(A, A)
        # ||A²||^½ is at least the largest eigenvalue, and mostly less than twice as much.
        size = _square(A2)
        bound = jnp.where(step == 0, _or_one(size**0.25), 1)
        A, A2, Y = A / bound, A2 / bound**2, Y / bound**0.5
        # A matrix with NaN or of zeros cannot change, so it never counts as far: the others decide.
        far = jnp.any((_square(I - 2 * A + A2) > _NEAR**4) & (size > 0))
        triple = jnp.where(far, step, len(triples) - 1)
        quintics = jax.lax.dynamic_index_in_dim(
            table, triple, keepdims=False, allow_negative_indices=False
        )
        w = factor(A, A2, quintics[0])
        (_, _, W), _ = jax.lax.scan(quintic, (A, w, w), quintics[1:], unroll=unroll)
        return jnp.where(far, step + 1, len(triples)), product(W, Y)

    start = (jnp.zeros([], jnp.int32), unit_scale(X))
    return jax.lax.while_loop(lambda carry: carry[0] < len(triples), enlarge, start)[1]


@_polar.defjvp
def _(drop: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    """dO = Ω O + S⁺ dX (I - OᵀO), S = XOᵀ, ΩS + SΩ = dX Oᵀ - O dXᵀ, in the eigenvectors of S."""
    (X,), (dX,) = primals, tangents
    O, scale = _polar(X, drop), largest_entry(X)
    s, U = jnp.linalg.eigh((X / scale) @ O.mT)
    s, kept = s[..., None], above_rounding(s[..., ::-1])[..., ::-1, None]
    inverse = lambda s, kept: jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    turned, dX = U.mT @ O, U.mT @ (dX / scale)
    C = dX @ turned.mT
    Omega = inverse(s + s.mT, kept | kept.mT) * (C - C.mT)
    return O, U @ (Omega @ turned + inverse(s, kept) * (dX - C @ turned))


def _polar_by_svd(x: jax.Array) -> jax.Array:
    u, s, v = svd(x)
    return (u * above_rounding(s).astype(u.dtype)) @ v.mT


def above_rounding(s: jax.Array) -> jax.Array:
    """Which singular values (..., k), the largest first, are above rounding; NaN counts too."""
    return ~(s <= 4 * jnp.finfo(s.dtype).eps * s[..., :1])


def _newton_schulz(x: jax.Array, *, product: Callable, unroll: int) -> jax.Array:
    a, b, c = _NEWTON_SCHULZ

    def step(_, x):
        gram = product(x, x.mT)
        return a * x + product(b * gram + c * product(gram, gram), x)

    x = unit_scale(x)
    return jax.lax.fori_loop(0, 5, step, x / jnp.maximum(_square(x), 1) ** 0.5, unroll=unroll)


_POLAR = {
    "auto": _polar,
    "svd": _polar_by_svd,
    "newton_schulz": functools.partial(_on_any_platform, _newton_schulz),
}


def orthonormal_columns(Y: jax.Array, completion: jax.Array | None = None) -> jax.Array:
    """The orthonormal basis of the columns of Y (..., m, r) that is nearest to them.

    It is their polar factor. Dependent columns are completed, by a `completion` of Y's shape with
    columns of about unit length that enters at the level of rounding; without it they are shorter.
    """
    r = Y.shape[-1]
    rows = unit_scale(Y.mT)
    rows = rows / jnp.maximum(_square(rows), 1) ** 0.5
    if completion is not None:
        rows += (16 + r / 8) * float(jnp.finfo(rows.dtype).eps) * completion.mT
    with jax.default_matmul_precision("highest"):
        basis = _polar(rows.reshape(-1, *rows.shape[-2:]), completion is None)
    return basis.reshape(rows.shape).mT


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (B, m, k), s (B, 1, k) and V (B, n, k) of x = U diag(s) Vᵀ, k the short side; of any scale.

    One by one on a CPU, where more batched calls of LAPACK than it has threads can stop it for good
    (jaxlib before 0.12), and on a TPU, for which a batch takes 25 times as long to compile.
    """
    of = functools.partial(jnp.linalg.svd, full_matrices=False)
    one_by_one = functools.partial(jax.lax.map, of)

    def of_stack(x):
        u, s, vt = jax.lax.platform_dependent(x, cpu=one_by_one, tpu=one_by_one, default=of)
        return u, s[:, None], vt.mT

    largest = largest_entry(x)
    u, s, v = over_devices(of_stack, x / largest)
    return u, s * largest, v
