"""Writes a Markdown table of every file in benchmarks/results, for pages to include."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import claims
import compiled
import convergence
import finetuning
import frontier
import on_device
import record
import tuning

# What has a better title or format than its own; bytes are told in MiB.
COLUMNS = {
    "entry": ("optimizer", "{}"),
    "learning_rate": ("learning rate", "{:g}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "seconds": ("seconds", "{:.0f}"),
    "step_ms": ("step, ms", "{:.0f}"),
    "over_adamw": ("over AdamW's", "{:.2f}"),
    "worst_over_median": ("worst over median", "{:.2f}"),
    "refresh_ms": ("first step, ms", "{:.0f}"),
    "compile_s": ("compilation, s", "{:.0f}"),
    "state_bytes": ("state, MiB", "{:.1f}"),
    "step_bytes": ("sent in a step, MiB", "{:.2f}"),
    "sent_bytes": ("sent in every step, MiB", "{:,.1f}"),
    "argument_bytes": ("parameters, state, batch, MiB", "{:,.0f}"),
    "program_bytes": ("program, MiB", "{:,.0f}"),
    "refresh_bytes": ("in branches, MiB", "{:.2f}"),
    "largest_bytes": ("largest collective, MiB", "{:.2f}"),
    "temporary_over_gradient_bytes": ("temporaries / gradients", "{:.2f}"),
    "ms_at_1e+01": ("ms at 10", "{:.2f}"),
    "ms_at_1e+03": ("ms at 1e3", "{:.2f}"),
    "over_newton_schulz_at_1e+01": ("over Newton-Schulz at 10", "{:.2f}"),
    "over_newton_schulz_at_1e+03": ("over Newton-Schulz at 1e3", "{:.2f}"),
    "error_at_1e+01": ("error at 10", "{:.1e}"),
    "error_at_1e+03": ("error at 1e3", "{:.1e}"),
    "error_at_1e+05": ("error at 1e5", "{:.1e}"),
    "ordinary_ms": ("ordinary step, ms", "{:.0f}"),
    "fused_ms": ("value_and_update, ms", "{:.0f}"),
    "over_ordinary": ("over the ordinary step", "{:.2f}"),
    "ordinary_temporary_bytes": ("temporaries of the ordinary step, MiB", "{:.0f}"),
    "fused_temporary_bytes": ("temporaries of value_and_update, MiB", "{:.0f}"),
    "train_step_ms": ("training step, ms", "{:.0f}"),
    "peak_bytes": ("peak memory, MiB", "{:,.0f}"),
    "from": ("from step", "{}"),
    "to": ("to step", "{}"),
    "old": ("energy in the old basis", "{:.3f}"),
    "moved": ("in the moved basis", "{:.3f}"),
    "least": ("moved, worst matrix", "{:.3f}"),
    "kinds": ("collectives of a step", "{}"),
    "gigaflop": ("GFLOP", "{:.0f}"),
    "temporary_bytes": ("temporaries, MiB", "{:.0f}"),
    "returned_bytes": ("returned, MiB", "{:.0f}"),
    "reduced_bytes": ("all-reduced, MiB", "{:.1f}"),
    "mean_energy": ("energy captured", "{:.3f}"),
    "mean_energy_after": ("after the step", "{:.3f}"),
    "largest_orthogonality_error": ("largest ‖PᵀP\xa0-\xa0I‖", "{:.1e}"),
    "final_loss": ("training loss at the end", "{:.3f}"),
    "over_whole_gigaflop": ("GFLOP / whole", "{:.2f}"),
    "over_whole_memory": ("memory / whole", "{:.2f}"),
    "over_whole_time": ("time / whole", "{:.2f}"),
    "over_whole_reduced": ("all-reduced / whole", "{:.2f}"),
}
COLLECTIVES = re.compile(r"[\d,]+ (all-(reduce|gather|to-all)|collective-permute)")
LEFT_OUT = {"worst_ms", "steps", "tokens"}
# Records of which pages show means, or a part.
STUDIES = {
    "claims": claims,
    "compiled": compiled,
    "convergence": convergence,
    "finetuning": finetuning,
    "frontier": frontier,
    "on_device": on_device,
    "tuning": tuning,
}


def write(folder: Path) -> None:
    """One file for each of the results, and their pictures."""
    folder.mkdir(exist_ok=True)
    for path in sorted(record.RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        study = STUDIES.get(path.stem)
        rows = study.table(study.summarize()) if study else table(results["rows"])
        (folder / f"{path.stem}.md").write_text(page(rows, results))
    for path in record.RESULTS.glob("*.svg"):
        shutil.copy(path, folder)


def page(rows: str, results: dict[str, Any]) -> str:
    """A table, and where its figures were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    of_rows = [row.get("machine", results["machine"]) for row in results["rows"]]
    machines = " and ".join(dict.fromkeys(of_rows)).replace("CPU, 1 cores", "CPU, 1 core")
    rows = COLLECTIVES.sub(unbroken, rows)
    return f"{rows}\n\n`{results['command']}`, {results['date']}; {machines}; {versions}.\n"


def unbroken(collective: re.Match[str]) -> str:
    """Without a place for the end of a line."""
    spaced = collective[0].replace(" ", "\N{NO-BREAK SPACE}")
    return spaced.replace("-", "\N{NON-BREAKING HYPHEN}")


def table(rows: list[dict[str, Any]]) -> str:
    values = {key: value for row in rows for key, value in row.items()}
    keys = [k for k, x in values.items() if not isinstance(x, list | dict) and k not in LEFT_OUT]
    columns = {COLUMNS.get(k, (k.replace("_", " "), ""))[0]: f"{{{k}}}" for k in keys}
    if len(columns) < len(keys):
        raise ValueError(f"two of {keys} have the same title")
    return record.table([{k: text(k, row.get(k)) for k in keys} for row in rows], columns)


def text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and key not in COLUMNS:
        return f"{value:.4g}"
    if key.endswith("_bytes") and isinstance(value, int):
        value /= 2**20
    formatted = COLUMNS.get(key, ("", "{}"))[1].format(value)
    return formatted.replace("e-", "e\N{NON-BREAKING HYPHEN}")
