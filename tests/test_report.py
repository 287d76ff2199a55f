"""The table of `describe` and its bytes, against the arrays that are really made."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sumo_optax

PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((50, 16))},
    "layers": [{"up": {"kernel": jnp.ones((16, 40)), "bias": jnp.ones(40)}} for _ in range(2)],
    "experts": {"kernel": jnp.ones((3, 40, 16)), "bias": jnp.ones((3, 16))},
    "norm": {"scale": jnp.ones(16)},
}


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "tx",
    [
        sumo_optax.sumo(1e-3, 4),
        sumo_optax.scale_by_sumo(4),
        sumo_optax.online_subspace_descent(1e-3, 4),
        sumo_optax.mofasgd(1e-3, 4),
        optax.adamw(1e-3),
        optax.sgd(1e-3),
    ],
    ids=["sumo", "scale_by_sumo", "online_subspace_descent", "mofasgd", "adamw", "sgd"],
)
def test_bytes_are_those_of_the_real_state(tx):
    held = bytes_of(tx.init(PARAMS))
    assert sumo_optax.state_bytes(tx, PARAMS) == held
    assert sumo_optax.describe(tx, PARAMS).state_bytes == held


def test_matrices_hold_m_plus_n_times_r_numbers_and_two_more():
    state = sumo_optax.scale_by_sumo(4).init(PARAMS)
    for layer in range(2):
        arrays = [field["layers"][layer]["up"]["kernel"] for field in state[1:5]]
        assert sum(x.size for x in arrays) == (16 + 40) * 4 + 2
    arrays = [field["experts"]["kernel"] for field in state[1:5]]
    assert sum(x.size for x in arrays) == 3 * ((16 + 40) * 4 + 2)


def test_report_as_data():
    report = sumo_optax.describe(4, PARAMS)
    leaves = {leaf.path: leaf for leaf in report.leaves}
    kernel = leaves["layers/0/up/kernel"]
    assert (kernel.role, kernel.m, kernel.n, kernel.side, kernel.rank) == (
        "matrix", 40, 16, "in", 4,
    )  # fmt: skip
    assert kernel.state_bytes == 4 * ((40 + 16) * 4 + 2)
    assert leaves["experts/kernel"].batch == (3,)
    assert leaves["experts/kernel"].side == "out"
    assert leaves["embed_tokens/embedding"].role == "fallback"
    assert report.adamw_bytes == 2 * bytes_of(PARAMS)


def test_report_of_a_basis_on_the_long_side():
    report = sumo_optax.describe(sumo_optax.online_subspace_descent(1e-3, 4, side="long"), PARAMS)
    kernel = {leaf.path: leaf for leaf in report.leaves}["layers/0/up/kernel"]
    assert (kernel.role, kernel.m, kernel.n, kernel.side) == ("matrix", 40, 16, "out")
    assert kernel.state_bytes == 4 * (3 * 40 * 4 + 2 * 16 * 4 + 2)  # and Adam's two counters


def test_report_as_a_table():
    lines = str(sumo_optax.describe(4, PARAMS)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "matrix", "side", "rank", "state", "AdamW's"]
    (layers,) = [line for line in lines if line.startswith("layers/*/up/kernel")]
    numbers = "2 of (16,40) 40 x 16 in 4 1.8 KiB 10.0 KiB"
    assert layers.split() == ["layers/*/up/kernel", *numbers.split()]
    (experts,) = [line for line in lines if line.startswith("experts/kernel")]
    assert "3 of 40 x 16" in experts
    (norm,) = [line for line in lines if line.startswith("norm/scale")]
    assert norm.split()[:3] == ["norm/scale", "(16)", "fallback"]
    assert lines[-2].endswith(", 5 matrices")
    assert lines[-1].startswith("optimizer state ")


def test_tables_fit_a_terminal():
    """Whatever is long has lines to itself, and nothing is left out."""
    deep = {"decoder": {"layers": {"feed_forward": {"up_projection": PARAMS["experts"]}}}}
    report = sumo_optax.describe(4, deep)
    for text in (str(report), report.reasons):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80
        place = lines.index("decoder/layers/feed_forward/up_projection/kernel")
        assert lines[place + 1].split()[0] == "(3,40,16)"
        column = lines[0].index("shape")
        assert lines[place + 1].index("(3,40,16)") == column, "under its title"
    (kernel,) = [leaf for leaf in report.leaves if leaf.role == "matrix"]
    assert kernel.why in " ".join(report.reasons.split())


def test_describe_takes_shapes_and_any_optimizer():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert sumo_optax.describe(4, shapes) == sumo_optax.describe(4, PARAMS)
    report = sumo_optax.describe(optax.adam(1e-3), PARAMS)
    assert {leaf.role for leaf in report.leaves} == {"-"}
    assert report.state_bytes == report.adamw_bytes + 4, "Adam's two moments and its counter"


def test_describe_takes_any_rank():
    quarter = sumo_optax.describe(0.25, PARAMS)
    assert quarter == sumo_optax.describe(sumo_optax.sumo(1e-3), PARAMS)
    assert quarter == sumo_optax.describe(lambda path, shape: 0.25, PARAMS)
    assert {leaf.rank for leaf in quarter.leaves if leaf.rank} == {8}


def test_nothing_to_hold_at_low_rank_is_an_error_with_the_paths():
    with pytest.raises(ValueError, match=r"no parameter is a matrix.*norm/scale \(16,\)"):
        sumo_optax.describe(4, {"norm": PARAMS["norm"]})
    assert sumo_optax.describe(4, {}).leaves == ()


def test_ambiguous_leaves_are_named():
    params = {"table": jnp.ones((3, 4, 5)), "dense": {"kernel": jnp.ones((4, 5))}}
    report = sumo_optax.describe(2, params)
    assert {leaf.path: leaf.role for leaf in report.leaves} == {
        "table": "ambiguous",
        "dense/kernel": "matrix",
    }
    assert "ambiguous: path and shape do not tell" in str(report)
    assert "ambiguous" not in str(sumo_optax.describe(2, {"dense": params["dense"]}))


def test_a_tree_without_parameters_has_no_share_of_adamws():
    assert str(sumo_optax.describe(4, {})).endswith("\noptimizer state 12 B")
