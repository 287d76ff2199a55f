"""What must be set before JAX is imported."""

import os

# Most of the time of these tests is compilation, of programs that run for milliseconds. Meshes are
# made of simulated devices.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
# Threads of LAPACK and of XLA would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
