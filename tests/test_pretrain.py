"""The pre-training program: its model, its data, its runs and its refusals."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image as plt
import numpy as np
import orbax.checkpoint as ocp
import pretrain
import pytest
from common import llama, mesh, metrics, optimizers, run_folder, text
from flax import nnx

import sumo_optax

SHAPE = llama.LlamaConfig(vocab=64, width=32, hidden=48, heads=2, layers=3)
MICRO = "--width 32 --hidden 48 --heads 2 --layers 1 --length 32 --batch 8 --eval-windows 16"


def random_tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, SHAPE.vocab, shape))


# The model


@nnx.jit
def logits(model: llama.Llama, tokens_BxL: jax.Array) -> jax.Array:
    return model(tokens_BxL)


def test_no_token_sees_a_later_one():
    model = llama.Llama(SHAPE, nnx.Rngs(0))
    before = random_tokens(2, 16)
    after = before.at[:, 9].add(1)
    change = np.abs(logits(model, before) - logits(model, after)).max(axis=(0, 2))
    assert (change[:9] == 0).all()
    assert (change[9:] > 0).all()


def test_stacked_blocks_equal_unrolled_ones():
    unrolled = llama.Llama(SHAPE, nnx.Rngs(0))
    scanned = llama.Llama(dataclasses.replace(SHAPE, scan_layers=True), nnx.Rngs(1))
    weights = nnx.to_pure_dict(nnx.state(unrolled, nnx.Param))
    weights["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *weights["layers"].values())
    state = nnx.state(scanned, nnx.Param)
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(scanned, state)
    inputs = random_tokens(2, 16)
    np.testing.assert_allclose(logits(scanned, inputs), logits(unrolled, inputs), atol=1e-5)


def test_stacked_blocks_start_different_from_each_other():
    shape = dataclasses.replace(SHAPE, scan_layers=True)
    blocks = llama.Llama(shape, nnx.Rngs(0)).layers
    kernels = blocks.mlp.up_proj.kernel[...]
    assert kernels.shape == (3, 32, 48)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


def test_rotated_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 8))
    q_LxK, k_LxK = (llama.rotate(jnp.broadcast_to(x, (1, 20, 1, 8)))[0, :, 0] for x in (q, k))
    products = np.asarray(q_LxK @ k_LxK.T)
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(np.diagonal(products), q @ k, atol=1e-5)


# The data


def test_split_by_name_is_disjoint_stable_and_about_a_twentieth():
    documents = {f"folder/{i}.py": f"text {i}" for i in range(2000)}
    training, validation = text.split(documents)
    assert sorted(training + validation) == sorted(documents.values())
    assert 60 < len(validation) < 140
    # Other files do not move a file to the other side.
    fewer = dict(list(documents.items())[::3])
    assert set(text.split(fewer)[1]) < set(validation)


def shuffled_batches(batch=4):
    windows = text.windows(np.arange(65), length=4, name="training")
    return iter(text.shuffled(windows, seed=0).batch(batch))


def test_a_single_file_keeps_its_end_for_validation():
    assert text.split({"a.txt": "x" * 190 + "y" * 10}) == (["x" * 190], ["y" * 10])


def test_standard_library_leaves_out_tests_and_packages():
    names = text.read(None)
    assert "argparse.py" in names
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in names)


def test_targets_are_inputs_moved_by_one_and_windows_cover_all_targets():
    windows = text.windows(np.arange(101), length=20, name="training")
    assert len(windows) == 5
    targets = np.concatenate([window[1:] for window in windows])
    np.testing.assert_array_equal(targets, np.arange(1, 101))
    for window in windows:
        np.testing.assert_array_equal(window[1:], window[:-1] + 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_go_through_all_windows_in_another_order_each_time(batch):
    batches = shuffled_batches(batch)
    starts = np.concatenate([next(batches)[:, 0] for _ in range(32 // batch)])
    first, second = np.split(starts, 2)
    assert sorted(first) == sorted(second) == list(range(0, 64, 4))
    assert list(first) != list(second)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_tokens_give_the_text_back(spec):
    source = "def naïve(x):\n\treturn '…'  # 漢字\n" * 5
    tokenizer = text.make_tokenizer(spec, [source])
    encoded = tokenizer.encode([source, source])
    decode = tokenizer.bpe.decode if tokenizer.bpe else lambda x: bytes(x).decode()
    assert decode(encoded.tolist()) == (source + text.END) * 2
    assert encoded.max() < tokenizer.vocab
    assert spec == "bytes" or len(encoded) < len(source)


@pytest.fixture
def hub_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for split, rows in {"train": 50, "validation": 8}.items():
        lines = [json.dumps({"text": f"{split} {i} " * (i % 5 + 1)}) for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_stream_goes_on_where_it_was(hub_folder):
    def batches():
        argv = f"--data hf:{hub_folder} --length 16 --batch 4 --eval-windows 1".split()
        return text.load(pretrain.parse(argv), None)[1]

    unbroken = batches()
    for _ in range(7):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = batches()
    resumed.set_state(state)
    for _ in range(60):  # more than once through the data
        np.testing.assert_array_equal(next(resumed), next(unbroken))


def test_stream_has_all_its_text_in_windows(hub_folder):
    argv = f"--data hf:{hub_folder} --length 16 --batch 4 --eval-windows 1".split()
    stream = text.load(pretrain.parse(argv), None)[1]
    texts = [row["text"] for row in text.stream(hub_folder)[0]]
    tokens = text.Tokenizer().encode(1000 // len(texts) * texts)  # `datasets` takes 1,000 together
    expected = np.resize(tokens, (-(-len(tokens) // 17), 17))
    seen = np.concatenate([next(stream) for _ in range(len(expected) // 4)])
    assert (seen != expected[: len(seen)]).any(), "in another order"
    rows = sorted(map(tuple, expected.tolist()))
    for row in map(tuple, seen.tolist()):
        rows.remove(row)
    assert len(rows) < 4


def test_stream_keeps_validation_apart(hub_folder, monkeypatch):
    assert all(t.startswith("validation") for t in text.stream(hub_folder)[1])
    (Path(hub_folder) / "validation.jsonl").unlink()
    monkeypatch.setattr(text, "HELD_OUT", 5)
    rows, validation = text.stream(hub_folder)
    training = {row["text"] for row in rows}
    assert len(validation) == 5
    assert len(training) == 45
    assert not training & set(validation)


# Runs


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Most runs here compile the same programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sentences of a few words, many times: something to learn in a few steps."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it"]
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text(" ".join(rng.choice(words, 20_000)))
    return path


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(arguments: str = "", data: object = corpus) -> int:
        try:
            return pretrain.main(f"{MICRO} --data {data} {arguments}".split())
        except SystemExit as exit:  # of tyro
            return exit.code

    return call


def test_first_loss_is_that_of_a_guess(corpus):
    run = pretrain.prepare(pretrain.parse(f"{MICRO} --data {corpus} --optimizer adamw".split()))
    windows = np.random.default_rng(0).integers(0, 256, (16, 33))
    # Logits of variance one cost half a nat more than equal ones.
    first = jax.jit(run.loss)(jax.jit(run.init)().params, windows)
    assert first == pytest.approx(np.log(256) + 0.5, abs=0.3)


def losses(out: Path) -> list[tuple[int, float]]:
    return list(zip(logged(out, "step"), logged(out, "loss"), strict=True))


def logged(out: Path, name: str) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows]


def checkpoint(out: Path, step: int) -> list[np.ndarray]:
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
    restored = run_folder.Checkpoints(out, {}).manager.restore(step, args=arguments)
    return jax.tree.leaves(restored["state"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sumo", "online_subspace_descent", "mofasgd"])
def test_logs_and_draws_subspaces(run, optimizer, tmp_path):
    arguments = f"--optimizer {optimizer} --rank 4 --steps 4"
    assert run(f"{arguments} --out plain") == 0
    assert run(f"{arguments} --out logged --log-subspace") == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "logged"), "to look changes nothing"
    plain, drawn = (plt.imread(tmp_path / x / "loss.png") for x in ("plain", "logged"))
    assert drawn.shape[0] > 2 * plain.shape[0], "panels below the loss"
    lines = (tmp_path / "logged" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(0 <= row["captured"] <= 1 and 1 <= row["effective_rank"] <= 4.001 for row in rows)
    assert rows[-1]["captured"] > 0.1 and rows[-1]["rotation"] > 0
    # SUMO moves its bases at the first of these steps, the others at each.
    since = [0, 1, 2, 3] if optimizer == "sumo" else [0, 0, 0, 0]
    assert [row["steps_since_refresh"] for row in rows] == since
    assert all(row["skipped"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--optimizer sumo --refresh-every 6", "--optimizer mofasgd"])
def test_learns_from_gradients_in_the_subspace(run, arguments, tmp_path, monkeypatch):
    find, asked = sumo_optax.subspace_value_and_grad, []

    def noted(loss):
        value_and_grad = find(loss)
        return lambda *args, full: asked.append(full) or value_and_grad(*args, full=full)

    monkeypatch.setattr(sumo_optax, "subspace_value_and_grad", noted)
    shared = f"{arguments} --rank 4 --scan-layers --subspace-gradients"
    assert run(f"{shared} --steps 40 --out whole") == 0
    assert set(asked) == {True, False}, "both steps were compiled"
    rows = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert json.loads((tmp_path / "whole/config.json").read_text())["subspace_gradients"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param("--optimizer adamw --scan-layers", marks=pytest.mark.slow),
        pytest.param("--optimizer sumo", marks=pytest.mark.slow),
        pytest.param(
            "--optimizer sumo --scan-layers --mesh data=2,fsdp=2,tensor=2", marks=pytest.mark.slow
        ),
    ],
)
def test_updates_inside_the_backward_pass_are_the_ordinary_ones(
    run, arguments, tmp_path, monkeypatch
):
    """But for clipping, which is by another norm."""
    create = optimizers.create
    unclipped = lambda _: sumo_optax.clip_by_last_norm(1e9)
    monkeypatch.setattr(optimizers, "create", lambda *given: create(*given[:3], unclipped))
    shared = f"{arguments} --layers 2 --steps 6"
    assert run(f"{shared} --out ordinary") == 0
    assert run(f"{shared} --fused --out fused") == 0
    expected = np.array(losses(tmp_path / "ordinary"))
    np.testing.assert_allclose(losses(tmp_path / "fused"), expected, rtol=1e-4)
    assert expected[-1, 1] < expected[0, 1] - 0.3, "it trains"
    norms = [logged(tmp_path / out, "gradient_norm") for out in ("ordinary", "fused")]
    np.testing.assert_allclose(*norms, rtol=1e-3)


def test_learns_and_writes_all_it_says(run, capsys, tmp_path):
    assert run("--optimizer adamw --steps 60 --out out") == 0
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] > 5
    assert rows[-1]["validation_loss"] < 2
    assert sum("validation_loss" in row for row in rows) == 10
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates[:7], np.arange(7) * 3e-3 / 6, rtol=1e-5)
    decay = 3e-4 + 2.7e-3 * (1 + np.cos(np.pi * np.arange(54) / 54)) / 2
    np.testing.assert_allclose(rates[6:], decay, rtol=1e-5)
    assert all(0 < row["gradient_norm"] < 100 for row in rows)
    for row in rows:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(8 * 32, rel=1e-2)
    assert (out / "loss.png").stat().st_size > 10_000
    assert (out / "checkpoints" / "60").is_dir()
    printed = capsys.readouterr().out
    for words in ("q_proj", "validation loss", "tokens/s", "MiB", "loss.png"):
        assert words in printed


@pytest.mark.slow
def test_gradient_norm_is_that_of_the_first_gradient(corpus, tmp_path):
    """Also where clipping alone has it."""
    argv = f"{MICRO} --data {corpus} --optimizer adamw --out {tmp_path / 'out'}".split()
    norms = []
    for extra in ([], ["--scan-layers", "--fused"]):
        run = pretrain.prepare(pretrain.parse([*argv, *extra]))
        state, windows = run.init(), next(run.batches)
        gradients = jax.grad(run.loss)(state.params, windows)
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(gradients)]
        norms.append(np.linalg.norm(np.concatenate(leaves)))
        _, logged = run.compile()(1, state, windows)
        assert float(logged["gradient_norm"]) == pytest.approx(norms[-1], rel=1e-4)


class Board:
    """In the place of tensorboardX and wandb: what they are given."""

    def __init__(self, **given):
        self.given, self.rows, self.id = given, [], "some-id"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def add_scalar(self, name, value, step):
        self.rows.append((step, name, value))

    def log(self, row, step):
        self.rows += [(step, name, value) for name, value in row.items()]


def test_metrics_go_to_boards(tmp_path, monkeypatch):
    boards = []
    make = lambda *args, **given: boards.append(Board(args=args, **given)) or boards[-1]
    modules = {"tensorboardX": {"SummaryWriter": make}, "wandb": {"init": make}}
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    output = run_folder.Options(tensorboard=True, wandb="project")
    rows = [{"step": 7, "loss": 1.5}, {"step": 8, "loss": 1.0, "validation_loss": 2.0}]
    for start in (0, 6):
        with metrics.Metrics(tmp_path, start, output, {"rank": 4}) as log:
            log.add(rows)
    expected = [(7, "loss", 1.5), (8, "loss", 1.0), (8, "validation_loss", 2.0)]
    assert all(board.rows == expected and board.closed for board in boards)
    first, sent, second, resumed = (board.given for board in boards)
    assert first["args"] == (str(tmp_path / "tensorboard"),)
    assert (first["purge_step"], second["purge_step"]) == (1, 7)
    assert sent["project"] == "project" and sent["config"] == {"rank": 4} and sent["id"] is None
    assert resumed["id"] == "some-id" and resumed["resume"] == "allow"


@pytest.mark.parametrize(
    "extra",
    [
        "--optimizer sumo --refresh-every 5",
        pytest.param(
            "--optimizer adamw --scan-layers --data hf:{hub} --tokenizer bpe:280",
            marks=pytest.mark.slow,
        ),
        pytest.param("--optimizer adamw --scan-layers --fused", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_an_unbroken_one(run, hub_folder, extra, tmp_path, monkeypatch):
    arguments = f"{extra} --steps 24 --save-every 8".format(hub=hub_folder)
    assert run(f"{arguments} --out unbroken") == 0

    add = metrics.Metrics.add

    def interrupt(self, rows):
        add(self, rows)
        if rows[-1]["step"] == 18:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "add", interrupt)
        assert run(f"{arguments} --out broken") == 130
    assert losses(tmp_path / "broken")[-1][0] == 18  # two steps after the last checkpoint
    assert run(f"{arguments} --out broken --resume") == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    for a, b in zip(
        checkpoint(tmp_path / "broken", 24), checkpoint(tmp_path / "unbroken", 24), strict=True
    ):
        np.testing.assert_array_equal(a, b)


UNBROKEN = "--refresh-every 5 --steps 24 --save-every 8"


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert pretrain.main(f"{MICRO} --data {corpus} {UNBROKEN} --out {out}".split()) == 0
    return out


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    for x, y in zip(checkpoint(a, 24), checkpoint(b, 24), strict=True):
        assert x.tobytes() == y.tobytes()


def at_step(monkeypatch, step: int, happens) -> None:
    """Lets something happen when the losses of that step are written."""
    add = metrics.Metrics.add

    def patched(self, rows):
        add(self, rows)
        if rows[-1]["step"] == step:
            happens()

    monkeypatch.setattr(metrics.Metrics, "add", patched)


@pytest.mark.slow
def test_a_signal_writes_a_checkpoint_first(run, capsys, unbroken, tmp_path, monkeypatch):
    """Of the step it came in, and a run that two signals broke ends as if there were none."""
    arguments, before = f"{UNBROKEN} --out out", signal.getsignal(signal.SIGINT)
    for number, step in [(signal.SIGTERM, 10), (signal.SIGINT, 20)]:
        with monkeypatch.context() as patch:
            at_step(patch, step, functools.partial(signal.raise_signal, number))
            assert run(arguments) == 128 + number
        assert f"--resume --out out goes on from step {step + 1}" in capsys.readouterr().err
        assert losses(tmp_path / "out")[-1][0] == step + 1
        assert (tmp_path / f"out/checkpoints/{step + 1}").is_dir()
        arguments = f"{UNBROKEN} --out out --resume"
    assert run(arguments) == 0
    assert "going on from step 21" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert_same_run(tmp_path / "out", unbroken)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again(run, capsys, unbroken, tmp_path):
    """Killed before its first one, while it said what run it is."""
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_text('{"steps')
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert run(f"{UNBROKEN} --out out --resume") == 0
    assert "no checkpoint yet: starting from step 0\n" in capsys.readouterr().out
    assert_same_run(out, unbroken)


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint(run, capsys, unbroken, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        while not (tmp_path / "out/checkpoints/8").is_dir():
            time.sleep(0.01)
        # Room for the metrics, none for a checkpoint.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))

    try:
        with monkeypatch.context() as patch:
            at_step(patch, 16, fill)
            code = run(f"{UNBROKEN} --out out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: a checkpoint could not be written")
    assert error.endswith("those there are good: 8\n") and error.count("\n") == 1
    assert run(f"{UNBROKEN} --out out --resume") == 0
    assert "going on from step 8" in capsys.readouterr().out
    assert_same_run(tmp_path / "out", unbroken)


@pytest.mark.slow
def test_a_torn_checkpoint_falls_back_to_the_one_before(run, capsys, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    (out / "checkpoints/24/state/_METADATA").write_bytes(b"{")
    assert run(f"{UNBROKEN} --out out --resume") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: checkpoint 24 cannot be read")
    assert printed.err.count("\n") == 1
    assert "going on from step 16" in printed.out
    assert_same_run(out, unbroken)


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("item", ["state/_METADATA", "state/ocdbt*/d", "progress/metadata"])
def test_no_damage_goes_unseen(tmp_path, capsys, item, how):
    """Not even of a single bit, which Orbax takes for a number."""
    state = {"basis": jax.random.normal(jax.random.key(0), (40, 20))}
    saved = {1: state, 2: {"basis": 2 * state["basis"]}}
    batches = shuffled_batches()
    checkpoints = run_folder.Checkpoints(tmp_path, {})
    for step in (1, 2):
        next(batches)
        checkpoints.save(step, saved[step], batches, float(step))
    checkpoints.close()
    place = tmp_path / "checkpoints/2" / item
    (place,) = place.parent.parent.glob(f"{place.parent.name}/{place.name}")
    if place.is_dir():
        files = (x for x in place.iterdir() if not x.name.startswith("commit"))
        place = max(files, key=lambda x: x.stat().st_size)
    damage(place, how)
    checkpoints = run_folder.Checkpoints(tmp_path, {})
    batches = shuffled_batches()
    step, restored, seconds = checkpoints.restore(state, batches)
    assert (step, seconds, list(checkpoints.manager.all_steps())) == (1, 1.0, [1])
    np.testing.assert_array_equal(restored["basis"], state["basis"])
    expected = shuffled_batches()
    next(expected)
    np.testing.assert_array_equal(next(batches), next(expected))
    assert capsys.readouterr().err.startswith("warning: checkpoint 2 cannot be read")
    (tmp_path / "checkpoints/1/progress/metadata").unlink()
    with pytest.raises(OSError, match="no checkpoint in .* can be read"):
        checkpoints.restore(state, batches)
    assert list(checkpoints.manager.all_steps()) == [1]
    checkpoints.close()


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = metrics.Metrics(tmp_path, 2, run_folder.Options(), {})
    assert log.rows == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.slow
def test_two_runs_with_one_seed_give_the_same_bytes(tmp_path):
    """In two processes, compiled as outside of tests, of the default model."""
    program = Path(__file__).parents[1] / "examples/pretrain.py"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    for out in ("one", "two"):
        command = [sys.executable, str(program), "--steps", "12", "--eval-windows", "16"]
        subprocess.run([*command, "--out", out], check=True, cwd=tmp_path, env=environment)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    one, two = (checkpoint(tmp_path / out, 12) for out in ("one", "two"))
    assert [x.tobytes() for x in one] == [x.tobytes() for x in two]


def test_a_new_run_takes_a_new_folder_and_resume_the_last(run, tmp_path):
    for _ in range(2):
        assert run("--optimizer adamw --steps 2") == 0
    assert losses(tmp_path / "runs/tiny-adamw") == losses(tmp_path / "runs/tiny-adamw-2")
    assert run("--optimizer adamw --steps 2 --resume") == 0
    assert not (tmp_path / "runs/tiny-adamw-3").exists()


@pytest.mark.parametrize("name", ["galore", "muon", "adamw", "sumo"])
def test_every_optimizer_takes_projections_alone_as_matrices(name):
    tx = optimizers.create(name, 10, optimizers.complete(optimizers.Options(name), {"rank": 8}))
    params = nnx.to_pure_dict(nnx.state(llama.Llama(SHAPE, nnx.Rngs(0)), nnx.Param))
    state = tx.init(params)
    embeddings = [x for x in jax.tree.leaves(state) if x.shape == (SHAPE.vocab, SHAPE.width)]
    assert len(embeddings) == 2  # both of Adam's moments


# Refusals


def refused(capsys, code: int, *words: str) -> None:
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--optimizer galore --rank 0", ["--rank", "0", "at least 1"]),
        ("--rank 1.5", ["rank must be", "(0, 1]", "1.5"]),
        ("--optimizer galore --rank 0.5", ["galore", "integer", "--rank", "0.5"]),
        ("--optimizer sumo --rank 0", ["--rank", "0", "at least 1"]),
        ("--optimizer sumo --refresh-every 0", ["--refresh-every", "0", "at least 1"]),
        ("--optimizer adamw --rank 8", ["adamw has no 'rank', but learning_rate, b1"]),
        ("--set moment=0.9", ["sumo has no 'moment', but learning_rate, ", "momentum"]),
        ("--set momentum=0.9 --set sides=long", ["no 'sides'"]),
        ("--tensorboard", ["tensorboardX"]),
        ("--wandb project", ["wandb"]),
        ("--set momentum", ["NAME=VALUE", "'momentum'"]),
        ("--set momentum=high", ["momentum", "'high'"]),
        ("--steps 0", ["--steps", "0", "at least 1"]),
        ("--batch -1", ["--batch", "-1", "at least 1"]),
        ("--learning-rate -1", ["--learning-rate", "-1"]),
        ("--tokenizer words", ["bytes", "bpe:SIZE", "'words'"]),
        ("--heads 3", ["width 32", "heads 3"]),
        ("--length 1000000", ["too few", "--length"]),
        ("--resume", ["no run to resume"]),
        ("--optimizer galore --scan-layers", ["galore", "--scan-layers"]),
        ("--optimizer muon --log-subspace", ["muon", "no subspace", "--log-subspace"]),
        ("--optimizer adamw --subspace-gradients", ["adamw", "sumo and mofasgd have"]),
        ("--log-subspace --subspace-gradients", ["neither", "--log-subspace"]),
        ("--fused --subspace-gradients", ["neither --fused"]),
        ("--fused --optimizer galore", ["galore", "leave out --fused"]),
    ],
)
def test_wrong_arguments_are_one_clear_line(run, capsys, tmp_path, monkeypatch, arguments, words):
    for library in ("tensorboardX", "wandb"):  # as if they were not there
        monkeypatch.setitem(sys.modules, library, None)
    refused(capsys, run(arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--optimizer adam", ["adam", "adamw"]),
        ("--preset 3b", ["3b", "tiny", "7b"]),
        ("--learning-rate x", ["--learning-rate", "'x'"]),
        ("--optimiser adamw", ["--optimiser", "Perhaps you meant", "--optimizer"]),
    ],
)
def test_mistyped_options_are_named(run, capsys, tmp_path, arguments, words):
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    ["--set momentum=0.9 side=long", "--set momentum=0.9 --set side=long"],
)
def test_settings_add_up(arguments):
    config = pretrain.parse(arguments.split())
    found = optimizers.complete(config, {"rank": 8})
    assert found["momentum"] == 0.9 and found["side"] == "long" and found["rank"] == 8


@pytest.mark.parametrize("preset", ["tiny", "60m"])
def test_help_has_the_presets_defaults(capsys, preset):
    with pytest.raises(SystemExit, match="0"):
        pretrain.parse(["--preset", preset, "--help"])
    printed = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    groups = re.findall(r"(\w+) options", printed)
    assert groups == ["model", "optimizer", "data", "devices", "output"]
    for name in ("width", "hidden", "heads", "layers", "length", "batch", "steps"):
        value = getattr(llama.PRESETS[preset], name)
        assert re.search(rf"--{name} INT [^(]*\(default: {value}\)", printed), name


def test_out_must_be_a_folder(run, capsys, tmp_path):
    (tmp_path / "file").touch()
    refused(capsys, run("--optimizer adamw --out file"), "file", "folder")


def test_unreadable_data_is_one_clear_line(run, capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere.txt", "empty.txt", "folder", "binary"):
        refused(capsys, run(data=name), f"--data {name} is no text file in UTF-8")
    (tmp_path / "short.txt").write_text("short")
    refused(capsys, run(data="short.txt"), "too few", "33")


def test_a_stream_that_cannot_be_read_is_one_clear_line(run, capsys, tmp_path):
    refused(capsys, run(data="hf:./nowhere"), "nowhere")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text('{"words": "a"}\n')
    refused(capsys, run(data="hf:./rows"), "hf:./rows", "more rows")
    (tmp_path / "rows/validation.jsonl").write_text('{"words": "a"}\n')
    refused(capsys, run(data="hf:./rows"), "text", "words")


def test_nothing_is_overwritten_unless_asked(run, capsys, tmp_path):
    first = "--optimizer adamw --steps 2 --out out"
    assert run(first) == 0
    (tmp_path / "out/notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    capsys.readouterr()
    refused(capsys, run(first), "out holds a run", "--overwrite")
    for other, word in [
        ("--optimizer muon", "optimizer was adamw, now muon"),
        ("--layers 2", "layers was 1, now 2"),
        ("--seed 1", "seed was 0, now 1"),
    ]:
        refused(capsys, run(f"{first} --resume {other}"), word)
    after = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert before == after
    assert run(f"{first} --overwrite --seed 1") == 0
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_another_rank_is_refused(run, capsys):
    arguments = "--optimizer galore --steps 2 --out out"
    assert run(f"{arguments} --rank 4") == 0
    capsys.readouterr()
    refused(capsys, run(f"{arguments} --rank 8 --resume"), "rank was 4, now 8")


@pytest.mark.parametrize(
    "tx, words",
    [
        (sumo_optax.scale_by_sumo(3), r"basis/kernel was float32\[6, 2\], now float32\[6, 3\]; mo"),
        (sumo_optax.scale_by_mofasgd(2), "captured/kernel was float32.*, now absent"),
    ],
)
def test_arrays_of_another_rank_or_optimizer_are_refused(tmp_path, tx, words):
    """As by another version of the library; nothing is deleted."""
    params, batches = {"kernel": jnp.ones((8, 6))}, shuffled_batches()
    checkpoints = run_folder.Checkpoints(tmp_path, {})
    state = sumo_optax.scale_by_sumo(2).init(params)
    checkpoints.save(1, state, batches, 0.0)
    checkpoints.close()
    checkpoints = run_folder.Checkpoints(tmp_path, {})
    with pytest.raises(OSError, match=words):
        checkpoints.restore(jax.eval_shape(tx.init, params), batches)
    assert checkpoints.restore(state, batches)
    checkpoints.close()


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_losses_of_one_and_resumes_on_another(run, tmp_path):
    """Saved on eight devices, restored straight onto four and two of them along other axes."""
    arguments = "--batch 4 --steps 12 --save-every 6"
    assert run(f"{arguments} --out one") == 0
    assert run(f"{arguments} --mesh data=2,fsdp=2,tensor=2 --out eight") == 0
    expected = np.array(losses(tmp_path / "one"))
    np.testing.assert_allclose(losses(tmp_path / "eight"), expected, rtol=1e-4)  # float32 sums
    shutil.rmtree(tmp_path / "eight/checkpoints/12")
    assert run(f"{arguments} --mesh data=1,fsdp=4,tensor=2 --out eight --resume") == 0
    np.testing.assert_allclose(losses(tmp_path / "eight"), expected, rtol=1e-4)
    shutil.rmtree(tmp_path / "eight/checkpoints/12")
    assert run(f"{arguments} --out eight --resume") == 0
    np.testing.assert_allclose(losses(tmp_path / "eight"), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--mesh fsdp=3", "--mesh fsdp=3 is for 3 devices, there are 8"),
        ("--mesh model=8", "--mesh takes data=N,fsdp=N,tensor=N, N at least 1"),
        ("--mesh fsdp=8 --batch 6", "--batch must be a multiple of data x fsdp, 8, got 6"),
        ("--process 0", "--coordinator, --processes and --process go together"),
    ],
)
def test_wrong_mesh(run, capsys, arguments, words):
    assert run(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert words in message and len(message.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(run, corpus, tmp_path):
    assert run("--batch 4 --steps 6 --out one") == 0
    program = Path(__file__).parents[1] / "examples/pretrain.py"
    arguments = f"{MICRO} --data {corpus} --batch 4 --steps 6 --mesh data=2,fsdp=2,tensor=2"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = f"--processes 2 --coordinator localhost:{free.getsockname()[1]} --out two"
    command = [sys.executable, str(program), *arguments.split(), *together.split(), "--process"]
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    start = lambda i: subprocess.Popen([*command, i], cwd=tmp_path, env=os.environ | four)
    assert [process.wait(300) for process in [start("0"), start("1")]] == [0, 0]
    expected = np.array(losses(tmp_path / "one"))
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-4)  # float32 sums


def test_what_says_that_there_are_several_processes():
    assert not mesh.is_one_of_several({})
    assert not mesh.is_one_of_several({"SLURM_STEP_NUM_TASKS": "1"})
    assert mesh.is_one_of_several({"SLURM_STEP_NUM_TASKS": "4"})
    assert mesh.is_one_of_several({"OMPI_COMM_WORLD_SIZE": "2"})
    assert mesh.is_one_of_several({"TPU_WORKER_HOSTNAMES": "host-0,host-1"})
