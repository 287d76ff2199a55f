"""One program in several processes, as SLURM, Open MPI, Kubernetes or TPU pods start it."""

import os
import sys
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# What tells a process that it is one of several; the rest JAX finds by itself.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
LISTS = ("TPU_WORKER_HOSTNAMES",)
NAMES = ("JAX_COORDINATOR_ADDRESS",)


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a job scheduler started this process beside others."""
    return (
        any(environment.get(name, "1") not in ("", "1") for name in COUNTS)
        or any("," in environment.get(name, "") for name in LISTS)
        or any(environment.get(name) for name in NAMES)
    )


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Meets the other processes, if there are any. Must come before anything asks for devices."""
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process go together")
    if any(given):
        jax.distributed.initialize(coordinator, processes, process)
    elif is_one_of_several() and not jax.distributed.is_initialized():
        jax.distributed.initialize()
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def all_agree(yes: bool) -> bool:
    """Whether it is so for every process."""
    return bool(np.all(multihost_utils.process_allgather(yes)))


def wait(where: str) -> None:
    """Returns when all processes are there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
