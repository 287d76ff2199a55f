"""APOLLO, APOLLO-Mini and Fira against NumPy in float64, written from the papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest

STEPS, REFRESH_EVERY, RANK = 9, 4, 3
# Float32 holds 0.999 with an error of up to 3e-8, which is 3e-5 of the 1 - 0.999 in the first bias
# correction; the root halves it. All else rounds at 6e-8 and adds up to less.
TOLERANCE = 2e-5
SHAPES = {"wide": (8, 20), "tall": (20, 8), "square": (8, 8)}


class Oracle:
    """One matrix. `projection(t, G)` gives P, m x r."""

    def __init__(self, projection, scale_type, residual, alpha=1.0):
        self.projection, self.scale_type, self.residual = projection, scale_type, residual
        self.alpha, self.t, self.mu, self.nu, self.last = alpha, 0, 0.0, 0.0, None
        self.was_limited = []

    def limit(self, X):
        ratio = 0.0 if self.last is None else np.linalg.norm(X) / self.last
        self.was_limited.append(ratio > 1.01)
        X = X / ratio * 1.01 if ratio > 1.01 else X
        self.last = np.linalg.norm(X)
        return X

    def __call__(self, G):
        if G.shape[0] > G.shape[1]:
            return self(G.T).T
        P = self.projection(self.t, G)
        self.t += 1
        R = P.T @ G
        self.mu = 0.9 * self.mu + 0.1 * R
        self.nu = 0.999 * self.nu + 0.001 * R**2
        N = self.mu / (np.sqrt(self.nu) + 1e-6)
        if self.scale_type == "channel":
            s = np.linalg.norm(N, axis=0) / np.linalg.norm(R, axis=0)
        else:
            s = np.full(len(G.T), np.linalg.norm(N) / np.linalg.norm(R))
        correction = np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        if self.residual:
            return correction * (P @ N + self.limit((G - P @ R) @ np.diag(s)))
        return self.alpha * correction * self.limit(G @ np.diag(s))


def random_bases(leaf, rank):
    """The numbers that the optimizer draws: they have tests of their own."""
    draw = lambda t, G: peers.random_projection(0, leaf, t // REFRESH_EVERY, (len(G), rank))
    return lambda t, G: np.asarray(draw(t, G), np.float64)


def left_vectors():
    found = {}

    def basis(t, G):
        if t % REFRESH_EVERY == 0:
            found["P"] = np.linalg.svd(G)[0][:, :RANK]
        return found["P"]

    return basis


CASES = {
    "apollo": (
        peers.scale_by_apollo(RANK, refresh_every=REFRESH_EVERY),
        lambda leaf: Oracle(random_bases(leaf, RANK), "channel", residual=False),
    ),
    "apollo_mini": (
        peers.scale_by_apollo_mini(REFRESH_EVERY),
        lambda leaf: Oracle(random_bases(leaf, 1), "tensor", residual=False, alpha=math.sqrt(128)),
    ),
    "fira": (
        peers.scale_by_fira(RANK, REFRESH_EVERY),
        lambda leaf: Oracle(left_vectors(), "channel", residual=True),
    ),
}


def gradients(seed=0):
    """Of sizes that rise and fall, so that some are limited; small, so that epsilon counts."""
    rng = np.random.default_rng(seed)
    signal = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    for t in range(STEPS):
        size = (1e-2, 3e-3, 3e-2)[t % 3]
        draw = {name: size * (x + rng.normal(size=x.shape)) for name, x in signal.items()}
        yield {name: x.astype(np.float32) for name, x in draw.items()}


@pytest.mark.parametrize("name", CASES)
def test_directions_are_the_papers(name):
    """Wide, tall and square, over two refreshes, with and without the limiter at work."""
    tx, oracle = CASES[name]
    oracles = {shape: oracle(leaf) for leaf, shape in enumerate(sorted(SHAPES))}
    state = tx.init({key: jnp.zeros(shape) for key, shape in SHAPES.items()})
    update = jax.jit(tx.update)
    for t, G in enumerate(gradients()):
        D, state = update(G, state)
        for key, of_matrix in oracles.items():
            expected = of_matrix(G[key].astype(np.float64))
            error = np.linalg.norm(D[key] - expected) / np.linalg.norm(expected)
            assert error < TOLERANCE, (key, t, error)
    for of_matrix in oracles.values():
        assert 0 < sum(of_matrix.was_limited) < STEPS - 1


def test_random_projections_are_drawn_anew():
    """Of variance 1 / r; others for another leaf, another seed and after a renewal."""
    draw = lambda *key: np.asarray(peers.random_projection(*key, (400, 25)))
    P = draw(0, 0, 0)
    # 10,000 numbers: the standard deviation of their mean square is 1.4 % of it.
    assert np.mean(P**2) == pytest.approx(1 / 25, rel=0.06)
    assert abs(np.mean(P)) < 4 * 0.2 / 100
    np.testing.assert_array_equal(P, draw(0, 0, 0))
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert abs(np.sum(P * draw(*key)) / np.sum(P**2)) < 0.05


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("apollo", 2 * RANK * (20 + 20 + 8)),
        ("apollo_mini", 2 * (20 + 20 + 8)),
        ("fira", 2 * RANK * (20 + 20 + 8) + 3 * 8 * RANK),
    ],
)
def test_state_is_what_the_papers_hold(name, numbers):
    """Moments of the long side, Fira's basis of the short one, and a norm each."""
    state = CASES[name][0].init({key: jnp.zeros(shape) for key, shape in SHAPES.items()})
    count, *arrays = jax.tree.leaves(state)
    assert count.shape == () and sum(x.size for x in arrays) == numbers + len(SHAPES)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_of_zero_moves_nothing_and_is_survived(name):
    tx = CASES[name][0]
    zero, one = jnp.zeros((4, 6)), jnp.ones((4, 6))
    state = tx.init(zero)
    update = jax.jit(tx.update)
    D, state = update(zero, state)
    assert not D.any()
    D, state = update(one, state)
    assert jnp.isfinite(D).all() and D.all()


@pytest.mark.parametrize("name", ["apollo", "apollo_mini", "fira"])
def test_complete_optimizers(name):
    """The peer for projections, AdamW for the rest; weight decay for both."""
    rank = {} if name == "apollo_mini" else {"rank": RANK}
    params = {
        "embed": {"table": jnp.ones((5, 8))},
        "layers": [{"up": {"kernel": jnp.ones((8, 20))}}],
    }
    grads = jax.tree.map(lambda x: jnp.arange(1.0, 1 + x.size).reshape(x.shape), params)
    tx = getattr(peers, name)(0.5, **rank, adam_learning_rate=0.25, weight_decay=0.1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    adamw = optax.adamw(0.25, weight_decay=0.1)
    g, p = (tree["embed"]["table"] for tree in (grads, params))
    expected, _ = adamw.update(g, adamw.init(p), p)
    np.testing.assert_allclose(updates["embed"]["table"], expected, rtol=1e-6)  # once rounded
    scale_by = getattr(peers, f"scale_by_{name}")(**rank)
    G = grads["layers"][0]["up"]["kernel"]
    D, _ = jax.jit(scale_by.update)(G, scale_by.init(G))
    ours = updates["layers"][0]["up"]["kernel"]
    np.testing.assert_allclose(ours, -0.5 * (D + 0.1), rtol=1e-6)  # one rounding or two


@pytest.mark.parametrize("scale_by", [peers.scale_by_apollo, peers.scale_by_fira])
def test_a_stack_is_its_matrices(scale_by):
    tx = scale_by(2)
    G = jax.random.normal(jax.random.key(0), (3, 8, 5))
    D, state = tx.update(G, tx.init(G))
    assert state.mu.shape == (3, 2, 8)
    for matrix, expected in zip(G, D, strict=True):
        alone, _ = tx.update(matrix, tx.init(matrix))
        np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-5)  # sums in another order


def test_what_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        peers.scale_by_fira(0)
    with pytest.raises(ValueError, match=r"got norm/scale of shape \(8,\)"):
        peers.scale_by_apollo(2).init({"norm": {"scale": jnp.zeros(8)}})
