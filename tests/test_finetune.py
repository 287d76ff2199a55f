"""The fine-tuning program: its model against NumPy, its data, its runs and its refusals."""

import json
import shutil
from pathlib import Path

import finetune
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from common import bert, glue
from flax import nnx
from scipy.special import erf

CONFIG = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "rain", "sun", "falls", "shines", "it", "is", "wet"]
# Rain is wet, sun is not: what a model can learn.
PAIRS = [("rain falls", "it is wet", "entailment"), ("sun shines", "it is wet", "not_entailment")]
SMALL = "--epochs 2 --batch 8 --length 12"


def write_model(folder: Path) -> dict[str, np.ndarray]:
    """A random BERT in the form of Hugging Face; its weights in float64."""
    rng = np.random.default_rng(0)
    D, F = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings": (CONFIG["vocab_size"], D),
        "embeddings.position_embeddings": (CONFIG["max_position_embeddings"], D),
        "embeddings.token_type_embeddings": (2, D),
        "embeddings.LayerNorm": (D,),
        "pooler.dense": (D, D),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        names = ("attention.self.query", "attention.self.key", "attention.self.value")
        shapes |= {layer + name: (D, D) for name in (*names, "attention.output.dense")}
        shapes |= {layer + "intermediate.dense": (F, D), layer + "output.dense": (D, F)}
        shapes |= {layer + f"{name}.LayerNorm": (D,) for name in ("attention.output", "output")}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = rng.normal(size=shape) * 0.5 + (len(shape) == 1)
        if "_embeddings" not in name:
            weights[f"{name}.bias"] = rng.normal(size=shape[:1]) * 0.5
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value.astype(np.float32) for name, value in weights.items()}
    stored["embeddings.position_ids"] = np.arange(20)[None]
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder / "tokenizer.json")
    return weights


def write_tokenizer(path: Path) -> None:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path))


def write_rte(folder: Path, rows: int) -> None:
    lines = ["index\tsentence1\tsentence2\tlabel"]
    lines += ["\t".join([str(i), *PAIRS[i % 2]]) for i in range(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    # A byte order mark, as some of GLUE's files have.
    (folder / "train.tsv").write_text("\n".join(lines) + "\n", "utf-8-sig")
    (folder / "dev.tsv").write_text("\n".join(lines[:9]) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "bert")
    write_rte(folder / "RTE", rows=16)
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Runs the program on the small model and data, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(arguments: str, model=files / "bert", data=files / "RTE") -> int:
        try:
            return finetune.main(f"--model {model} --data {data} {SMALL} {arguments}".split())
        except SystemExit as exit:  # of tyro
            return exit.code

    return run


# The model


def forward(weights: dict, tokens: np.ndarray, types: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pooled output of one row, from the formulas."""

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    table = lambda name: weights[f"embeddings.{name}_embeddings.weight"]
    x = table("word")[tokens] + table("position")[: len(tokens)] + table("token_type")[types]
    x = norm(x, "embeddings.LayerNorm")
    heads = CONFIG["num_attention_heads"]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        q, k, v = (
            dense(x, f"{layer}attention.self.{name}").reshape(len(x), heads, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True)) * mask
        y = scores / scores.sum(-1, keepdims=True) @ v
        y = dense(y.swapaxes(0, 1).reshape(len(x), -1), f"{layer}attention.output.dense")
        x = norm(x + y, f"{layer}attention.output.LayerNorm")
        h = dense(x, f"{layer}intermediate.dense")
        h = dense(h * (1 + erf(h / np.sqrt(2))) / 2, f"{layer}output.dense")
        x = norm(x + h, f"{layer}output.LayerNorm")
    return np.tanh(dense(x[0], "pooler.dense"))


@pytest.mark.parametrize("prefix, gamma", [("", "weight"), ("bert.", "gamma")])
def test_outputs_are_those_of_the_formulas(tmp_path, prefix, gamma):
    """Also with the names that older files have; padding and what stands there change nothing."""
    weights = write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    beta = gamma.replace("weight", "bias").replace("gamma", "beta")
    renamed = {
        prefix + k.replace("Norm.weight", f"Norm.{gamma}").replace("Norm.bias", f"Norm.{beta}"): v
        for k, v in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(renamed, path)
    model = bert.Bert(bert.read_config(tmp_path), 3, nnx.Rngs(0))
    params = bert.read_weights(tmp_path, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    rng = np.random.default_rng(1)
    tokens, types = rng.integers(0, 40, (4, 12)), rng.integers(0, 2, (4, 12))
    mask = (np.arange(12) < np.array([12, 9, 5, 1])[:, None]).astype(int)
    logits = nnx.merge(nnx.graphdef(model), params)(*map(jnp.asarray, (tokens, types, mask)))
    pooled = np.stack([forward(weights, *row) for row in zip(tokens, types, mask, strict=True)])
    head = {name: np.asarray(value) for name, value in params["classifier"].items()}
    # Float32 rounding through two layers.
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"], atol=2e-6)


def test_dropout_depends_on_its_key_alone(files):
    model = bert.Bert(bert.read_config(files / "bert"), 2, nnx.Rngs(0))
    tokens = jnp.ones((2, 6), int)
    given = (tokens, 0 * tokens, tokens)
    one, same, other = (model(*given, nnx.Rngs(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-4 < np.abs(one - model(*given)).max()


def test_lora_starts_as_the_model_and_trains_addends_and_heads_alone(files):
    shape = bert.read_config(files / "bert")
    batch = {name: jnp.ones((2, 6), int) for name in ("tokens", "types", "mask")}
    weights, expected = finetune.model(files / "bert", shape, 2, seed=0, rank=None)
    params, logits = finetune.model(files / "bert", shape, 2, seed=0, rank=3)
    np.testing.assert_array_equal(logits(params, batch), expected(weights, batch))
    matrices = 2 * (4 * (16 + 16) + 2 * (16 + 24)) * 3
    assert sum(x.size for x in jax.tree.leaves(params)) == matrices + 17 * 16 + 17 * 2
    A = np.asarray(params["layers"][0]["down_proj"]["lora_a"])
    assert A.shape == (24, 3) and 0.5 < 24 * A.var() < 1.5
    gradients = jax.grad(lambda x: logits(x, batch)[0, 0])(params)
    moved = jax.tree.map(lambda x, g: x - g, params, gradients)
    assert np.abs(logits(moved, batch) - logits(params, batch)).max() > 1e-3


# The data


def test_every_task_reads_its_files_and_the_hub(tmp_path, monkeypatch):
    """As GLUE names their columns; both ways give the same."""
    hub_rows = {}
    for name, task in glue.TASKS.items():
        columns = task.texts or task.hub_texts
        header = task.header or ("index", *columns, task.label)
        words = ("entailment", "neutral" if name == "mnli" else "not_entailment")
        labels = words if name in ("mnli", "qnli", "rte") else "01"
        labels = labels if task.classes else ("1.5", "4.25")
        rows = [
            [
                f'{x} "{i}' if x in columns else labels[i % 2] if x == task.label else "-"
                for x in header
            ]
            for i in range(4)
        ]
        lines = ["\t".join(x) for x in ([] if task.header else [header]) + rows]
        (tmp_path / name).mkdir()
        for file in ("train.tsv", f"dev{'_matched' * (name == 'mnli')}.tsv"):
            (tmp_path / name / file).write_text("\n".join(lines) + "\n")
        hub_rows[name] = [
            {f: f'{x} "{i}' for f, x in zip(task.hub_texts, columns, strict=True)}
            | {"label": i % 2 if task.classes else float(labels[i % 2])}
            for i in range(4)
        ]
    write_hub(tmp_path / "hub", hub_rows)
    monkeypatch.setattr(glue, "HUB", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, task in glue.TASKS.items():
        for texts, found in (*glue.load(name, tmp_path / name), *glue.load(name, None)):
            assert texts[3] == tuple(f'{x} "3' for x in task.texts or task.hub_texts)
            np.testing.assert_array_equal(found, [0, 1, 0, 1] if task.classes else [1.5, 4.25] * 2)


def write_hub(folder: Path, tasks: dict[str, list[dict]]) -> None:
    """A data set with a configuration a task, as `load_dataset` reads it from a folder."""
    lines = ["---", "configs:"]
    for name, rows in tasks.items():
        (folder / name).mkdir(parents=True)
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation" + "_matched" * (name == "mnli")):
            lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_batches_are_of_like_length_and_cut_to_it():
    """Each time round has every row once, whole; others meet the next time; little is padding."""
    batch, count = 4, 128
    lengths = np.random.default_rng(0).integers(1, 100, count)
    mask = (np.arange(128) < lengths[:, None]).astype(np.int32)
    numbers = np.arange(count)
    examples = {"tokens": mask * numbers[:, None], "mask": mask, "labels": numbers}
    batches = glue.batches(examples, batch=batch, seed=0)
    first, second = ([next(batches) for _ in range(count // batch)] for _ in range(2))
    rows = lambda seen: [tuple(x["labels"]) for x in seen]
    assert sorted(sum(rows(first), ())) == sorted(sum(rows(second), ())) == list(range(count))
    assert not set(rows(first)) & set(rows(second))
    for x in first:
        np.testing.assert_array_equal(x["mask"].sum(1), lengths[x["labels"]])
        np.testing.assert_array_equal(x["tokens"], x["mask"] * x["labels"][:, None])
        assert x["mask"].shape[1] == 32 * -(-lengths[x["labels"]].max() // 32)
    # Batches of rows as they come would have 0.5.
    assert sum(x["mask"].sum() for x in first) > 0.65 * sum(x["mask"].size for x in first)


def test_metrics_are_those_of_the_definitions():
    labels, logits = np.array([1, 1, 1, 0, 0, 0]), np.eye(2)[[1, 1, 0, 1, 0, 0]]
    assert glue.score(glue.TASKS["rte"], labels, logits) == {"accuracy": 4 / 6}
    assert glue.score(glue.TASKS["mrpc"], labels, logits)["f1"] == pytest.approx(2 * 2 / (3 + 3))
    # (tp tn - fp fn) / the root of the product of the four sums.
    assert glue.score(glue.TASKS["cola"], labels, logits) == {"matthews": pytest.approx(3 / 9)}
    scores = np.array([[0.1], [5.0], [2.0]])
    found = glue.score(glue.TASKS["stsb"], np.array([1.0, 2.0, 3.0]), scores)
    assert found == {"spearman": pytest.approx(0.5)}


# Runs


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(finetune.LEARNING_RATES))
def test_every_optimizer_learns_the_task(run, capsys, tmp_path, name):
    arguments = "" if name in ("adamw", "muon") else " --rank 4"
    if name not in ("adamw", "lora"):
        arguments += " --adam-learning-rate 1e-2"
    code = run(f"--optimizer {name} --learning-rate 1e-2 --epochs 20 --out out{arguments}")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert sum("accuracy" in row for row in metrics(tmp_path / "out")) == 20
    assert summary["accuracy"] == 1
    assert "step     40  validation loss" in printed.out and "accuracy 1.0000" in printed.out
    assert (tmp_path / "out/loss.png").stat().st_size > 10_000
    if name == "lora":
        # Two moments and a counter of each number that it trains.
        trained = 2 * (4 * (16 + 16) + 2 * (16 + 24)) * 4 + 17 * 16 + 17 * 2
        assert summary["state_bytes"] == 4 * (2 * trained + 2)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(run, tmp_path, capsys):
    assert run("--out one") == 0
    assert run("--out two") == 0
    same = lambda: [a["loss"] == b["loss"] for a, b in zip(*map(metrics, outs), strict=True)]
    outs = tmp_path / "one", tmp_path / "two"
    assert len(same()) == 4 and all(same())
    shutil.rmtree(tmp_path / "two/checkpoints/4")
    assert run("--out two --resume") == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert all(same())


@pytest.mark.slow
def test_a_score_is_learned_by_its_squares(run, tmp_path):
    lines = ["index\tsentence1\tsentence2\tscore"]
    lines += [f"{i}\t{PAIRS[i % 2][0]}\t{PAIRS[i % 2][1]}\t{5 * (i % 2)}.0" for i in range(16)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(lines))
    arguments = "--optimizer adamw --learning-rate 3e-2 --epochs 40 --out out"
    code = run(f"--task stsb {arguments}", data=tmp_path)
    last = json.loads((tmp_path / "out/summary.json").read_text())
    assert code == 0 and last["spearman"] > 0.99 and last["validation_loss"] < 1


# Refusals


def refused(capsys, code: int, *words: str) -> None:
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--task mrpc", ["train.tsv", "'#1 String'", "sentence1"]),
        ("--optimizer adamw --rank 4", ["adamw has no 'rank'"]),
        ("--rank 0", ["--rank", "at least 1"]),
        ("--optimizer lora --rank 0.5", ["lora", "integer", "--rank", "0.5"]),
        ("--length 21", ["--length 21", "20 positions"]),
        ("--batch 17", ["--batch 17", "16 training rows"]),
        ("--resume", ["no run to resume"]),
    ],
)
def test_wrong_arguments_are_one_clear_line(run, capsys, tmp_path, arguments, words):
    refused(capsys, run(arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--task squad", ["squad", "rte", "mrpc"]),
        ("--optimizer adam", ["adam", "lora"]),
        ("--epochs x", ["--epochs", "'x'"]),
    ],
)
def test_mistyped_options_are_named(run, capsys, tmp_path, arguments, words):
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert not list(tmp_path.iterdir())


def test_wrong_rows_are_one_clear_line(run, capsys, tmp_path):
    refused(capsys, run("", data="nowhere"), "nowhere/train.tsv", "No such file")
    write_rte(tmp_path, 16)
    train = tmp_path / "train.tsv"
    good = train.read_text("utf-8-sig")
    for bad, words in [
        (good.replace("\tentailment", "", 1), ["line 2", "too few columns", "sentence2"]),
        (good.replace("\tentailment", "\tmaybe", 1), ["line 2", "'maybe'", "not_entailment"]),
        (good.replace("\tentailment", "\tcontradiction", 1), ["line 2", "'contradiction'"]),
        (good.splitlines()[0], ["no rows"]),
    ]:
        train.write_text(bad)
        refused(capsys, run("", data=tmp_path), str(train), *words)
    train.write_bytes(b"\xff\xfe\x00")
    refused(capsys, run("", data=tmp_path), str(train), "utf-8")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "roberta"}, ["config.json", "model_type 'roberta'", "'bert'"]),
        ({"hidden_act": "relu"}, ["hidden_act 'relu'", "'gelu'"]),
        ({"vocab_size": None}, ["config.json is not that of a BERT: KeyError('vocab_size')"]),
        ({"hidden_size": 32}, ["has embeddings.LayerNorm.bias of shape (16,), expected (32,)"]),
        ({"num_hidden_layers": 3}, ["has no encoder.layer.2.", "BERT"]),
    ],
)
def test_weights_of_another_architecture_are_one_clear_line(
    run, capsys, files, tmp_path, change, words
):
    model = tmp_path / "bert"
    shutil.copytree(files / "bert", model)
    config = {k: v for k, v in (CONFIG | change).items() if v is not None}
    (model / "config.json").write_text(json.dumps(config))
    refused(capsys, run("", model=model), *words)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_broken_file_is_one_clear_line(run, capsys, files, tmp_path, name):
    model = tmp_path / "bert"
    shutil.copytree(files / "bert", model)
    (model / name).write_bytes(b"{")
    refused(capsys, run("", model=model), name)
    (model / name).unlink()
    refused(capsys, run("", model=model), name)


def test_a_model_that_is_nowhere_is_one_clear_line(run, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(capsys, run("", model="nobody/nothing"), "--model nobody/nothing", "no folder")
