"""States in few bits: codes against NumPy, and what the rest of the library makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contracts import assert_close, assert_equal, like
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Axes

import sumo_optax
from sumo_optax._decoder import parameters
from sumo_optax._plan import PRESETS, plan
from sumo_optax._quantize import Quantized, dequantized, quantized, requantized

SIZES = [(6, 300), (7, 301), (6, 1), (2, 4, 3, 130)]
SLOPE = 0.67


def levels(bits, squares):
    """All that a number over the largest of its block may become, in float64."""
    if squares:
        return (np.arange(2**bits) / (2**bits - 1)) ** 4
    half = 2 ** (bits - 1)
    unit = np.arange(1 - half, half + 1) / half
    return SLOPE * unit + (1 - SLOPE) * unit**3 if bits == 4 else unit


def largest_of_blocks(x):
    """Of each number the one of the largest magnitude in its block along the last axis."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], 128):
        block = x[..., start : start + 128]
        at = np.abs(block).argmax(-1)[..., None]
        out[..., start : start + 128] = np.take_along_axis(block, at, -1)
    return out


def numbers(shape, squares, seed=0):
    x = np.random.default_rng(seed).standard_t(4, shape).astype(np.float32)
    return x**2 if squares else x


@pytest.mark.parametrize("squares", [False, True], ids=["means", "squares"])
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_become_levels_next_to_them(bits, squares):
    encode = jax.jit(lambda x: quantized(x, bits, -1, squares, not squares))
    for shape in SIZES:
        x = numbers(shape, squares)
        held = encode(x)
        got = np.asarray(dequantized(held), np.float64)
        both_odd = shape[-1] % 2 and shape[-2] % 2
        used = 8 if both_odd else bits
        assert held.values.dtype == (np.uint8 if used == 4 else np.int8)
        assert held.values.size * (8 // used) == x.size
        assert held.largest.shape == (*shape[:-1], -(-shape[-1] // 128))
        largest, grid = largest_of_blocks(x.astype(np.float64)), levels(used, squares)
        unit = x / largest
        nearest = grid[np.abs(unit[..., None] - grid).argmin(-1)] * largest
        if not squares:
            np.testing.assert_allclose(got, nearest, atol=1e-6 * np.abs(x).max())
            continue
        # Up or down, and up alone from what would be 0.
        above = np.clip(np.searchsorted(grid, unit * (1 - 1e-5)), 1, len(grid) - 1)
        below = np.maximum(above - 1, 1)
        distance = [np.abs(got - grid[k] * largest) for k in (above, below)]
        assert (np.minimum(*distance) <= 1e-5 * largest).all()
        assert (got > 0).all()


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_what_does_not_change_is_held_as_it_was(bits):
    @jax.jit
    def twice(arrays):
        each = zip(arrays, axes, all_squares, strict=True)
        held = [quantized(x, bits, axis, squares, not squares) for x, axis, squares in each]
        return held, dequantized(held), requantized(dequantized(held), held, jnp.int32(7))

    cases = [
        (numbers(shape, squares).astype(dtype), axis, squares)
        for shape, axis in (((6, 300), -1), ((300, 6), -2), ((2, 7, 301), -1), ((301, 4), -2))
        for squares, dtype in ((False, "float32"), (True, "float32"), (False, jnp.bfloat16))
    ]
    arrays, axes, all_squares = zip(*cases, strict=True)
    held, floats, again = twice(arrays)
    assert_equal(again, held)
    for x, y in zip(arrays, floats, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_zeros_and_wide_ranges(bits):
    x = np.zeros((2, 256), np.float32)
    x[0, :128] = np.geomspace(1e-30, 1e4, 128)
    for squares in (False, True):
        got = np.asarray(dequantized(quantized(jnp.asarray(x), bits, -1, squares, not squares)))
        assert got[0, 127] == x[0, 127] and not got[0, 128:].any() and not got[1].any()
        if squares:
            least = x[0, 127] / (2**bits - 1) ** 4
            np.testing.assert_allclose(got[0, :80], least, rtol=1e-5)
    for bad in (np.nan, np.inf):
        x[1, 3] = bad  # found by a look at the largest alone
        assert not np.isfinite(quantized(jnp.asarray(x), bits, -1, False, True).largest[1, 0])


@pytest.mark.parametrize("squares", [False, True], ids=["means", "squares"])
@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_thresholds_are_right_on_average(bits, squares):
    """Numbers are rounded up and down so often that their mean over steps is what they are."""
    x = numbers((4, 128), squares)
    held = quantized(jnp.asarray(x), bits, -1, squares, False)
    at = jax.jit(lambda t: dequantized(requantized(x, held, t)))
    mean = np.mean([at(jnp.int32(t)) for t in range(256)], axis=0, dtype=np.float64)
    largest, grid = largest_of_blocks(x), levels(bits, squares)
    above = np.clip(np.searchsorted(grid, x / largest), 2, len(grid) - 1)
    level = np.abs(largest) * (grid[above] - grid[above - 1])
    seen = x / largest > grid[1]
    assert seen.mean() > 0.9
    assert (np.abs(mean - x)[seen] < 0.02 * level[seen]).all()


# Around any transformation.

PARAMS = {
    "dense": {"kernel": jnp.zeros((32, 130)), "bias": jnp.zeros(130)},
    "odd": {"kernel": jnp.zeros((34, 65))},
}
AROUND = {
    "adamw": lambda: optax.adamw(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "lion": lambda: optax.lion(0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, {"dense": "a", "odd": "b"}
    ),
    "factored": lambda: optax.adafactor(0.1),
}


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "adamw")) for x in AROUND]
)
def test_around_any_transformation(name, bits):
    """Steps are near those of floats, in whole numbers, of the bytes that `state_bytes` says."""
    tx = AROUND[name]()
    few = sumo_optax.quantize_state(tx, bits)
    state, exact_state = few.init(PARAMS), tx.init(PARAMS)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == sumo_optax.state_bytes(few, PARAMS)
    update, exact = jax.jit(few.update), jax.jit(tx.update)
    for t in range(5):
        grads = jax.tree.map(lambda g: g + 0.5, like(PARAMS, t))
        updates, new = update(grads, state, PARAMS)
        expected, exact_state = exact(grads, exact_state, PARAMS)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        state = new
    large = [x for x in jax.tree.leaves(state) if x.size >= 1024]
    assert {x.dtype for x in large} <= {jnp.dtype("int8" if bits == 8 else "uint8")}
    assert large or name == "factored"
    for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        if u.ndim > 1:
            error = np.linalg.norm(u - e) / np.linalg.norm(e)
            assert error < (0.1 if name != "lion" else 0.4) * (1 if bits == 8 else 4), error
        else:
            np.testing.assert_allclose(u, e, rtol=1e-5)


def test_bytes_are_an_eighth():
    params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    held = lambda tx: sumo_optax.state_bytes(tx, params)
    n = 1024**2
    assert held(sumo_optax.quantize_state(optax.lion(1.0), 4)) == n // 2 + 4 * n // 128 + 8
    assert held(sumo_optax.quantize_state(optax.adamw(1.0), 8)) == 2 * (n + 4 * n // 128) + 8
    sumo = sumo_optax.scale_by_sumo(256, state_dtype="int4")
    r = 2 * 256 * 1024
    assert held(sumo) == r // 2 + 4 * r // 128 + 2 * 4 + 12


def test_what_quantize_state_refuses():
    with pytest.raises(ValueError, match=r"bits must be one of \(8, 4\), got 5"):
        sumo_optax.quantize_state(optax.adamw(1.0), 5)
    with pytest.raises(ValueError, match="fields of ScaleByAdanState have"):
        sumo_optax.quantize_state(optax.adan(1.0), 8).init(PARAMS)


def test_a_second_moment_does_not_become_0():
    """Where one number of a block is a million times the others, their steps stay bounded."""
    tx = sumo_optax.quantize_state(optax.scale_by_adam(eps=0.0), 4)
    G = {"w": jnp.full((8, 128), 1e-3).at[:, 0].set(1e3)}
    state, update = tx.init(G), jax.jit(tx.update)
    for _ in range(20):
        updates, state = update(G, state)
    assert np.isfinite(updates["w"]).all() and np.abs(updates["w"]).max() < 1.1
    assert (dequantized(state).nu["w"] > 0).all()


# The optimizers of this library.

STACK = {"layers": {"up": {"kernel": jnp.zeros((2, 12, 40)), "bias": jnp.zeros((2, 40))}}}
OURS = {
    "sumo": lambda dtype: sumo_optax.sumo(0.1, 4, state_dtype=dtype),
    "galore": lambda dtype: sumo_optax.scale_in_subspace(
        optax.scale_by_adam(), 4, state_dtype=dtype
    ),
    "online": lambda dtype: sumo_optax.online_subspace_descent(0.1, 4, state_dtype=dtype),
    "mofasgd": lambda dtype: sumo_optax.mofasgd(0.1, 4, state_dtype=dtype),
}
every_of_ours = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "sumo")) for x in OURS]
)


@every_of_ours
@pytest.mark.parametrize("dtype", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_state_of_ours(name, dtype, tmp_path):
    """Near the first steps of floats; a NaN in one layer leaves its state; saved bit for bit."""
    tx, exact = OURS[name](dtype), OURS[name](None)
    state, exact_state = tx.init(STACK), exact.init(STACK)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == sumo_optax.state_bytes(tx, STACK)
    assert sumo_optax.describe(tx, STACK).leaves[1].rank == 4
    update, exact_update = jax.jit(tx.update), jax.jit(exact.update)
    for t in range(3):
        updates, state = update(like(STACK, t), state, STACK)
        expected, exact_state = exact_update(like(STACK, t), exact_state, STACK)
    u, e = (x["layers"]["up"]["kernel"] for x in (updates, expected))
    assert np.linalg.norm(u - e) < (0.1 if dtype == "int8" else 0.6) * np.linalg.norm(e)

    bad = like(STACK, 9)
    bad["layers"]["up"]["kernel"] = bad["layers"]["up"]["kernel"].at[1, 3, 5].set(jnp.nan)
    _, new = update(bad, state, STACK)
    arrays = lambda s: [
        x for x in jax.tree.leaves(s) if x.dtype in (jnp.int8, jnp.uint8) and x.shape[:1] == (2,)
    ]
    for before, after in zip(arrays(state), arrays(new), strict=True):
        np.testing.assert_array_equal(after[1], before[1])
    assert any((x[0] != y[0]).any() for x, y in zip(arrays(state), arrays(new), strict=True))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", new)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, STACK))
    assert_equal(restored, new)
    for x, y in zip(*(update(like(STACK, 4), s, STACK) for s in (new, restored)), strict=True):
        assert_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_convert_state(dtype):
    params = {"kernel": jnp.zeros((12, 40))}
    floats, few = (sumo_optax.scale_by_sumo(4, state_dtype=x) for x in (None, dtype))
    _, state = few.update(like(params, 0), few.init(params))
    assert_equal(sumo_optax.convert_state(state, few, params), state)
    in_floats = sumo_optax.convert_state(state, floats, params)
    assert_equal(in_floats.moment, dequantized(state.moment))
    assert_equal(sumo_optax.convert_state(in_floats, few, params), state)
    with pytest.raises(ValueError, match="basis/values/kernel was absent, now u?int8"):
        sumo_optax.check_state(in_floats, state)
    adam = sumo_optax.quantize_state(optax.adam(1.0), 8)
    large = {"kernel": jnp.zeros((32, 40))}
    G = {"kernel": jnp.outer(jnp.arange(32.0), jnp.ones(40))}
    _, of_adam = adam.update(G, adam.init(large))
    started = dequantized(sumo_optax.convert_state(of_adam, sumo_optax.scale_by_sumo(4), large))
    got = started.basis["kernel"] @ started.moment["kernel"]
    assert_close(got, G["kernel"], rtol=0.02)


TRANSFORMATIONS = {
    "sumo": lambda: sumo_optax.scale_by_sumo(8, state_dtype="int8"),
    "sumo_int4": lambda: sumo_optax.scale_by_sumo(8, state_dtype="int4"),
    "mofasgd": lambda: sumo_optax.scale_by_mofasgd(4, state_dtype="int4"),
    "adam": lambda: sumo_optax.quantize_state(optax.scale_by_adam(), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_on_eight_devices(name, kind):
    """Divided by all of them, in whole blocks where there are enough, and the same numbers."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    params = {"a": {"kernel": jnp.zeros((512, 256))}, "b": {"kernel": jnp.zeros((24, 64))}}
    spec = {"a": {"kernel": P("x", "y")}, "b": {"kernel": P("x", None)}}
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
    tx = TRANSFORMATIONS[name]()
    expected, state = [], tx.init(params)
    update = jax.jit(tx.update)
    for t in range(3):
        updates, state = update(like(params, t), state)
        expected.append(updates)
    with jax.set_mesh(mesh):
        promised = sumo_optax.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=promised)(jax.device_put(params, shardings))
        update = jax.jit(tx.update, out_shardings=(shardings, promised))
        for t in range(3):
            updates, state = update(jax.device_put(like(params, t), shardings), state)
            assert_close(updates, expected[t], rtol=2e-3)  # a rounding may go the other way
    # Adam's state lies as its parameter; of MoFaSGD's, U's 4 columns have no room for "y".
    fewer = {"adam": ("mu", "nu"), "mofasgd": (".basis",)}.get(name, ())
    for path, x in jax.tree.leaves_with_path(state):
        if x.dtype in (jnp.int8, jnp.uint8):
            keys = jax.tree_util.keystr(path)
            devices = 4 if "['b']" in keys and any(field in keys for field in fewer) else 8
            assert x.addressable_shards[0].data.size * devices == x.size


@pytest.mark.slow
def test_the_planner():
    floats, few = (
        plan("tiny", PRESETS["tiny"], rank=32, mesh={}, dtype="float32", state_dtype=x)
        for x in (None, "int4")
    )
    of = lambda planned: {row.optimizer: row for row in planned.rows}
    tx = sumo_optax.sumo(1.0, 32, state_dtype="int4")
    assert of(few)["SUMO"].state == sumo_optax.state_bytes(
        tx, parameters(PRESETS["tiny"], jnp.float32)
    )
    assert of(few)["SUMO"].projected == of(floats)["SUMO"].projected
    saved = of(floats)["SUMO"].state - of(few)["SUMO"].state
    assert of(floats)["SUMO"].fused - of(few)["SUMO"].fused == saved > 1e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sumo", "adam"])
def test_updates_inside_the_backward_pass(name):
    layer = lambda x, w: (x + jnp.tanh(x @ w), None)
    loss = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)
    spec = Axes(1, 2)
    tx = {
        "sumo": sumo_optax.sumo(0.1, 4, weight_dimension_numbers=spec, state_dtype="int4"),
        "adam": sumo_optax.quantize_state(optax.adam(0.1), 8),
    }[name]
    params = like({"layers": jnp.zeros((4, 32, 32))}, 0, scale=0.1)
    x = like(jnp.zeros((8, 32)), 1)

    def plain(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    _, expected, held = jax.jit(plain)(params, tx.init(params), x)
    _, got, state = jax.jit(sumo_optax.value_and_update(loss, tx))(params, tx.init(params), x)
    assert_close(got, expected, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(held), strict=True):
        assert (
            a.dtype == b.dtype
            and np.mean(np.asarray(a) != np.asarray(b)) < 0.01
            or (jnp.issubdtype(a.dtype, jnp.floating))
        )
    assert isinstance(state, sumo_optax.QuantizedState) or isinstance(state[0].basis, Quantized)
