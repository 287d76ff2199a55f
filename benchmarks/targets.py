"""Meshes of devices that are not here, for which XLA compiles all the same.

Needs the extra `compile`. It is imported before JAX, whose plugins read the environment.
"""

import math
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugins compile; none of them has a device to run on
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # or a lock in /tmp, which a killed process leaves
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
# Autotuning runs candidates on the device.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

DESCRIPTION = Path(__file__).parent / "h100.txtpb"


def mesh(target: str, axes: dict[str, int] | None = None) -> Mesh:
    """The first devices of a target along `axes`, by default all along one axis, "x".

    A target is "h100" (one), "h100:8" (so many) or a TPU topology: "v5e:2x2", "v5p:2x2x1".
    """
    if platform(target) == "cuda":
        count = target.partition(":")[2] or "1"
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"1x1x{count}",
            topology=f"1x1x{count}",
            target_config=DESCRIPTION.read_text(),
        )
    else:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=target, chips_per_host_bounds=(2, 2, 1)
        )
    axes = axes or {"x": len(topology.devices)}
    devices = np.array(topology.devices[: math.prod(axes.values())])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def platform(target: str) -> str:
    """What JAX calls it, for `lower(lowering_platforms=...)`."""
    return "cuda" if target.startswith("h100") else "tpu"


def missing(target: str) -> str | None:
    """Why nothing can be compiled for a target here; None where it can."""
    try:
        mesh(target)
    except Exception as error:  # each plugin has its own ways to fail
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None
