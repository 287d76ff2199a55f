"""What a user gets wrong is said in one sentence, with the leaf's path and what is allowed."""

import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from contracts import every_transformation
from optax.contrib import MuonDimensionNumbers as Axes

import sumo_optax

PARAMS = {"up": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, "down": jnp.ones((6, 8))}


def resized(path, shape):
    module, *leaf = path.split("/")
    if not leaf:
        return PARAMS | {module: jnp.ones(shape)}
    return PARAMS | {module: PARAMS[module] | {leaf[0]: jnp.ones(shape)}}


# Trees and states


@every_transformation
@pytest.mark.parametrize(
    "path, shape, error",
    [
        ("up/kernel", (10, 6), r"state of up/kernel has arrays .*\(10, 6\) needs .*check_state"),
        ("up/bias", (7,), r"gradient of up/bias has shape \(7,\), the state was made for \(6,\)"),
        ("down", None, "the gradient of down is None: .*optax.masked"),
        ("extra", (8, 6), "a gradient of extra, which the state was not made for.*check_state"),
    ],
)
def test_gradients_of_another_tree_than_the_state(make, path, shape, error):
    tx = make()
    grads = PARAMS | {path: None} if shape is None else resized(path, shape)
    with pytest.raises(ValueError, match=error):
        tx.update(grads, tx.init(PARAMS))


def test_gradients_without_a_leaf_or_of_another_shape_than_the_parameters():
    tx = sumo_optax.scale_by_sumo(2)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="the gradient of up/bias is missing"):
        tx.update(PARAMS | {"up": {"kernel": PARAMS["up"]["kernel"]}}, state)
    with pytest.raises(ValueError, match=r"down has shape \(6, 8\), the parameter \(6, 9\)"):
        tx.update(PARAMS, state, resized("down", (6, 9)))


def test_leaves_that_are_none_from_the_start_are_no_mistake():
    params = PARAMS | {"frozen": None}
    tx = sumo_optax.scale_by_sumo(2)
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert updates["frozen"] is None and updates["down"].shape == (6, 8)


@every_transformation
def test_a_state_of_another_rank(make):
    with pytest.raises(ValueError, match="state of down has arrays .* rank or optimizer"):
        make(rank=3).update(PARAMS, make(rank=2).init(PARAMS))


def test_a_state_of_another_optimizer():
    state = sumo_optax.mofasgd(1e-3, 2).init(PARAMS)
    with pytest.raises(TypeError, match="must be the SumoState .* got MofasgdState"):
        sumo_optax.sumo(1e-3, 2).update(PARAMS, state, PARAMS)
    lion = sumo_optax.scale_in_subspace(optax.scale_by_lion(), 2)
    adam = sumo_optax.scale_in_subspace(optax.scale_by_adam(), 2)
    with pytest.raises(ValueError, match="of another inner optimizer.*check_state"):
        adam.update(PARAMS, lion.init(PARAMS))


def test_a_leaf_that_init_took_for_something_else():
    spec = {"up": None, "down": Axes()}
    state = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=spec).init(PARAMS)
    with pytest.raises(ValueError, match="up/kernel is a matrix here, but the init .* no matrix"):
        sumo_optax.scale_by_sumo(2).update(PARAMS, state)


# Arguments


OPTIMIZERS = [sumo_optax.sumo, sumo_optax.online_subspace_descent, sumo_optax.mofasgd]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rate", ["fast", [1e-3], None])
def test_learning_rate_is_a_number_or_a_schedule(make, rate):
    with pytest.raises(TypeError, match="^learning_rate must be a number or a schedule, got"):
        make(rate)
    error = "^adam_learning_rate must be a number or a schedule, or None, got 'fast'"
    with pytest.raises(TypeError, match=error):
        make(1e-3, adam_learning_rate="fast")


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("name", ["learning_rate", "adam_learning_rate"])
@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_learning_rate_is_finite(make, name, rate):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number, got {rate}"):
        make(**{"learning_rate": 1e-3, name: rate})


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "adam_b1", "adam_eps"])
def test_a_word_is_no_number(make, name):
    with pytest.raises(TypeError, match=f"^{name} must be .*, got '1e-3'"):
        make(**{"learning_rate": 1e-3, name: "1e-3"})


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("adam_b1", 1.0, ">= 0 and < 1"), ("adam_b2", 2.0, ">= 0 and < 1"), ("adam_eps", -1, ">= 0")],
)
def test_arguments_of_adam(make, name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be a number {allowed}, got {value}"):
        make(1e-3, **{name: value})


@every_transformation
@pytest.mark.parametrize("seed", ["0", 0.5])
def test_seed_is_an_integer(make, seed):
    with pytest.raises(TypeError, match=f"^seed must be an integer, got {seed!r}"):
        make(seed=seed)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("name", ["weight_decay", "adam_weight_decay"])
def test_decay_is_not_negative(make, name):
    with pytest.raises(ValueError, match=rf"^{name} must be a number >= 0, got -0.1"):
        make(1e-3, **{name: -0.1})


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: sumo_optax.sumo(1e-3, "a quarter"), "rank must be an integer .*got 'a quarter'"),
        (lambda: sumo_optax.scale_in_subspace(8, optax.scale_by_adam()), "inner must be an optax"),
        (lambda: sumo_optax.describe(PARAMS, sumo_optax.sumo(1e-3)), "tx_or_rank must be an optax"),
        (lambda: sumo_optax.state_bytes(PARAMS, sumo_optax.sumo(1e-3)), "tx must be an optax"),
        (lambda: sumo_optax.scale_by_sumo(4, fallback=1e-3), "fallback must be an optax"),
        (lambda: sumo_optax.value_and_update(sumo_optax.sumo(1e-3), sum), "tx must be an optax"),
        (lambda: sumo_optax.quantize_state(4, 4), "tx must be an optax"),
        (lambda: sumo_optax.polar_factor(jnp.eye(2, dtype=int)), "floating-point .* got int32"),
        (lambda: sumo_optax.convert_state(sumo_optax.sumo(1e-3), (), PARAMS), "tx must be an opt"),
        (
            lambda: sumo_optax.describe(4, sumo_optax.sumo(1e-3, 4).init(PARAMS)),
            "params must be a tree of parameters, got the state of an optimizer",
        ),
        (
            lambda: sumo_optax.describe(4, optax.adamw(1e-3).init(PARAMS)),
            "params must be a tree of parameters, got the state of an optimizer",
        ),
        (
            lambda: sumo_optax.describe(4, eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(0))),
            "params must be a tree of arrays, got .*custom_jvp.* at activation.*equinox.filter",
        ),
        (
            lambda: sumo_optax.sumo(1e-3, 4).init(eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(0))),
            "params must be a tree of arrays, got .*custom_jvp.* at activation.*equinox.filter",
        ),
    ],
)
def test_arguments_in_the_wrong_place(call, error):
    with pytest.raises(TypeError, match=error):
        call()


@pytest.mark.parametrize("dtype", ["int16", jnp.int32, jnp.complex64, "bytes", bool])
def test_state_dtype_is_a_floating_point_one_or_of_few_bits(dtype):
    with pytest.raises(ValueError, match="state_dtype must be a floating-point dtype, int8, int4"):
        sumo_optax.sumo(1e-3, state_dtype=dtype)


# Dimension numbers


@pytest.mark.parametrize(
    "numbers, error",
    [
        ((0, 1), r"got \(0, 1\) at \(the root\): write MuonDimensionNumbers\(0, 1\)"),
        ({"up": None, "down": (0, (1,))}, r"got \(0, \(1,\)\) at down: write MuonDimensionNumbers"),
        (lambda _: (0, 1), r"got \(0, 1\) at \(the root\)"),
    ],
)
def test_axes_that_are_no_dimension_numbers(numbers, error):
    with pytest.raises(TypeError, match=error):
        sumo_optax.scale_by_sumo(2, weight_dimension_numbers=numbers).init(PARAMS)


def test_a_spec_for_some_leaves_says_which_go_to_the_fallback():
    tx = sumo_optax.sumo(1e-3, 2, weight_dimension_numbers={"down": Axes()})
    with pytest.warns(UserWarning, match=r"says nothing about up/kernel \(8, 6\): the fallback"):
        tx.init(PARAMS)
    tx = sumo_optax.sumo(1e-3, 2, weight_dimension_numbers={"down": Axes(), "up": None})
    assert jnp.shape(tx.init(PARAMS)[0].basis["down"]) == (6, 2)


def test_a_tree_of_specs_that_can_be_called_is_a_tree():
    model = eqx.filter(eqx.nn.Linear(8, 6, key=jax.random.key(0)), eqx.is_array)
    assert callable(model)
    specs = eqx.tree_at(lambda m: (m.weight, m.bias), model, (Axes(1, 0), None))
    state = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=specs).init(model)
    assert state.basis.weight.shape == (6, 2)


def test_a_spec_for_value_is_for_value_alone():
    params = {"attn": {"query": jnp.ones((8, 6)), "value": jnp.ones((8, 6))}}
    numbers = {"attn": {"query": None, "value": Axes()}}
    state = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=numbers).init(params)
    assert isinstance(state.basis["attn"]["query"], optax.MaskedNode)
    assert state.basis["attn"]["value"].shape == (6, 2)


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


def test_a_field_called_value_is_one_of_several():
    params = Attention(jnp.ones((8, 6)), jnp.ones((8, 6)))
    tx = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=Attention(None, Axes()))
    state = tx.init(params)
    assert isinstance(state.basis.query, optax.MaskedNode)
    assert state.basis.value.shape == (6, 2)
    jax.eval_shape(tx.update, params, state, params)


# What stays ambiguous


AMBIGUOUS = {f"mixer_{i}": jnp.ones((4, 6, 8)) for i in range(7)}


def test_ambiguous_leaves_are_named_once_and_counted():
    params = PARAMS | AMBIGUOUS
    with pytest.warns(UserWarning) as caught:
        sumo_optax.sumo(1e-3, 2).init(params)
    [message] = [str(w.message) for w in caught]
    assert "mixer_0 (4, 6, 8), " in message and "mixer_4" in message and "and 2 more" in message
    assert "mixer_5" not in message and "the fallback trains them" in message


def test_a_side_as_short_as_a_stack_is_named():
    params = {"query": {"kernel": jnp.ones((6, 32, 32))}}
    with pytest.warns(UserWarning, match=r"matrices of query/kernel \(6, 32, 32\) is so short"):
        sumo_optax.scale_by_sumo(2).init(params)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: jax.eval_shape(f, x)])
def test_nothing_but_ambiguous_leaves_is_an_error(wrap):
    with pytest.raises(ValueError, match=r"no leaf is a matrix.*mixer_0 \(4, 6, 8\), .*2 more"):
        wrap(sumo_optax.sumo(1e-3, 2).init)(AMBIGUOUS)


def test_the_default_by_name_is_the_default():
    tx = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=sumo_optax.flax_dimension_numbers)
    with pytest.warns(UserWarning, match="path and shape do not tell .* mixer_0"):
        tx.init(PARAMS | AMBIGUOUS)


def test_trees_of_vectors_and_masked_trees_are_no_mistake():
    vectors = {"norm": {"scale": jnp.ones(4)}, "bias": jnp.ones(4)}
    tx = sumo_optax.sumo(1e-3, 2)
    masked = optax.masked(tx, {"norm": True, "bias": True, "mixer": False})
    part = optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"norm": "a", "bias": "a", "mixer": "b"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(vectors)
        masked.init(vectors | {"mixer": jnp.ones((4, 6, 8))})
        part.init(vectors | {"mixer": jnp.ones((4, 6, 8))})
        optax.masked(tx, False).init(AMBIGUOUS)


def test_describe_says_why():
    params = PARAMS | {"mixer": jnp.ones((4, 6, 8)), "head": {"kernel": jnp.ones((8, 9))}}
    report = sumo_optax.describe(2, params)
    why = {leaf.path: leaf.why for leaf in report.leaves}
    assert why["up/kernel"] == "by the bias beside it"
    assert why["head/kernel"] == "of a table or an output head"
    assert why["mixer"] == "path and shape allow more than one reading"
    table = " ".join(report.reasons.split())
    assert all(reason in table for reason in why.values())
    tx = sumo_optax.sumo(1e-3, 2, weight_dimension_numbers={**params, "up": None, "down": None,
        "head": Axes(), "mixer": Axes(1, 2)})  # fmt: skip
    why = {leaf.path: leaf.why for leaf in sumo_optax.describe(tx, params).leaves}
    assert (
        why["up/kernel"] == why["mixer"] == why["head/kernel"] == "weight_dimension_numbers says so"
    )
