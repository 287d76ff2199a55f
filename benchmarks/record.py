"""How a benchmark leaves its figures: JSON in benchmarks/results, and where they were made."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "sumo-optax")


def machine() -> str:
    """What the figures were measured on, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores, {platform.machine()}, {platform.system()}"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write(
    name: str,
    rows: list[dict[str, Any]],
    arguments: Sequence[str] | None = None,
    packages: Sequence[str] = (),
) -> Path:
    """Writes the rows and what they need to be understood; returns the file.

    `packages` are those besides PACKAGES whose versions matter.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *arguments]),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions((*PACKAGES, *packages)),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While one process is inside, others that name the same file wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` gives the title and format of each key."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(form.format(**row) for form in columns.values()) + " |")
    return "\n".join(lines)
