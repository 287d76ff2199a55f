"""The tasks of GLUE: their rows from TSV files or the Hugging Face hub, and their metrics."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import grain
import grain.experimental
import numpy as np
import tokenizers
from common import hub, text
from scipy import stats
from sklearn import metrics

HUB = "nyu-mll/glue"
TRUTH = ("entailment", "not_entailment")
NUMBERS = ("0", "1")


@dataclasses.dataclass(frozen=True)
class Task:
    """Where the columns of a task are, and what is reported of it."""

    texts: tuple[str, ...]  # columns of the TSV files
    hub_texts: tuple[str, ...]  # columns on the hub
    label: str  # column of the TSV files
    labels: tuple[str, ...] = NUMBERS  # by their number on the hub; none for a score
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the task's own
    header: tuple[str, ...] | None = None  # of TSV files that have none
    validation: tuple[str, str] = ("dev.tsv", "validation")  # TSV file, split on the hub


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(
        ("sentence",),
        ("sentence",),
        "label",
        metrics=("matthews",),
        header=("source", "label", "mark", "sentence"),
    ),
    "mnli": Task(
        PAIR,
        ("premise", "hypothesis"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        validation=("dev_matched.tsv", "validation_matched"),
    ),
    "mrpc": Task(("#1 String", "#2 String"), PAIR, "Quality", metrics=("f1", "accuracy")),
    "qnli": Task(("question", "sentence"), ("question", "sentence"), "label", TRUTH),
    "qqp": Task(
        ("question1", "question2"),
        ("question1", "question2"),
        "is_duplicate",
        metrics=("f1", "accuracy"),
    ),
    "rte": Task(PAIR, PAIR, "label", TRUTH),
    "sst2": Task(("sentence",), ("sentence",), "label"),
    "stsb": Task(PAIR, PAIR, "score", labels=(), metrics=("spearman",)),
    "wnli": Task(PAIR, PAIR, "label"),
}

METRICS = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "spearman": lambda true, scores: stats.spearmanr(true, scores).statistic,
}


class Rows(NamedTuple):
    """The examples of a split: one or two texts each, and their labels or scores."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray


def find(name: str) -> Task:
    """The task of this name."""
    if name not in TASKS:
        raise ValueError(f"unknown --task {name!r}; choose among {', '.join(TASKS)}")
    return TASKS[name]


def load(name: str, data: Path | None) -> tuple[Rows, Rows]:
    """Training and validation, from a folder of TSV files or, if there is none given, the hub."""
    task = find(name)
    if data is None:
        return from_hub(HUB, name, "train"), from_hub(HUB, name, task.validation[1])
    return read_tsv(task, data / "train.tsv"), read_tsv(task, data / task.validation[0])


def read_tsv(task: Task, path: Path) -> Rows:
    """The rows of a TSV file as GLUE has them: no quoting, a byte order mark or none."""
    try:
        lines = path.read_text("utf-8-sig").rstrip("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    header = list(task.header or lines[0].split("\t"))
    absent = [column for column in (*task.texts, task.label) if column not in header]
    if absent:
        raise ValueError(f"{path} has no column {absent[0]!r}, but {', '.join(header)}")
    columns = [header.index(column) for column in task.texts]
    start = 0 if task.header else 1
    texts, labels = [], []
    for number, line in enumerate(lines[start:], start + 1):
        fields = line.split("\t")
        if len(fields) < len(header):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} columns, of {len(header)}:"
                f" {', '.join(header)}"
            )
        texts.append(tuple(fields[i] for i in columns))
        labels.append(number_of(task, fields[header.index(task.label)], f"{path}, line {number}"))
    if not texts:
        raise ValueError(f"{path} has no rows")
    return Rows(texts, np.array(labels, np.int32 if task.labels else np.float32))


def number_of(task: Task, label: str, place: str) -> float:
    """A label's number, or the score that stands there."""
    try:
        return task.labels.index(label) if task.labels else float(label)
    except ValueError:
        allowed = f"one of {', '.join(task.labels)}" if task.labels else "a number"
        raise ValueError(f"{place}: the label is {label!r}, and must be {allowed}") from None


def from_hub(name: str, config: str, split: str) -> Rows:
    """The rows of a split on the hub, or of a folder that `load_dataset` can read."""
    task = find(config)
    with hub.errors(f"{config} of hf:{name}"):
        import datasets

        rows = datasets.load_dataset(name, config, split=split)
        texts = list(zip(*(rows[column] for column in task.hub_texts), strict=True))
        return Rows(texts, np.array(rows["label"], np.int32 if task.labels else np.float32))


class Examples:
    """Rows as arrays, each of the same length: tokens, their types, which are no padding, label."""

    def __init__(self, rows: Rows, tokenizer: tokenizers.Tokenizer, length: int):
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        # A pair, or the text alone.
        texts = [row if len(row) > 1 else row[0] for row in rows.texts]
        encodings = tokenizer.encode_batch_fast(texts)
        self.arrays = {
            "tokens": np.array([e.ids for e in encodings], np.int32),
            "types": np.array([e.type_ids for e in encodings], np.int32),
            "mask": np.array([e.attention_mask for e in encodings], np.int32),
            "labels": rows.labels,
        }

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


class ByLength(grain.experimental.FlatMapTransform):
    """A pool of rows as batches of like length, without most of the padding."""

    def __init__(self, batch: int, count: int):
        self.batch = batch
        self.max_fan_out = count  # batches in a pool

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        lengths = element["mask"].sum(1)
        order = np.argsort(lengths, kind="stable").reshape(-1, self.batch)
        return [cut(element, rows, lengths[rows].max()) for rows in order]


def cut(pool: dict[str, np.ndarray], rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Some rows, up to the next multiple of 32 tokens: a program for each such is compiled."""
    tokens = -(-length // 32) * 32
    return {k: x[rows, :tokens] if x.ndim == 2 else x[rows] for k, x in pool.items()}


def batches(examples: Examples, *, batch: int, seed: int) -> grain.DatasetIterator:
    """Batches without end, in another order each time round, of rows of like length."""
    # Pools of a quarter of all rows at most, so that other rows meet each time round.
    count = max(1, min(8, len(examples) // (4 * batch)))
    pools = text.shuffled(examples, seed).batch(count * batch)
    return iter(grain.experimental.FlatMapIterDataset(pools, ByLength(batch, count)))


def score(task: Task, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """All metrics of a task."""
    guesses = logits.argmax(-1) if task.labels else logits[:, 0]
    return {name: float(METRICS[name](labels, guesses)) for name in task.metrics}
