"""On a mesh of eight simulated devices: the same numbers, sharded state, no gathered gradient."""

import functools
import itertools
import math
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contracts import (
    assert_close,
    every_low_rank_transformation,
    every_low_rank_transformation_slowly,
    every_optimizer_slowly,
    every_transformation_in_floats,
    every_transformation_slowly,
)
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sumo import gradients

import sumo_optax
from sumo_optax import _group

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import collectives

R = 4
SHAPES = {"tall": (32, 16), "wide": (16, 32)}
SPECS = {"rows": P("x", None), "columns": P(None, "x"), "both": P("x", "y"), "none": P(None, None)}
LEAVES = {f"{s} {k}": (SHAPES[s], SPECS[k]) for s, k in itertools.product(SHAPES, SPECS)}
LEAVES["layers"] = ((2, 32, 16), P("y", "x", None))


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def gradient_tree(steps):
    """One tree of kernels a step; a stack of layers has two different ones."""
    sequences = {}
    for i, (name, (shape, _)) in enumerate(LEAVES.items()):
        layers = [gradients(shape[-2:], steps, seed=i + 100 * j, rank=R) for j in range(2)]
        sequences[name] = (
            layers[0] if len(shape) == 2 else list(map(np.stack, zip(*layers, strict=True)))
        )
    return [
        {name: {"kernel": jnp.asarray(s[t])} | NORM.get(name, {}) for name, s in sequences.items()}
        for t in range(steps)
    ]


# A norm of the same block says that the kernels of "layers" are two.
NORM = {"layers": {"norm": {"scale": jnp.ones((2, 16))}}}


def shardings_of(tree, mesh):
    spec = lambda path, x: LEAVES[path[0].key][1] if path[-1].key == "kernel" else P()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(path, x)), tree
    )


def trajectory(tx, grads, shardings=None):
    """The updates of every step and the last state, compiled once."""
    params = jax.tree.map(jnp.zeros_like, grads[0])
    step = lambda *args: tx.update(*args)  # whose compilations are its own
    if shardings is None:
        state, update = tx.init(params), jax.jit(step)
    else:
        params, *grads = (jax.device_put(g, shardings) for g in (params, *grads))
        promised = sumo_optax.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=promised)(params)
        update = jax.jit(step, out_shardings=(shardings, promised))
        assert jax.tree.map(lambda x: x.sharding, state) == promised
    updates = []
    for g in grads:
        u, state = update(g, state, params)
        updates.append(u)
    assert update._cache_size() == 1
    if shardings is not None:
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(promised), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
    return updates, state


@functools.cache
def on_one_device(make):
    return trajectory(make(rank=R), gradient_tree(12))


@every_transformation_slowly
@pytest.mark.parametrize(
    "axis_type",
    [
        pytest.param(AxisType.Auto, id="auto"),
        pytest.param(AxisType.Explicit, id="explicit", marks=pytest.mark.slow),
    ],
)
def test_same_numbers_as_one_device(make, axis_type):
    """12 steps through refreshes; every spec, tall, wide and stacked, in one compilation."""
    mesh, grads = mesh_of(axis_type), gradient_tree(12)
    with jax.set_mesh(mesh):
        updates, _ = trajectory(make(rank=R), grads, shardings_of(grads[0], mesh))
    expected, _ = on_one_device(make)
    for step, (ours, theirs) in enumerate(zip(updates, expected, strict=True)):
        for name in LEAVES:
            a, b = (np.asarray(u[name]["kernel"], np.float64) for u in (ours, theirs))
            # Sums in another order: float32 rounding through 12 steps of condition number 10.
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b), (step, name)


def test_projected_gradients_refuse_explicit_axes():
    everywhere = NamedSharding(mesh_of(AxisType.Explicit), P())
    params = {"kernel": jax.device_put(jnp.ones((16, 8)), everywhere)}
    loss = lambda params: jnp.sum(params["kernel"])
    state = sumo_optax.scale_by_mofasgd(2).init(params)
    with pytest.raises(ValueError, match="need a mesh of Auto axes"):
        sumo_optax.subspace_value_and_grad(loss)(params, state)


def test_state_lies_as_promised():
    mesh = mesh_of(AxisType.Auto)
    params = {
        name: {"kernel": jnp.zeros(shape)} | NORM.get(name, {})
        for name, (shape, _) in LEAVES.items()
    }
    shardings = shardings_of(params, mesh)
    spec = lambda field, name: field[name]["kernel"].spec
    sumo = sumo_optax.state_shardings(sumo_optax.scale_by_sumo(R), params, shardings)
    assert spec(sumo.basis, "tall both") == P("y", "x")
    assert spec(sumo.moment, "tall both") == P("y", "x")
    assert spec(sumo.basis, "tall rows") == P(None, "x")  # r = 4 has no room for "y"
    assert spec(sumo.moment, "tall rows") == P("y", "x")
    assert spec(sumo.basis, "tall none") == P(None, "x")
    assert spec(sumo.basis, "wide both") == P("x", "y")
    assert spec(sumo.moment, "wide both") == P("x", "y")
    assert spec(sumo.basis, "layers") == P("y", None, "x")
    assert spec(sumo.moment, "layers") == P("y", None, "x")
    assert spec(sumo.update_norm, "layers") == P("y")
    assert sumo.count.spec == P()
    mofasgd = sumo_optax.state_shardings(sumo_optax.scale_by_mofasgd(R), params, shardings)
    assert spec(mofasgd.basis, "tall both") == P("x", "y")
    assert spec(mofasgd.row_basis, "tall both") == P("y", "x")
    osd = sumo_optax.scale_by_online_subspace_descent(R)
    osd = sumo_optax.state_shardings(osd, params, shardings)
    assert spec(osd.basis, "tall both") == P("y", "x")
    assert spec(osd.inner.mu, "tall both") == P("y", "x")
    assert spec(osd.projector.nu, "tall both") == P("y", "x")
    # What a device holds falls with the devices along the sharded axis.
    state = jax.jit(sumo_optax.scale_by_sumo(R).init, out_shardings=sumo)(params)
    held = state.moment["tall rows"]["kernel"].addressable_shards[0].data
    assert held.shape == (R // 2, 32 // 4)


def test_state_shardings_through_combinators():
    mesh = mesh_of(AxisType.Auto)
    params = {
        "a": {"kernel": jnp.zeros((32, 16)), "bias": jnp.zeros(16)},
        "b": {"kernel": jnp.zeros((16, 8))},
    }
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P("x") if x.ndim == 2 else P()), params)
    sumo = optax.inject_hyperparams(lambda learning_rate: sumo_optax.sumo(learning_rate, R))(
        learning_rate=0.1
    )
    parts = optax.partition({"sumo": sumo, "adam": optax.adam(0.1)}, {"a": "sumo", "b": "adam"})
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), parts), 2)
    promised = sumo_optax.state_shardings(tx, params, shardings)
    params = jax.device_put(params, shardings)
    state = jax.jit(tx.init, out_shardings=promised)(params)
    found = {jax.tree_util.keystr(p): x.sharding.spec for p, x in jax.tree.leaves_with_path(state)}
    ends = lambda *words: [s for k, s in found.items() if all(w in k for w in words)]
    assert ends(".basis", "['a']") == [P(None, "x")] and ends(".moment", "['a']") == [P("y", "x")]
    assert ends(".mu", "['b']") == [P("x")] or ends(".mu", "['b']") == [P("x", None)]
    assert set(ends(".acc_grads", "kernel")) <= {P("x"), P("x", None)}
    updates, _ = jax.jit(tx.update, out_shardings=(shardings, promised))(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_state_of_sharded_arrays_is_sharded_without_being_asked():
    mesh = mesh_of(AxisType.Auto)
    params = {"kernel": jax.device_put(jnp.zeros((32, 16)), NamedSharding(mesh, P("x", "y")))}
    state = sumo_optax.scale_by_sumo(R).init(params)
    assert state.basis["kernel"].sharding == NamedSharding(mesh, P("y", "x"))
    assert state.moment["kernel"].sharding == NamedSharding(mesh, P("y", "x"))


def test_wrong_shardings():
    params = {"a": {"kernel": jnp.zeros((8, 4))}, "b": jnp.zeros(3)}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(TypeError, match="NamedSharding, got .* at a/kernel"):
        sumo_optax.state_shardings(
            sumo_optax.sumo(0.1), params, jax.tree.map(lambda _: device, params)
        )
    meshes = iter(
        [mesh_of(AxisType.Auto), jax.make_mesh((8,), ("z",), axis_types=(AxisType.Auto,))]
    )
    several = jax.tree.map(lambda _: NamedSharding(next(meshes), P()), params)
    with pytest.raises(ValueError, match="one mesh, got 2"):
        sumo_optax.state_shardings(sumo_optax.sumo(0.1), params, several)


# What is sent, read from the compiled program.


@functools.cache
def compiled(make, shape, spec):
    return collectives.compiled(make(rank=R), shape, spec)


@every_low_rank_transformation_slowly
@pytest.mark.parametrize("spec", ["rows", "columns", "both"])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64)], ids=["tall", "wide"])
def test_nothing_of_the_gradients_size_is_sent(make, shape, spec):
    ordinary, refresh = collectives.collectives(compiled(make, shape, SPECS[spec]))
    assert ordinary
    for _, sizes in ordinary + refresh:
        assert max(sizes) <= 64 * R


# Their products of small matrices, outside of polar factors, are of all layers together.
TOGETHER = ("online_subspace_descent", "galore", "mofasgd")


@pytest.mark.slow
@every_low_rank_transformation_slowly
def test_layers_are_read_and_written_one_at_a_time(make, monkeypatch, request):
    """Three, which the mesh cannot divide: products of one of them at a time are sent."""
    monkeypatch.setattr(_group, "_LARGEST_STACK", 1)
    r, shape, mesh = 8, (3, 64, 32), mesh_of(AxisType.Auto)
    tx = make(rank=r, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2))
    shardings = {"kernel": NamedSharding(mesh, P(None, ("x", "y"), None))}
    grads = [{"kernel": jax.random.normal(jax.random.key(t), shape)} for t in range(3)]
    updates, state = trajectory(tx, grads, shardings)
    for ours, theirs in zip(updates, trajectory(tx, grads)[0], strict=True):
        assert_close(ours, theirs)
    params = jax.device_put(grads[0], shardings)
    step = jax.jit(tx.update, out_shardings=(shardings, jax.tree.map(lambda x: x.sharding, state)))
    program = step.lower(params, state, params).compile().as_text()
    sent = itertools.chain(*collectives.collectives(program))
    layers = 3 if request.node.callspec.id in TOGETHER else 1
    assert max(size for _, sizes in sent for size in sizes) <= layers * 64 * r


SCALARS = 16  # norms and looks for numbers that are not finite
EXTRA = {
    "mofasgd": 2.1,  # both its factors are bases, and the SVD of their core is on one device
    # State lies on the axis that the matrix does not use, too; at r = 4 vectors of norms count.
    "columns-mofasgd": 2.4,
    "columns-sumo_periodic": 1.02,
}


@every_low_rank_transformation
@pytest.mark.parametrize("spec", ["rows", "columns", "both"])
def test_numbers_sent_in_an_ordinary_step(make, spec, request):
    """What is read, made orthogonal and written travels once: r n and m r numbers thrice."""
    m, n, axes = 64, 32, 2 if spec == "both" else 1
    ordinary, _ = collectives.collectives(compiled(make, (m, n), SPECS[spec]))
    sent = sum(size for _, sizes in ordinary for size in sizes if size > 1)
    scalars = sum(size for _, sizes in ordinary for size in sizes if size == 1)
    name = request.node.callspec.id
    extra = EXTRA.get(name, EXTRA.get(name.split("-")[-1], 1))
    assert sent <= (3 * R * (m + n) + 5 * R**2) * extra
    assert scalars <= SCALARS * axes * extra


@every_transformation_in_floats
def test_a_device_holds_its_share_of_the_state(make):
    """Of that of every leaf a part for each device, whichever of the leaf's axes are divided."""
    mesh = mesh_of(AxisType.Auto)
    params = {
        name: {"kernel": jnp.zeros(s)} | NORM.get(name, {}) for name, (s, _) in LEAVES.items()
    }
    tx, shardings = make(rank=8), shardings_of(params, mesh)
    state = sumo_optax.abstract_state(tx, params, shardings)
    for field in state[1:-2]:
        for path, x in jax.tree_util.tree_leaves_with_path(field):
            name = next(k.key for k in path if getattr(k, "key", None) in LEAVES)
            if x.ndim - (name == "layers") > 1:  # vectors and norms are on every device
                share = math.prod(x.sharding.shard_shape(x.shape))
                assert share * mesh.size <= 1.05 * x.size


def test_axes_of_a_mesh_that_are_kept_from_the_state():
    mesh = mesh_of(AxisType.Auto)
    params, shardings = {"kernel": jnp.zeros((32, 16))}, {"kernel": NamedSharding(mesh, P("x"))}
    of = functools.partial(sumo_optax.state_shardings, sumo_optax.scale_by_sumo(8), params)
    spec = lambda **kwargs: of(shardings, **kwargs).basis["kernel"].spec
    assert spec() == P(None, ("x", "y"))
    assert spec(mesh_axes=()) == spec(mesh_axes=("x",)) == P(None, "x")
    with pytest.raises(ValueError, match=r"among \('x', 'y'\), got \['z'\]"):
        of(shardings, mesh_axes=("z",))


# Real models.


class Net(nnx.Module):
    def __init__(self, rngs):
        partitioned = lambda *names: nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
        self.up = nnx.Linear(16, 32, kernel_init=partitioned("x", "y"), rngs=rngs)
        self.down = nnx.Linear(32, 8, kernel_init=partitioned("y", "x"), rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


@every_optimizer_slowly
def test_nnx_optimizer_on_a_partitioned_model(make):
    """Created sharded inside jit, as pods do; the losses are those of one device."""
    axis_type = AxisType.Auto
    x = jax.random.normal(jax.random.key(0), (16, 16))
    y = jnp.roll(x, 1, axis=1)[:, :8]

    def create():
        model = Net(nnx.Rngs(0))
        return model, nnx.Optimizer(model, make(rank=R, learning_rate=0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    def losses(model, optimizer):
        return [float(step(model, optimizer)) for _ in range(8)]

    with jax.set_mesh(mesh_of(axis_type)):
        model, optimizer = nnx.jit(create)()
        specs = {
            jax.tree_util.keystr(path): x.sharding.spec
            for path, x in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(optimizer)))
        }
        sharded = losses(model, optimizer)
    of_basis = lambda k: "basis" in k and "row" not in k and "largest" not in k and "up" in k
    (basis,) = [s for k, s in specs.items() if of_basis(k)]
    assert basis in (P("y", None), P("y"), P("x", None), P("x"))
    with jax.set_mesh(jax.make_mesh((1, 1), ("x", "y"), axis_types=(axis_type,) * 2)):
        np.testing.assert_allclose(sharded, losses(*create()), rtol=1e-4)
    assert sharded[-1] < sharded[0]


# As MaxText lays them out: layers on the second axis, names of a model's axes in two fields.
SCANNED = {
    "embedding": ((64, 32), ("vocab", "embed")),
    "layers": {
        "mlp": {
            "wi_0": {"kernel": ((32, 3, 64), ("embed", "layers", "mlp"))},
            "wo": {"kernel": ((64, 3, 32), ("mlp", "layers", "embed"))},
        },
        "self_attention": {
            "query": {"kernel": ((32, 3, 4, 16), ("embed", "layers", "heads", "kv"))},
            "out": {"kernel": ((4, 3, 16, 32), ("heads", "layers", "kv", "embed"))},
        },
        "pre_norm": {"scale": ((32, 3), ("norm", "layers"))},
    },
}
MESH_AXES = {"embed": "fsdp", "vocab": "tensor", "mlp": "tensor", "heads": "tensor"}


@pytest.mark.slow
@every_optimizer_slowly
def test_variables_that_name_the_axes_of_a_model_in_two_fields(make):
    is_leaf = lambda x: isinstance(x, tuple)
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def variable(leaf):
        shape, names = leaf
        values = jax.random.normal(next(keys), shape)
        return nnx.Param(values).copy(out_sharding=names, sharding_names=names)

    params, *grads = (jax.tree.map(variable, SCANNED, is_leaf=is_leaf) for _ in range(4))
    tx = make(rank=8, learning_rate=0.1)

    def trained(place):
        shardings = jax.tree.map(place, (params, jax.eval_shape(tx.init, params)), is_leaf=named)
        at, _ = shardings
        step = jax.jit(tx.update, out_shardings=shardings)
        x, state = jax.device_put(params, at), jax.jit(tx.init, out_shardings=shardings[1])(params)
        for g in grads:
            updates, state = step(jax.device_put(g, at), state, x)
            x = optax.apply_updates(x, updates)
        return x

    named = lambda x: isinstance(x, nnx.Variable)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def on_mesh(x, field):
        names = x.get_metadata()[field] if named(x) else ()
        return NamedSharding(mesh, P(*map(MESH_AXES.get, names)))

    alone = trained(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    for state in jax.tree.leaves(jax.eval_shape(tx.init, params), is_leaf=named):
        if named(state):
            assert on_mesh(state, "sharding_names") == on_mesh(state, "out_sharding")
    sharded = trained(functools.partial(on_mesh, field="sharding_names"))
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
@every_optimizer_slowly
def test_linen_train_state_on_a_mesh(make):
    """Shardings of the whole state from those of the parameters; the losses of one device."""

    class Mlp(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Dense(8)(jax.nn.relu(flax.linen.Dense(32)(x)))

    x = jax.random.normal(jax.random.key(0), (16, 16))
    y, model, tx = jnp.roll(x, 1, axis=1)[:, :8], Mlp(), make(rank=R, learning_rate=0.05)
    create = lambda: TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=tx
    )

    def step(state):
        loss_fn = lambda p: jnp.mean((state.apply_fn({"params": p}, x) - y) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    def losses(state, step):
        found = []
        for _ in range(8):
            state, loss = step(state)
            found.append(float(loss))
        return found

    mesh = mesh_of(AxisType.Auto)
    shapes = jax.eval_shape(create)
    sharded = lambda x: NamedSharding(mesh, P("x", "y") if x.ndim == 2 else P())
    params = jax.tree.map(sharded, shapes.params)
    shardings = shapes.replace(
        step=NamedSharding(mesh, P()),
        params=params,
        opt_state=sumo_optax.state_shardings(tx, shapes.params, params),
    )
    state = jax.jit(create, out_shardings=shardings)()
    on_mesh = losses(state, jax.jit(step, out_shardings=(shardings, None)))
    np.testing.assert_allclose(on_mesh, losses(create(), jax.jit(step)), rtol=1e-4)
    assert on_mesh[-1] < on_mesh[0]


def test_inside_shard_map_with_replicated_parameters():
    """Data parallel by hand: the gradients are averaged, then every device does the same step."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = sumo_optax.scale_by_sumo(R)
    grads = {"kernel": jax.random.normal(jax.random.key(0), (8, 32, 16))}
    params = {"kernel": jnp.zeros((32, 16))}
    state = tx.init(params)

    def step(grads, state):
        mean = jax.tree.map(lambda g: jax.lax.pmean(g[0], "x"), grads)
        return tx.update(mean, state)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("x"), P()), out_specs=P(), check_vma=False)
    updates, _ = jax.jit(mapped)(grads, state)
    expected, _ = jax.jit(tx.update)(jax.tree.map(lambda g: g.mean(0), grads), state)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], atol=1e-5)


@pytest.mark.parametrize("devices", [pytest.param(4, marks=pytest.mark.slow), 2, 1])
def test_a_checkpoint_of_another_mesh_gives_the_same_next_step(devices, tmp_path):
    """Saved on eight devices and restored straight onto fewer, and the other way."""
    tx = sumo_optax.scale_by_sumo(R)
    grads = {"kernel": jax.random.normal(jax.random.key(0), (32, 16))}
    meshes = [
        jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
        for n in (8, devices)
    ]
    for there, here in (meshes, meshes[::-1]):
        saved, restored = ({"kernel": NamedSharding(mesh, P("x"))} for mesh in (there, here))
        put = jax.device_put(grads, saved)
        state = jax.jit(tx.init, out_shardings=sumo_optax.state_shardings(tx, grads, saved))(put)
        update = jax.jit(tx.update)
        _, state = update(put, state)
        path = tmp_path / str(there.size)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
            checkpointer.wait_until_finished()
            target = sumo_optax.abstract_state(tx, grads, restored)
            back = checkpointer.restore(path, target)
        jax.tree.map(np.testing.assert_array_equal, back, state)
        assert back.moment["kernel"].sharding == NamedSharding(here, P(None, "x"))
        expected, _ = update(put, state)
        updates, _ = update(jax.device_put(grads, restored), back)
        # Sums over another number of devices: float32 rounding.
        np.testing.assert_allclose(updates["kernel"], expected["kernel"], atol=1e-5)
