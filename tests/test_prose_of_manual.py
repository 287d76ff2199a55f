"""What the manual says in words is what the records have. Its code is run by `make test-docs`."""

import itertools
import json
from pathlib import Path

import convergence
import finetuning
import frontier
import sweep
import tuning

ROOT = Path(__file__).parents[1]


def test_best_rate_of_sumo_over_that_of_adamw():
    best = {row["entry"]: row["learning_rate"] for row in convergence.summarize()}
    words = " ".join((ROOT / "docs/coming_from.md").read_text().split())
    scale = float(sweep.SCALES["sumo"].removeprefix("consistent_rms="))  # of the record; 1 today
    ratio = scale * best["sumo"] / best["adamw"]
    assert f"the best rate for SUMO is {ratio:.1f} times AdamW's best" in words


def test_subspaces_are_as_good_as_recorded():
    descent, svd = json.loads((ROOT / "benchmarks/results/subspace.json").read_text())["rows"]
    words = " ".join((ROOT / "docs/mathematics.md").read_text().split())
    assert f"was at most {descent['largest_orthogonality_error']:.2f}," in words
    assert f"captured {descent['mean_energy']:.2f} of the energy" in words
    assert f"every 200 steps captured {svd['mean_energy']:.2f}" in words


def test_claims_are_the_recorded_ones():
    looks = json.loads((ROOT / "benchmarks/results/claims.json").read_text())["rows"]
    words = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    for name, algorithm in (("the default", "sumo"), ("as published", "sumo as published")):
        first, *_, last = [x["median_condition"] for x in looks if x["algorithm"] == algorithm]
        assert f"{first:,.0f}" in words and f"to {last:,.0f}" in words, name
    errors = [x["median_error"] for x in looks]
    assert f"by {min(errors):.2f} to {max(errors):.2f} of the norm" in words
    rows = {row["entry"]: row for row in convergence.summarize()}
    for exact in ("sumo", "sumo, longer side", "sumo as published"):
        approximate = rows[f"{exact}, Newton-Schulz"]
        spread = max(rows[exact]["spread"], approximate["spread"])
        assert abs(rows[exact]["mean_loss"] - approximate["mean_loss"]) < spread / 3


def test_aims_are_told_as_recorded():
    rows = {row["entry"]: row for row in convergence.summarize()}
    loss = {name: row["mean_loss"] for name, row in rows.items()}
    words = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    assert f"its loss is {loss['adamw'] - loss['sumo']:.3f} nats lower" in words
    behind = loss["sumo, rank 64"] - loss["optax muon"]
    tuned = loss["sumo, rank 64"] - loss["optax muon, momentum 0.8"]
    assert behind <= 0.02 < tuned
    assert f"optax's default momentum, where SUMO is {behind:.3f} nats behind" in words
    assert f"Muon's best momentum, 0.8, where SUMO is {tuned:.3f} nats behind" in words
    steps = convergence.steps_to(
        loss["optax galore"], rows["sumo"]["steps"], rows["sumo"]["losses"]
    )
    assert f"GaLore's final loss at step {steps:.0f} of 500" in words


def test_tuning_is_told_as_recorded():
    over = {row["variant"]: row["each"] for row in tuning.summarize()}
    words = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    assert "two seeds each" in words and all(len(over[name]) == 2 for name in tuning.VARIANTS)
    for name in ("the longer side", "momentum 0.95", "no Nesterov"):
        assert min(over[name]) > 0.01, "what tells"
    hardly = [
        x for x in over if x.startswith(("tracking at", "refreshed")) or x == "no limit on growth"
    ]
    assert all(abs(x) < 0.011 for name in hardly for x in over[name])
    assert max(over["Adam for the other leaves at 1e-2"]) < 0
    steps = json.loads((ROOT / "benchmarks/results/step_60m.json").read_text())["rows"]
    update = {row["optimizer"]: row["over_adamw"] for row in steps}
    ratio = update["sumo, rank 128"] / update["sumo, rank 128, refresh_every=1"]
    assert f"takes [{ratio:.2f} of the time]" in words


def test_fine_tuning_is_told_as_recorded():
    rows = {(row["task"], row["entry"]): row for row in finetuning.summarize()}
    assert set(rows) == set(itertools.product(finetuning.TASKS, finetuning.STUDY))
    words = " ".join((ROOT / "docs/finetuning.md").read_text().split())
    told = lambda sentence, *figures: sentence.format(*figures) in words
    mrpc = {name: row for (task, name), row in rows.items() if task == "mrpc"}
    score = {name: row["mean_score"] for name, row in mrpc.items()}
    loss = {name: row["mean_loss"] for name, row in mrpc.items()}
    exact, approximate = "sumo, rank {}", "sumo, rank {}, Newton-Schulz"
    sumo, smaller = exact.format(8), exact.format(4)

    assert all(row["seeds"] == (3 if "rank 4" in name else 5) for name, row in mrpc.items())
    share = mrpc[sumo]["state_mib"] / mrpc["adamw"]["state_mib"]
    assert told("as good as AdamW** with {:.0f} % of its state", 100 * share)
    assert told("an F1 of {:.3f} and {:.3f}", score[sumo], score["adamw"])
    assert told("loss of {:.3f} and {:.3f}, lower with 4 of 5 seeds", loss[sumo], loss["adamw"])
    assert told("At rank 4 its F1 is {:.3f}, within the spread", score[smaller])
    for name in (sumo, smaller):
        spread = max(mrpc[name]["spread"], mrpc["adamw"]["spread"])
        assert abs(score[name] - score["adamw"]) < spread

    others = ("optax galore, rank {}", "lora, rank {}", "mofasgd, rank {}")
    pairs = [loss[name.format(rank)] for name in others for rank in (8, 4)]
    assert told(
        "losses at ranks 8 and 4 are {:.3f} and {:.3f} for GaLore, {:.3f} and {:.3f} for LoRA, and"
        " {:.3f} and {:.3f} for MoFaSGD",
        *pairs,
    )
    for rank in (8, 4):
        ours = [loss[name.format(rank)] for name in (exact, approximate)]
        assert max(ours) < min(loss[name.format(rank)] for name in others)
        assert told(f"{{:.3f}} and {{:.3f}}{' at rank 8' if rank == 8 else '. One seed'}", *ours)

    runs = {
        key[1:]: row["validation_loss"]
        for key, row in finetuning.RUNS.rows().items()
        if key[0] == "mrpc"
    }
    assert sum(runs[sumo, 2e-3, s] < runs["adamw", 1e-4, s] for s in range(5)) == 4
    differences = [runs[smaller, 2e-3, s] - runs[approximate.format(4), 2e-3, s] for s in range(3)]
    assert sorted(abs(x) < 0.01 for x in differences) == [False, True, True]
    for name, *rates in ((sumo, 1e-3, 2e-3, 5e-3), ("adamw", 5e-5, 1e-4, 2e-4)):
        below, best, above = (runs[name, rate, 0] for rate in rates)
        assert min(below, above) > best + 0.04, name

    rte = {name: row for (task, name), row in rows.items() if task == "rte"}
    scores = [row["mean_score"] for row in rte.values()]
    assert told("the scores are between {:.3f} and {:.3f}", min(scores), max(scores))
    alike = [(sumo, "adamw"), *((exact.format(r), approximate.format(r)) for r in (8, 4))]
    for one, other in alike:
        apart = abs(rte[one]["mean_score"] - rte[other]["mean_score"])
        assert apart < max(rte[one]["spread"], rte[other]["spread"])

    steps = json.loads((ROOT / "benchmarks/results/finetuning_step.json").read_text())["rows"]
    epoch = {row["entry"]: 114 * row["train_step_ms"] / 1000 for row in steps}
    assert "within 5 % of AdamW's" in words and all(abs(x["over_adamw"] - 1) < 0.05 for x in steps)
    assert told("(AdamW {:.0f} s, SUMO {:.0f} s)", epoch["adamw"], epoch[sumo])


def test_the_frontier_is_told_as_recorded():
    words = " ".join((ROOT / "docs/which_optimizer.md").read_text().split())
    told = lambda form, *values: form.format(*values) in words
    studies = frontier.studies(frontier.summarize())
    english, python = ({x["entry"]: x for x in of} for of in studies.values())
    for rows in (english, python):
        whole = [rows[f"sumo, whole, rank {x}"] for x in ("d/64, int8", "d/16, int8")]
        sumo, adamw = rows["sumo, rank d/4"], rows["adamw"]
        assert max(row["loss"] for row in whole) < sumo["loss"] < adamw["loss"]
        edge = [row["entry"] for row in rows.values() if row["edge"]]
        assert all(name.startswith("sumo, whole") for name in edge if rows[name]["bytes"] < 0.5)
        assert all(name.startswith("muon") for name in edge if rows[name]["bytes"] > 0.5)
        assert sumo["learning_rate"] == adamw["learning_rate"] == 3e-3
        for bits, most in ((8, 0.002), (4, 0.003)):
            assert rows[f"sumo, rank d/4, int{bits}"]["loss"] - sumo["loss"] < most + 5e-4
    assert "8 bits cost at most 0.002 nats and 4 bits at most 0.003" in words
    assert "with that rate `sumo` is ahead of AdamW with every seed on both texts" in words
    losses = {}
    for (text, _, name, rate, _), row in frontier.RUNS.rows().items():
        if rate == 3e-3:
            losses.setdefault((text, name), []).append(row["validation_loss"])
    for text in {text for text, _ in losses}:
        of = zip(losses[text, "sumo, rank d/4"], losses[text, "adamw"], strict=True)
        assert all(ours < theirs for ours, theirs in of)
    gains = [x["adamw"]["loss"] - x["sumo, rank d/4"]["loss"] for x in (english, python)]
    assert told("by {:.2f} nats on the English text and {:.2f} on the other", *gains)
    held = lambda name: 100 * english[name]["bytes"] / english["adamw"]["bytes"]
    assert told("in 8 bits its state is {:.1f} % of AdamW's", held("sumo, whole, rank d/64, int8"))
    assert told("in 4 bits it is {:.1f} %", held("sumo, whole, rank d/4, int4"))
    four, whole = english["muon, int4"], english["sumo, whole, rank d/4, int4"]
    assert told("4 bits cost it {:.3f} nats", four["loss"] - english["muon"]["loss"])
    assert (
        0.5 < four["bytes"] < 0.6
        and four["edge"]
        and whole["loss"] < english["sumo, rank d/4"]["loss"]
    )
    assert all(row["seeds"] == 3 for row in (*english.values(), *python.values()))


def test_every_page_is_in_the_contents():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    contents = set((ROOT / "docs/index.md").read_text().split())
    assert pages and pages <= contents
