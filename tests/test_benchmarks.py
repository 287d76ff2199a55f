"""The benchmarks run, in their small versions, and write nothing to the records."""

import ast
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


MICRO = "--width 16 --hidden 24 --heads 2 --layers 1 --length 16"


def test_convergence_walks_to_the_best_rate(tmp_path, monkeypatch):
    """Past its guess, to a rate with worse ones on both sides; no run is made twice."""
    import convergence
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    made = []

    def run(config, name, rate, seed):
        made.append((rate, seed))
        loss = 1 + abs(convergence.RATES.index(rate) - convergence.RATES.index(7e-3)) + seed / 10
        return {
            "validation_loss": loss,
            "state_bytes": 2**20,
            "validated": [[50, 4.0], [100, loss]],
        }

    monkeypatch.setattr(convergence, "run", run)
    timed = {"rows": [{"entry": "adamw", "over_adamw": 1.0}]}
    (tmp_path / "train_step.json").write_text(json.dumps(timed))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        convergence.main(["--only", "adamw"])
        convergence.main(["--only", "adamw"])
    rates = [2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2]
    assert sorted(made) == sorted([(x, 0) for x in rates] + [(7e-3, 1), (7e-3, 2)])
    assert "| adamw | 0.007 | 1.1000 | 0.2000 | 100 | 1.00 | 1.0 |" in out.getvalue()
    assert (tmp_path / "convergence.svg").stat().st_size > 10_000
    assert (tmp_path / "convergence_costs.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_convergence_times_steps(tmp_path):
    import convergence

    with contextlib.redirect_stdout(io.StringIO()) as out:
        convergence.main(["--quick", "--time", "--runs", str(tmp_path), "--only", "mofasgd"])
    first, second = map(ast.literal_eval, out.getvalue().splitlines())
    assert (first["entry"], first["over_adamw"], second["entry"]) == ("adamw", 1, "mofasgd")
    ratio = second["train_step_ms"] / first["train_step_ms"]
    assert second["over_adamw"] == pytest.approx(ratio, abs=1e-3)


@pytest.mark.slow
def test_convergence_trains(tmp_path):
    import convergence

    before = sorted(BENCHMARKS.glob("results/*"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        names = ["adamw", "sumo as published"]
        convergence.main(["--quick", "--runs", str(tmp_path), "--only", *names])
    assert sorted(BENCHMARKS.glob("results/*")) == before
    assert out.getvalue().count("pretrain --out") == 2
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("*/summary.json")]
    losses = [s["validation_loss"] for s in summaries]
    # Four steps neither learn nor diverge: about the log of 256 equally likely bytes.
    assert len(losses) == 2 and all(4 < loss < 8 for loss in losses)


def test_tuning_compares_seed_by_seed(tmp_path, monkeypatch):
    import convergence
    import record
    import tuning

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    made = []

    def trained(out, argv):
        made.append(argv)
        seed = int(argv[argv.index("--seed") + 1])
        return {"validation_loss": 1.5 + seed / 10 + 0.01 * (1 + seed) * ("nesterov=False" in argv)}

    monkeypatch.setattr(convergence, "trained", trained)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tuning.main(["--only", tuning.BASE, "no Nesterov"])
        tuning.main(["--draw"])
    assert len(made) == 4, "drawing trains nothing"
    changed = ["--refresh-every", "1", "--set", "nesterov=False", "--set", "consistent_rms=0.2"]
    assert made[-1] == ["--learning-rate", "0.015", "--seed", "1", *changed]
    assert out.getvalue().count("| no Nesterov | 1.5650 | +0.0150 | +0.0100, +0.0200 |") == 2
    with pytest.raises(SystemExit, match="no variant 'sgd'"):
        tuning.main(["--only", "sgd"])


def test_frontier_has_its_edge(tmp_path, monkeypatch):
    """The least loss for its bytes is on it, at the best of several rates; a run is made once."""
    import frontier
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    found = {"adamw": (8, 1.6), "lion": (4, 1.7), "sumo, rank d/4": (1, 1.65)}
    made = []

    class Runs:
        def __init__(self, config, name):
            self.seeds, self.name = config.seeds, name

        def at(self, rates):
            made.append((self.name, *rates))
            held, loss = found[self.name]
            numbers = {"matrix_bytes": 1000 * held, "numbers": 1000}
            at_rate = lambda rate, seed: loss + 10 * abs(rate - 5e-3) + seed / 100
            return [
                [{"validation_loss": at_rate(rate, seed)} | numbers for seed in range(self.seeds)]
                for rate in rates
            ]

    monkeypatch.setattr(frontier, "Runs", Runs)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        frontier.main(["--only", "adamw", "sumo, rank d/4", "--rate", "5e-3", "--seeds", "2"])
        frontier.main(["--only", *found, "--seeds", "2"])
        frontier.main(["--only", "lion", "--seeds", "2", "--sweep"])
        frontier.main(["--draw"])
    assert len(made) == len(set(made))
    assert [x for x in made if x[0] == "adamw"] == [("adamw", 5e-3), ("adamw", 3e-3)]
    walked = [x[1:] for x in made if x[0] == "lion"]
    assert walked[0] == (5e-4,) and len(walked[1]) == 3 and walked[-1][1] == 5e-3
    (sumo, lion, adamw) = frontier.summarize()
    assert [x["edge"] for x in (sumo, lion, adamw)] == ["yes", "", "yes"]
    assert (adamw["learning_rate"], adamw["loss"]) == (5e-3, pytest.approx(1.605))
    assert "| adamw | 8.000 | 1.6050 | 0.0100 | 2 | 0.005 | yes |" in out.getvalue()
    assert (tmp_path / "frontier.svg").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "update_alone"),
    [("sumo", True), ("adamw", False), ("sumo, value_and_update", False)],
)
def test_on_device_runs_a_step(tmp_path, monkeypatch, optimizer, update_alone):
    """As a case of a small model; its figures are of this machine."""
    import on_device

    (name, *_) = on_device.ON_ONE_H100
    sizes = {"width": 16, "hidden": 24, "layers": 2, "heads": 2, "vocab": 32, "stacked": True}
    model = on_device.training_step.Model(length=8, **sizes)
    small = dataclasses.replace(
        on_device.CASES[name], model=model, rank=4, update_alone=update_alone
    )
    monkeypatch.setitem(on_device.CASES, name, small)
    cache = ["--cache", str(tmp_path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for do in ("compile", "run"):
            on_device.main(["--one", do, "--cases", name, "--optimizers", optimizer, *cache])
    predicted, figures = map(json.loads, out.getvalue().splitlines())
    row = predicted | figures
    assert row["finite"] and 0 < row["ordinary_ms"] <= row["worst_ms"]
    assert row["predicted_bytes"] > 4 * 2 * (4 * 16**2 + 3 * 16 * 24)
    other = row | {"case": name, "outcome": "ran", "step_ms": 2 * row["step_ms"]}
    adamw = row | {"case": name, "outcome": "ran", "optimizer": "adamw"}
    told = on_device.compared([adamw, other | {"optimizer": "sumo"}])
    assert [x["step_ms_over_adamw"] for x in told] == [1, pytest.approx(2, abs=0.01)]
    assert "| sumo |" in on_device.table(told)


@pytest.mark.slow
def test_frontier_trains(tmp_path, monkeypatch):
    """As the pre-training program does, but for all seeds at once."""
    import frontier
    import pretrain
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    names = ["adafactor", "lion, int8", "muon, int4", "adamw", "sumo, whole, rank d/4, int4"]
    with contextlib.redirect_stdout(io.StringIO()):
        model = f"--pretrain={MICRO} --steps 4 --batch 2"
        lock = ["--lock", str(tmp_path / "lock")]
        frontier.main(["--only", *names, model, "--seeds", "1", *lock])
    rows = {x["entry"]: x for x in json.loads((tmp_path / "frontier.json").read_text())["rows"]}
    assert all(4 < rows[name]["validation_loss"] < 8 for name in names)
    assert rows["adamw"]["matrix_bytes"] == 8 * rows["adamw"]["numbers"]
    held = [rows[name]["matrix_bytes"] for name in names]
    assert held[3] > held[1] > held[4]
    argv = f"{MICRO} --steps 4 --batch 2 --optimizer sumo --rank 4 --set".split()
    argv += [*frontier.STUDY[names[-1]].settings.split(), "--out", str(tmp_path / "run")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert pretrain.main(argv) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert rows[names[-1]]["validation_loss"] == pytest.approx(
        summary["validation_loss"], abs=1e-4
    )  # sums in another order


@pytest.mark.slow
def test_finetune_compares(tmp_path, monkeypatch):
    import finetuning
    import record
    import sweep
    import test_finetune

    weights = test_finetune.write_model(tmp_path / "bert")
    test_finetune.write_rte(tmp_path / "RTE", rows=16)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "best_rate", lambda error, guess, *_, **__: min([guess], key=error))
    monkeypatch.setattr(finetuning, "SEEDS", range(2))
    monkeypatch.setattr(finetuning, "SWEPT_TASK", "rte")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        files = ["--model", str(tmp_path / "bert"), "--data", str(tmp_path)]
        runs = ["--tasks", "rte", "--only", "sumo, rank 4", "--runs", str(tmp_path / "runs")]
        finetuning.main([*files, *runs, f"--arguments={test_finetune.SMALL}"])
        finetuning.main([*files, *runs, f"--arguments={test_finetune.SMALL}", "--time"])
    rows = json.loads((tmp_path / "finetuning.json").read_text())["rows"]
    made = [(row["entry"], row["seed"]) for row in rows]
    # The rate of rank 4 is that of rank 8.
    assert made == [("sumo, rank 8", 0), ("sumo, rank 4", 0), ("sumo, rank 4", 1)]
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert "| rte | sumo, rank 4 | 0.002 |" in out.getvalue()
    adamw, sumo = json.loads((tmp_path / "finetuning_step.json").read_text())["rows"]
    assert (adamw["entry"], adamw["over_adamw"], sumo["entry"]) == ("adamw", 1, "sumo, rank 4")
    parameters = 4 * sum(x.size for x in weights.values())
    assert adamw["peak_bytes"] > 3 * parameters, "they, and two moments"


@pytest.mark.slow
def test_step_measures(tmp_path, monkeypatch):
    import record
    import step

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setitem(
        step.PRESETS, "micro", step.PRESETS["tiny"].__class__(16, 24, 2, 1, 8, 1, 1)
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        step.main(["--preset", "micro", "--ranks", "2", "--steps", "1"])
    rows = json.loads((tmp_path / "step_micro.json").read_text())["rows"]
    assert rows[0]["optimizer"] == "optax.adamw" and rows[0]["over_adamw"] == 1
    held = {row["optimizer"]: row["state_bytes"] for row in rows}
    m_plus_n = 4 * (16 + 16) + 3 * (16 + 24)
    # Floats of basis and moment, and two more for each of the 7 matrices; and three counters.
    assert held["sumo, rank 2"] == 4 * (2 * m_plus_n + 14) + 12
    assert "| sumo, rank 2 |" in out.getvalue()


@pytest.mark.slow
def test_subspace_looks(tmp_path, monkeypatch):
    import record
    import subspace

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = ["--steps", "4", "--look-every", "2", "--rank", "4"]
        subspace.main([*arguments, f"--pretrain={MICRO}"])
    rows = json.loads((tmp_path / "subspace.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert [seen["step"] for seen in row["seen"]] == [2, 4]
        assert 0 < row["mean_energy"] <= 1 + 1e-5 and row["largest_orthogonality_error"] < 0.2


@pytest.mark.slow
def test_moved_bases_capture_more(tmp_path, monkeypatch):
    import record
    import refresh

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        refresh.main(["--steps", "2", "4", "--rank", "4", f"--pretrain={MICRO}"])
    rows = json.loads((tmp_path / "refresh.json").read_text())["rows"]
    assert [row["basis"] for row in rows] == ["svd", "randomized_svd", "tracking"]
    assert all(row["old"] < row["moved"] <= 1 + 1e-5 for row in rows)
    # Of the best basis; float32.
    assert abs(rows[0]["moved"] - 1) < 1e-5 and rows[1]["moved"] > 0.98


@pytest.mark.slow
def test_claims_are_looked_at(tmp_path, monkeypatch):
    import claims
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        arguments = ["--steps", "4", "--look-every", "2", "--ranks", "4", "--intervals", "2"]
        claims.main([*arguments, f"--pretrain={MICRO}"])
    rows = json.loads((tmp_path / "claims.json").read_text())["rows"]
    assert [(x["algorithm"], x["step"]) for x in rows] == [
        (name, t) for name in claims.ALGORITHMS for t in (2, 4)
    ]
    for row in rows:
        assert 1 <= row["least_condition"] <= row["median_condition"] <= row["largest_condition"]
        assert 0.01 < row["median_error"] <= row["largest_error"] < 1
    (run,) = json.loads((tmp_path / "grid.json").read_text())["rows"]
    assert (run["rank"], run["refresh_every"]) == (4, 2)
    assert f"| 4 | 2 | {run['validation_loss']:.4f} |" in out.getvalue()
    assert (tmp_path / "claims.svg").stat().st_size > 10_000


def test_polar_factors_are_compared(tmp_path, monkeypatch):
    import polar
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        polar.main(["--ranks", "4", "--n", "32", "--repeats", "1"])
    rows = json.loads((tmp_path / "polar.json").read_text())["rows"]
    errors = {row["method"]: row["error_at_1e+03"] for row in rows}
    assert errors["auto"] < 1e-4 < 0.1 < errors["newton_schulz"]
    assert "| 4 | newton_schulz | 1.00 | 1.00 |" in out.getvalue()


@pytest.mark.slow
def test_collectives_are_counted(tmp_path, monkeypatch):
    import collectives
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        collectives.main(["--m", "16", "--n", "32", "--rank", "4"])
    rows = json.loads((tmp_path / "collectives.json").read_text())["rows"]
    of = {(row["optimizer"], row["sharded"]): row for row in rows}
    assert of["optax.adamw", "both"]["kinds"] == "none"
    assert (
        of["sumo", "both"]["largest_bytes"]
        <= 4 * 32 * 4
        < of["optax galore", "rows"]["largest_bytes"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["faults", "faults_short"])
def test_faults_are_survived(form, tmp_path, monkeypatch):
    """In full; and forked, two at once, with a state in 8 bits."""
    import faults
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the short form adds to it
    short = ["--short", "--at-once", "2", "--set", "state_dtype=int8"]
    with contextlib.redirect_stdout(io.StringIO()):
        size = ["--steps", "60", "--save-every", "10", *(short if form == "faults_short" else [])]
        faults.main(["--kills", "2", *size, "--runs", str(tmp_path / "runs")])
    (row,) = json.loads((tmp_path / f"{form}.json").read_text())["rows"]
    # Of two at once, one may be under way as the last that is needed is killed.
    assert row["kills"] in ((2, 3) if form == "faults_short" else (2,)) and row["runs"] >= 1
    # The first run, and each that was broken.
    assert row["parameters_compared"] == (1 + row["runs"]) * 25184
    assert row["state_bits_compared"] > 32 * row["parameters_compared"]
    assert row["runs_lost"] == row["checkpoints_lost"] == row["parameters_differing"] == 0
    assert row["state_bits_differing"] == 0


def sleep(*_):
    time.sleep(60)


@pytest.mark.slow
def test_faults_know_what_was_killed(tmp_path, monkeypatch):
    """From several threads, of which each kills its own."""
    import faults

    monkeypatch.setattr(faults, "train", sleep)

    def kill(i):
        process = faults.Forked([], {}, tmp_path / str(i))
        time.sleep(0.01 * (i % 5))
        process.kill()
        process.communicate()
        return process.poll()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(kill, range(300))) == 300 * [-signal.SIGKILL]


def test_faults_count_what_differs(monkeypatch):
    import faults

    parts = {"params": np.zeros(8, np.uint8), "optimizer": np.zeros(3, np.uint8)}
    flipped = {name: x.copy() for name, x in parts.items()}
    flipped["params"][5:7] = 1, 9
    flipped["optimizer"][1] = 0b101
    monkeypatch.setattr(faults, "end", lambda config, out: flipped)
    tally = faults.Tally()
    faults.compare(faults.Config(), Path("broken"), parts, tally)
    assert (tally.parameters_compared, tally.parameters_differing) == (2, 1)
    assert (tally.state_bits_compared, tally.state_bits_differing) == (24, 2)


def test_compiled_programs_are_compared(tmp_path, monkeypatch):
    """Rows join the record in place of older ones; what is not compiled says so in the table."""
    import compiled
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    figures = {
        "outcome": "compiled",
        "peak_bytes": 2**31,
        "temporary_bytes": 2**30,
        "kernels": 10,
        "library_calls": {"cusolver_syevd_ffi": 2},
        "compile_s": 2.0,
    }
    row = {"case": "train_1b_h100", "optimizer": "sumo", "planned_bytes": 10, "argument_bytes": 11}
    compiled.add(row | figures | {"compile_s": 50.0})
    for name in ("adamw", "sgd"):
        compiled.add({"case": "train_1b_h100", "optimizer": name} | figures)
    compiled.add(row | figures | {"temporary_bytes": 3 * 2**30, "compile_s": 9.0})
    killed = {"case": "train_1b_h100", "optimizer": "mofasgd"}
    compiled.add(killed | {"outcome": "not compiled after 5 s"})
    rows = {x["optimizer"]: x for x in compiled.summarize()}
    assert list(rows) == ["sgd", "adamw", "sumo", "mofasgd"]
    assert rows["sumo"]["over_sgd"]["temporary_bytes"] == 3
    with contextlib.redirect_stdout(io.StringIO()) as out:
        compiled.main(["--draw"])
    assert "**Training step of LLaMA-1B" in out.getvalue() and "FSDP" not in out.getvalue()
    sumo = (x for x in out.getvalue().splitlines() if x.startswith("| sumo |"))
    cells = [[cell for cell in x.strip("| ").split(" | ")[1:] if cell.strip()] for x in sumo]
    assert cells == [
        ["2,048 (1.00)", "3,072 (3.00)", "1.100"],
        ["10 (1.00)", "2 syevd"],
        ["9.0 (4.50)"],
    ]
    assert "| mofasgd | not compiled after 5 s |" in out.getvalue()
    with pytest.raises(SystemExit, match="'lamb' is none of"):
        compiled.main(["--optimizers", "lamb"])


def test_compiled_programs_fail_in_words():
    import compiled

    large = (
        "Traceback\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory on HBM, the"
        " total memory required for HLO temporaries (17.23G) exceeds available HBM (15.75G)."
    )
    assert compiled.failure(large) == "refused: temporaries of 17.23 GiB, a device has 15.75"
    wrong = "Traceback\nValueError: no\n----\nFor simplicity, JAX has removed its frames"
    assert compiled.failure(wrong) == "fails: ValueError: no"


def test_stacked_layers_are_the_same_model():
    """The training step that is compiled computes the same loss, stacked or not, sharded or not."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import training_step

    model = training_step.Model(16, 24, layers=2, heads=2, vocab=32, length=8)
    mesh = jax.make_mesh((8,), ("x",))
    shapes = training_step.parameters(model, mesh)
    assert shapes["layers"]["0"]["mlp"]["down_proj"]["kernel"].sharding.spec[0] == "x"
    seeds = itertools.count()
    separate = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(next(seeds)), x.shape), shapes
    )
    stack = lambda *layers: jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    stacked = separate | {"layers": stack(*separate["layers"].values())}
    tokens = jnp.arange(9)[None] % 5
    one = float(training_step.loss(model, separate, tokens, None))
    many = float(
        training_step.loss(dataclasses.replace(model, stacked=True), stacked, tokens, None)
    )
    assert one > 0 and one == pytest.approx(many, rel=1e-5)
    numbers = training_step.projections(stacked)
    assert numbers["layers"]["mlp"]["up_proj"]["kernel"] == ((1,), (2,))
    assert numbers["embed_tokens"]["embedding"] is None and numbers["lm_head"]["kernel"] is None
