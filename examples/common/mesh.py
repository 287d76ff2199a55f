"""Devices of a mesh (data, fsdp, tensor parallel), and processes as job schedulers start them."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
import optax
from common.options import default
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sumo_optax

AXES = ("data", "fsdp", "tensor")
# What ends a block splits its inputs over `tensor`, so that a block needs one sum over it.
INPUTS_OVER_TENSOR = ("o_proj", "down_proj", "embed_tokens")


@dataclasses.dataclass(frozen=True)
class Options:
    """Where it is trained."""

    # How devices share the work: data=N,fsdp=N,tensor=N.
    mesh: Annotated[str | None, default("one device")] = None
    # HOST:PORT of the first process.
    coordinator: Annotated[str | None, default("a job scheduler's")] = None
    # How many processes there are.
    processes: Annotated[int | None, default("a job scheduler's")] = None
    # Which of them this is, from 0.
    process: Annotated[int | None, default("a job scheduler's")] = None


def parse(text: str | None) -> Mesh:
    """The mesh that `data=2,fsdp=2,tensor=2` asks for; one device where nothing is asked."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh takes data=N,fsdp=N,tensor=N, N at least 1, got {text!r}")
        sizes[name] = int(size)
    count, devices = math.prod(sizes.values()), jax.devices() if text else jax.local_devices()[:1]
    if count != len(devices):
        raise ValueError(f"--mesh {text} is for {count} devices, there are {len(devices)}")
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types, devices=devices)


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """Matrices over `fsdp` and `tensor` along their last two axes, all else on every device."""

    def sharding(path: jax.tree_util.KeyPath, x: Any) -> NamedSharding:
        name, entries = jax.tree_util.keystr(path), [None] * x.ndim
        if x.ndim > 1 and "norm" not in name:
            inputs_over_tensor = any(module in name for module in INPUTS_OVER_TENSOR)
            axes = ("tensor", "fsdp") if inputs_over_tensor else ("fsdp", "tensor")
            # An axis that the devices do not divide stays whole.
            sizes = zip(axes, x.shape[-2:], strict=True)
            entries[-2:] = [a if size % mesh.shape[a] == 0 else None for a, size in sizes]
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map_with_path(sharding, params)


def abstract_state(mesh: Mesh, tx: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    """Shapes, dtypes and shardings of parameters and of the optimizer's state."""
    shardings = parameter_shardings(mesh, params)
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(placed, params, shardings)
    return params, sumo_optax.abstract_state(tx, params, shardings)


def batch_sharding(state: Any) -> NamedSharding:
    """Rows over all devices that do not share a matrix's outputs, on the mesh of a state."""
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a job scheduler started this process beside others; JAX finds the rest by itself."""
    counts = (environment.get(x) or "1" for x in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return set(counts) != {"1"} or "," in hosts or bool(environment.get("JAX_COORDINATOR_ADDRESS"))


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Meets the other processes, if there are any. Must come before anything asks for devices."""
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process go together")
    if (any(given) or is_one_of_several()) and not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, processes, process)
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


leads = lambda: jax.process_index() == 0  # and alone prints and writes
all_agree = lambda yes: bool(np.all(multihost_utils.process_allgather(yes)))
wait = multihost_utils.sync_global_devices  # until all processes are there; says where
