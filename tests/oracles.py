"""The optimizers in NumPy float64, straight from the formulas of docs and papers. Slow and plain.

Every function takes and gives one matrix m x n, m the projected side; `oriented` makes it so.
"""

import numpy as np

EPS32 = np.finfo(np.float32).eps


def oriented(step, side="long"):
    """A rule for matrices whose rows are that side as one for any matrix."""

    def on_any(G, *args):
        rows, columns = G.shape
        turn = rows < columns if side == "long" else rows > columns
        D, state = step(G.T if turn else G, *args)
        return (D.T if turn else D), state

    return on_any


def polar(X):
    """UVᵀ of X = USVᵀ, without the directions that float32 input cannot tell from zero."""
    U, S, Vt = np.linalg.svd(np.asarray(X, np.float64), full_matrices=False)
    keep = S / S[0] > 4 * EPS32
    return (U * keep) @ Vt


def top_left_subspace(G, r):
    return np.linalg.svd(G, full_matrices=False)[0][:, :r]


def orthonormal(Y):
    return np.linalg.qr(Y)[0]


def captured_energy(Q, G):
    """The part of ||G||² inside the subspace of Q."""
    return np.linalg.norm(Q.T @ G) ** 2 / np.linalg.norm(G) ** 2


def newton_schulz(X, steps=5):
    X = X / np.linalg.norm(X)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def sumo_step(
    G,
    state,
    t,
    *,
    rank,
    refresh_every,
    momentum,
    nesterov,
    residual,
    norm_growth_limit,
    consistent_rms,
    tracking=False,
):
    """Algorithm 1 at step t. The state is (Q, M, norm of what is limited).

    Tracking moves the basis after the step, to the columns that G has on the rows of the moment.
    """
    m, n = G.shape
    Q, M, last = state
    if not tracking and t % refresh_every == 0:
        Q_new = top_left_subspace(G, min(rank, m, n))
        M = (Q_new.T @ Q) @ M
        Q = Q_new
    G_hat = Q.T @ G
    M = momentum * M + G_hat
    N = momentum * M + G_hat if nesterov else M
    O = polar(N)
    outside = G - Q @ G_hat
    R = np.zeros_like(G)
    if residual == "scaled":
        R = outside * (np.linalg.norm(O, axis=0) / np.linalg.norm(G_hat, axis=0))
    limited = R if residual == "scaled" else O
    norm = np.linalg.norm(limited)
    if norm_growth_limit is not None and residual != "orthogonal":
        if last > 0 and norm > norm_growth_limit * last:
            limited = limited * (norm_growth_limit * last / norm)
            norm = norm_growth_limit * last
        last = norm
    scale = 1.0 if consistent_rms is None else consistent_rms * np.sqrt(max(m, n))
    if residual == "scaled":
        D = scale * (Q @ O + limited)
    elif residual == "orthogonal":
        D = scale * polar(Q @ N + outside)
    else:
        D = scale * (Q @ limited) + (outside if residual == "gradient" else 0)
    if tracking and t % refresh_every == 0:
        Q_new = orthonormal(G @ O.T)
        M = (Q_new.T @ Q) @ M
        Q = Q_new
    return D, (Q, M, last)


def mofasgd_step(G, state, *, momentum, inverse_limit, complement, consistent_rms):
    """Forms the whole m x n target and takes its SVD. The state is (U, s, V)."""
    m, n = G.shape
    U, s, V = state
    r = len(s)
    PU, PV = U @ U.T, V @ V.T
    started = np.any(s)
    seen = PU @ G + G @ PV - PU @ G @ PV if started else G
    target = seen + momentum * (U * s) @ V.T
    U, s, Vt = np.linalg.svd(target, full_matrices=False)
    U, s, V = U[:, :r], s[:r], Vt[:r].T
    d = np.ones(r) if inverse_limit is None else np.minimum(1 / s, inverse_limit)
    d = np.where(s > 4 * EPS32 * s[0], d, 0)
    outside = (np.eye(m) - PU) @ G @ (np.eye(n) - PV) if started else G - (U * s) @ V.T
    scale = 1.0 if consistent_rms is None else consistent_rms * np.sqrt(max(m, n))
    return scale * (U * d) @ V.T + complement * outside, (U, s, V)


class Sgd:
    def __call__(self, G):
        return G


class Adam:
    """optax.scale_by_adam with its defaults."""

    def __init__(self):
        self.t, self.mu, self.nu = 0, 0.0, 0.0

    def __call__(self, G):
        self.t += 1
        self.mu = 0.9 * self.mu + 0.1 * G
        self.nu = 0.999 * self.nu + 0.001 * G**2
        return (self.mu / (1 - 0.9**self.t)) / (np.sqrt(self.nu / (1 - 0.999**self.t)) + 1e-8)


class Lion:
    """optax.scale_by_lion with its defaults."""

    def __init__(self):
        self.mu = 0.0

    def __call__(self, G):
        direction = np.sign(0.9 * self.mu + 0.1 * G)
        self.mu = 0.99 * self.mu + 0.01 * G
        return direction


def online_subspace_descent_step(
    G, P, inner, projector, *, first, basis_learning_rate, rho, scale, decay=0.0
):
    """G has the projected side first. The gradient of L, term by term by the chain rule."""
    D = scale * P @ inner(P.T @ G)
    if not first:
        g = G / np.linalg.norm(G)
        E = P @ P.T @ g - g  # L = ||E||² + rho ||PᵀP - I||²
        gradient = 2 * (E @ g.T + g @ E.T) @ P + 4 * rho * P @ (P.T @ P - np.eye(P.shape[1]))
        P = P - basis_learning_rate * (projector(gradient) + decay * P)
    return D, P
