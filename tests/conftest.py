"""What must be set before JAX is imported, and room for the programs of many tests."""

import gc
import os
from pathlib import Path

import pytest

# Most of the time of these tests is compilation, of programs that run for milliseconds. Meshes are
# made of simulated devices.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
# Threads of LAPACK and of XLA would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Lets go of compiled programs in time: Linux ends a process with 65,530 memory maps."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
        gc.collect()
