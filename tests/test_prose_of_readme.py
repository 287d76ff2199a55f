"""What the README says in words and tables is what the records have."""

import itertools
import json
from pathlib import Path

import convergence

ROOT = Path(__file__).parents[1]

PEAKS = {
    "AdamW": "adamw",
    "SUMO, rank 1024": "sumo",
    "SUMO, rank 1024, state in 4 bits": "sumo, 4 bits",
}
README = (ROOT / "README.md").read_text()


def test_peaks_of_7b_are_the_recorded_ones():
    """In the manual too."""
    rows = json.loads((ROOT / "benchmarks/results/compiled.json").read_text())["rows"]
    peaks = {
        row["optimizer"]: f"{row['peak_bytes'] / 2**30:.1f}"
        for row in rows
        if row["case"] == "train_7b_h100" and "peak_bytes" in row
    }
    for page in (README, (ROOT / "docs/one_card.md").read_text()):
        for title, name in PEAKS.items():
            assert f"| {title} | {peaks[name]} | {peaks[f'{name}, value_and_update']} |\n" in page
        words = " ".join(page.split())
        assert f"{peaks['sumo, value_and_update']} GiB" in words
        assert f"{peaks['adamw']} GiB" in words
    assert f"GiB, rank 1024 | {peaks['muon']} | {peaks['sumo']} |\n" in README


def test_what_an_h100_took_is_told():
    rows = json.loads((ROOT / "benchmarks/results/on_device.json").read_text())["rows"]
    of = {row["optimizer"]: row for row in rows if row["case"] == "train_7b_h100"}
    adamw, sumo = of["adamw"], of["sumo"]
    gib = [f"{row['peak_bytes'] / 2**30:.1f}" for row in (adamw, sumo)]
    words = " ".join(README.split())
    assert f"AdamW and SUMO used {gib[0]} and {gib[1]} GiB" in words
    seconds = [row["ordinary_ms"] / 1000 for row in (adamw, sumo)]
    assert f"rank 1024 takes {seconds[1] - seconds[0]:.1f} s longer on an H100" in words
    assert f"which takes {seconds[0]:.1f} s for 2,048 tokens" in words
    page = " ".join((ROOT / "docs/accelerators.md").read_text().split())
    assert f"takes {seconds[1]:.1f} s with SUMO and {seconds[0]:.1f} s with AdamW" in page
    assert "compiler predicted, to 0.6 %" in page
    assert all(1 < row["peak_bytes"] / row["predicted_bytes"] < 1.006 for row in (adamw, sumo))


def test_bytes_sent_are_the_recorded_ones():
    rows = json.loads((ROOT / "benchmarks/results/collectives.json").read_text())["rows"]
    sent = {r["optimizer"]: r["step_bytes"] for r in rows if r["sharded"] == "rows"}
    words = " ".join(README.split())
    for name in ("sumo", "optax muon"):
        assert f" {sent[name] / 1e6:.{2 if sent[name] < 1e6 else 1}f} MB" in words
    muon, ours = (f"{sent[name] / 1e6:.1f}" for name in ("optax muon", "sumo"))
    assert f"MB, rank 128 | {muon} | {ours} |\n" in README


def test_table_of_the_study_is_the_recorded_one():
    rows = convergence.summarize()
    recorded = convergence.table(rows).splitlines()
    lines = README.splitlines()
    table = list(itertools.takewhile(bool, lines[lines.index(recorded[0]) :]))
    assert len(table) == 15 and table == [line for line in recorded if line in table]
    by_name = {row["entry"]: row for row in rows}
    words = " ".join(README.split())
    assert f"AdamW's final loss in {by_name['sumo']['time_to_adamw']} of the time" in words
    better = by_name["sumo as published"]["mean_loss"] - by_name["sumo"]["mean_loss"]
    assert f"{better:.2f} nats better than as published" in words
    behind = by_name["sumo, rank 64"]["mean_loss"] - by_name["optax muon"]["mean_loss"]
    tuned = by_name["sumo, rank 64"]["mean_loss"] - by_name["optax muon, momentum 0.8"]["mean_loss"]
    assert f"{behind:.3f} nats behind Muon, and {tuned:.3f} nats behind Muon with" in words
    why_not_muon = "{:.4f} nats per byte with momentum 0.8 and {:.4f} with optax's default, against"
    why_not_muon += " {:.4f} for SUMO at rank 64 and {:.4f} at its default rank"
    compared = ("optax muon, momentum 0.8", "optax muon", "sumo, rank 64", "sumo")
    assert why_not_muon.format(*(by_name[name]["mean_loss"] for name in compared)) in words
    muon, ours = (f"{by_name[name]['state_mib']:.1f}" for name in ("optax muon", "sumo"))
    assert f"| state of the study's model, MiB | {muon} | {ours} |\n" in README
    small, adamw = by_name["sumo, rank 16"], by_name["adamw"]
    assert round(adamw["state_mib"] / by_name["sumo"]["state_mib"]) == 4, "a quarter"
    assert small["mean_loss"] < adamw["mean_loss"]
    assert round(adamw["state_mib"] / small["state_mib"]) == 6, "a sixth"
    others = [row["mean_loss"] for name, row in by_name.items() if "sumo" not in name]
    first = ("optax muon, momentum 0.8", "optax muon", "adamw")
    assert sorted(others)[:3] == [by_name[name]["mean_loss"] for name in first]


def test_step_table_is_the_recorded_one():
    rows = json.loads((ROOT / "benchmarks/results/step_60m.json").read_text())["rows"]
    lines, words = README.splitlines(), " ".join(README.split())
    recorded = [
        f"| {r['optimizer']} | {r['over_adamw']:.2f} | {r['state_bytes'] / 2**20:.1f} |"
        for r in rows
    ]
    assert sum(line in lines for line in recorded) == 10
    by_name = {r["optimizer"]: r for r in rows}
    for name, row in by_name.items():
        if "alone" in name:
            assert f"| *{name}* | {row['over_adamw']:.2f} | |" in lines
    dearest = by_name["sumo, rank 128"]["worst_over_median"]
    assert f"takes {dearest:.1f} times the median" in words
    muon, sumo = by_name["optax muon"], by_name["sumo, rank 128"]
    held = " | ".join(f"{row['state_bytes'] / 2**20:.1f}" for row in (muon, sumo))
    assert f"MiB, rank 128 | {held} |\n" in README
    assert f"over AdamW's | {muon['over_adamw']:.2f} | {sumo['over_adamw']:.2f} |\n" in README
    ours = by_name["sumo, rank 128, side=long, refreshed every 200, residual=None"]["refresh_ms"]
    ratio = ours / by_name["optax galore, rank 128"]["refresh_ms"]
    assert f"A refresh at rank 128 takes {ratio:.2f} of the time of GaLore's" in words


def test_faults_are_the_recorded_ones():
    (row,) = json.loads((ROOT / "benchmarks/results/faults.json").read_text())["rows"]
    words = " ".join(README.split())
    for figure in (
        f"killed with SIGKILL {row['kills']} times",
        f"{row['kills_while_saving']} of them while it saved a checkpoint",
        f"{row['kills_while_stepping']} during steps and refreshes",
        f"{row['kills_before_the_first_step']} before its first step",
        f"{row['runs_lost']} runs lost, {row['checkpoints_lost']} checkpoints lost",
        f"{row['parameters_differing']} of {row['parameters_compared']:,} parameters",
    ):
        assert figure in words
    (row,) = json.loads((ROOT / "benchmarks/results/faults_short.json").read_text())["rows"]
    changed = f"{row['parameters_differing']} of {row['parameters_compared']:,} parameters"
    bits = f"{row['state_bits_differing']} of {row['state_bits_compared']:,} bits"
    assert f"{row['kills']:,} kills changed {changed} and {bits} of the optimizer's" in words
    assert f"gave up {row['runs_lost']} of those {row['runs']} runs" in words
