"""Runs examples/pretrain.py as two processes on this machine, with four simulated devices each.

python examples/multihost/local.py --mesh data=2,fsdp=2,tensor=2 --steps 50

All arguments go to pretrain.py. The same program runs on a cluster: see slurm.sh and jobset.yaml.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROCESSES = 2
DEVICES = 4
PROGRAM = Path(__file__).parents[1] / "pretrain.py"


def main(argv: list[str]) -> int:
    """Starts the processes and waits for them; the first that fails gives the exit status."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, *argv, "--coordinator", coordinator]
            + ["--processes", str(PROCESSES), "--process", str(i)],
            env=environment,
        )
        for i in range(PROCESSES)
    ]
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
