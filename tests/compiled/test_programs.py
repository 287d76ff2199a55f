"""What the compilers of a GPU and a TPU make of a step; small shapes, nothing is run.

Strict expected failures are what the code falls short of: the reason names the issue that ends it.
"""

import dataclasses
import functools
import math

import compile_one
import jax
import pytest
import training_step
from compiled import Case
from training_step import Model

from sumo_optax import _group

# One worker of pytest-xdist compiles for one of them, so that tests share programs.
TARGETS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("h100", "v5e:2x2")]
SMALL = Model(width=64, hidden=160, layers=1, heads=4, vocab=256)
SHAPES = 3  # of the projections: square, wide and tall
# On a TPU all of a smaller one lies in the fast memory that is not counted.
TRAINED = Model(
    width=1024,
    hidden=2560,
    layers=4,
    heads=4,
    vocab=256,
    dtype="bfloat16",
    stacked=True,
    length=512,
)
# Of the gradients' bytes. A TPU's compiler makes more of the small stacks ready beforehand.
LITTLE = {"h100": 0.25, "v5e:2x2": 0.4}


@functools.cache
def figures(optimizer: str, target: str, model: Model, *, update_alone: bool):
    """Of the compiled step of an optimizer, at rank 16."""
    case = Case("", target, model, rank=16, update_alone=update_alone)
    name = optimizer.removesuffix(", value_and_update")
    return compile_one.figures(case, compile_one.optimizer(name, case), fused=name != optimizer)


def update(optimizer: str, target: str, layers: int):
    model = dataclasses.replace(SMALL, layers=layers)
    return figures(optimizer, target, model, update_alone=True)


def falls_short(issue: int, *names: str):
    """Optimizers that are expected to fail until an issue is done."""
    mark = pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"issue {issue}")
    return [pytest.param(name, marks=mark) for name in names]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "optimizer",
    [
        "sumo",
        "sumo, Newton-Schulz",
        "sumo as published",
        "online_subspace_descent",
        *falls_short(22, "mofasgd"),  # the SVD of its 2r x 2r core is its definition
    ],
)
def test_ordinary_steps_factorise_nothing(on, optimizer, target):
    """No `eigh`, `svd`, `qr` or `cholesky` outside of the branches of conditionals."""
    assert not update(optimizer, on(target), layers=1)["factorisations"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optimizer", ["sumo", "mofasgd", "online_subspace_descent"])
def test_conditionals_are_one_a_group(on, optimizer, target):
    assert update(optimizer, on(target), layers=1)["conditionals"] <= SHAPES


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optimizer", ["sumo"])
def test_kernels_do_not_grow_with_layers(on, optimizer, target):
    """Reading gradients and writing updates is done leaf by leaf, so some growth is left."""
    one, four = (update(optimizer, on(target), layers)["kernels"] for layers in (1, 4))
    assert four <= 3 * one


@pytest.fixture
def small_stacks(monkeypatch):
    """Stacks of more than a layer or two of `TRAINED` are taken in parts, as 7B's are."""
    monkeypatch.setattr(_group, "_LARGEST_STACK", 2**16)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optimizer", ["sumo", "mofasgd", "online_subspace_descent"])
def test_temporaries_of_stacked_layers_are_those_of_sgd(on, optimizer, target, small_stacks):
    assert temporaries_over_sgd(optimizer, on(target), TRAINED) < LITTLE[target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optimizer", ["sumo"])
def test_temporaries_of_separate_layers_are_those_of_sgd(on, optimizer, target, small_stacks):
    model = dataclasses.replace(TRAINED, stacked=False, layers=2)
    assert temporaries_over_sgd(optimizer, on(target), model) < LITTLE[target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optimizer", ["sumo", "adamw"])
def test_updates_inside_the_backward_pass_hold_one_gradient(on, optimizer, target):
    """Less than SGD's ordinary step holds, by most of the gradients of four layers."""
    assert temporaries_over_sgd(f"{optimizer}, value_and_update", on(target), TRAINED) < -0.4


def temporaries_over_sgd(optimizer: str, target: str, model: Model) -> float:
    """What an optimizer adds to the temporaries of a training step, over the gradients' bytes."""
    bytes_of = lambda name: figures(name, target, model, update_alone=False)["temporary_bytes"]
    params = training_step.parameters(model, compile_one.targets.mesh(target, {"x": 1}))
    gradients = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    return (bytes_of(optimizer) - bytes_of("sgd")) / gradients


@pytest.mark.parametrize("optimizer", ["sumo", "mofasgd", "online_subspace_descent"])
def test_state_is_divided_by_all_devices(on, optimizer):
    """Each of eight devices holds an eighth of it, with plain FSDP."""
    case = Case("", on("v5e:2x4"), TRAINED, rank=16, axes={"x": 8})
    everything, share = compile_one.state_bytes(compile_one.optimizer(optimizer, case), case)
    assert share <= 1.05 * everything / 8


def test_counts_are_of_the_program(on):
    """SGD of seven matrices and two norms: as many small kernels, nothing else."""
    row = update("sgd", on("h100"), layers=1)
    assert row["kernels"] == 9 and row["state_bytes"] == 0
    assert row["argument_bytes"] >= 2 * 4 * (4 * 64 * 64 + 3 * 64 * 160)
    assert not row["conditionals"] and not row["library_calls"]


def test_branches_are_told_from_ordinary_steps():
    """A conditional's branches and what only they call do not count as of every step."""
    import program

    text = """HloModule step

%deep (a: f32[]) -> f32[] {
  ROOT %eigh = f32[] custom-call(%a), custom_call_target="syevd", metadata={op_name="jit(f)/eigh"}
}

%refresh (a: f32[]) -> f32[] {
  ROOT %call = f32[] call(%a), to_apply=%deep
}

%keep (a: f32[]) -> f32[] {
  ROOT %b = f32[] add(%a, %a)
}

ENTRY %main (a: f32[]) -> f32[] {
  %c = f32[] fusion(%a), kind=kLoop, calls=%keep
  ROOT %d = f32[] conditional(%p, %c, %c), branch_computations={%refresh, %keep}
}
"""
    lines = program.instructions(text)
    assert program.outside_of_branches(lines) == {"ENTRY", "keep"}
    ordinary = "\n".join(line for name in ("ENTRY", "keep") for line in lines[name])
    assert (program.kernels(text), program.kernels(ordinary)) == (2, 1)
    assert program.factorisations(text) == ["eigh"] and program.factorisations(ordinary) == []
