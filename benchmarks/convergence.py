"""Validation loss of the pre-training example by optimizer and learning rate, for equal tokens.

python benchmarks/convergence.py           # 8 runs, about 20 minutes on two cores
python benchmarks/convergence.py --optimizers adamw sumo muon galore mofasgd
python benchmarks/convergence.py --quick   # one rate each, a few steps of a very small model

A run that is finished is not run again: stop and start as you like.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain
import record

# The optimizers and the peaks of their learning rates.
SWEEP = {
    "adamw": (1e-3, 2.5e-3, 5e-3, 1e-2),
    "muon": (5e-3, 1e-2, 2e-2, 4e-2),
    "galore": (5e-3, 1e-2, 2e-2, 4e-2),
    "sumo": (5e-3, 1e-2, 1.5e-2, 2.5e-2),
    "online_subspace_descent": (5e-3, 1e-2, 2e-2, 4e-2),
    "mofasgd": (5e-3, 1e-2, 1.5e-2, 2.5e-2),
}
QUICK = ["--steps", "4", "--width", "32", "--hidden", "32", "--layers", "1", "--length", "32"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the preset `tiny` with every optimizer of the sweep."""

    optimizers: tuple[str, ...] = ("adamw", "sumo")
    """Which of the sweep's."""
    quick: bool = False
    """A small version, for the tests."""
    runs: Path = Path("runs/convergence")
    """Where the runs are kept."""


def run(config: Config, optimizer: str, rate: float) -> dict[str, Any]:
    """One training run, or what an earlier one left."""
    out = config.runs / f"{'quick-' if config.quick else ''}{optimizer}-{rate:g}"
    summary = out / "summary.json"
    if not summary.exists():
        argv = ["--optimizer", optimizer, "--learning-rate", str(rate), "--out", str(out)]
        argv += ["--overwrite", *(QUICK if config.quick else [])]
        print("pretrain", *argv, flush=True)
        with contextlib.nullcontext() if not config.quick else contextlib.redirect_stdout(None):
            code = pretrain.main(argv)
        if code:
            raise SystemExit(code)
    return {"optimizer": optimizer, "learning_rate": rate} | json.loads(summary.read_text())


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    rates = lambda name: SWEEP[name][:1] if config.quick else SWEEP[name]
    rows = [run(config, name, rate) for name in config.optimizers for rate in rates(name)]
    if not config.quick:
        print("written:", record.write("convergence", rows))
    columns = {
        "optimizer": "{optimizer}",
        "learning rate": "{learning_rate:g}",
        "validation loss": "{validation_loss:.4f}",
        "seconds": "{seconds:.0f}",
        "state": "{state_bytes:,}",
    }
    print(record.table(rows, columns))


if __name__ == "__main__":
    main()
