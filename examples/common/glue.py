"""The tasks of GLUE: their rows from TSV files or the Hugging Face hub, and their metrics."""

import csv
import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import grain
import numpy as np
import tokenizers
from common import hub, text
from grain import experimental
from scipy import stats
from sklearn import metrics

HUB = "nyu-mll/glue"
NUMBERS = ("0", "1")
PAIR = ("sentence1", "sentence2")
TRUTH = ("entailment", "not_entailment")


@dataclasses.dataclass(frozen=True)
class Task:
    """Where the columns of a task are, and what is reported of it."""

    hub_texts: tuple[str, ...]  # columns on the hub
    label: str = "label"  # column of the TSV files
    labels: tuple[str, ...] = NUMBERS  # by their number on the hub; none for a score
    texts: tuple[str, ...] = ()  # columns of the TSV files where they are others
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the task's own
    header: tuple[str, ...] | None = None  # of TSV files that have none
    matched: bool = False  # whether its validation rows are those of the domains of training


F1 = ("f1", "accuracy")
COLA = ("source", "label", "mark", "sentence")
NLI = ("entailment", "neutral", "contradiction")
Name = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
TASKS = {
    "cola": Task(("sentence",), metrics=("matthews",), header=COLA),
    "mnli": Task(("premise", "hypothesis"), "gold_label", NLI, PAIR, matched=True),
    "mrpc": Task(PAIR, "Quality", texts=("#1 String", "#2 String"), metrics=F1),
    "qnli": Task(("question", "sentence"), labels=TRUTH),
    "qqp": Task(("question1", "question2"), "is_duplicate", metrics=F1),
    "rte": Task(PAIR, labels=TRUTH),
    "sst2": Task(("sentence",)),
    "stsb": Task(PAIR, "score", labels=(), metrics=("spearman",)),
    "wnli": Task(PAIR),
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


def load(name: str, data: Path | None) -> tuple[Rows, Rows]:
    """Training and validation, from a folder of TSV files or, if there is none given, the hub."""
    task, matched = TASKS[name], "_matched" if TASKS[name].matched else ""
    if data is not None:
        return read_tsv(task, data / "train.tsv"), read_tsv(task, data / f"dev{matched}.tsv")
    return from_hub(name, "train"), from_hub(name, f"validation{matched}")


def read_tsv(task: Task, path: Path) -> Rows:
    """The rows of a TSV file as GLUE has them: no quoting, a byte order mark or none."""
    columns, texts, labels = task.texts or task.hub_texts, [], []
    with path.open(encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, task.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in rows:
                if None in row.values():
                    raise ValueError(f"fewer columns than {', '.join(row)}")
                texts.append(tuple(row[column] for column in columns))
                label = row[task.label]
                if task.labels and label not in task.labels:
                    raise ValueError(f"label {label!r}, not one of {', '.join(task.labels)}")
                labels.append(task.labels.index(label) if task.labels else float(label))
        except KeyError as error:
            there = ", ".join(rows.fieldnames or ())
            raise ValueError(f"{path} has no column {error}, but {there}") from None
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if not texts:
        raise ValueError(f"{path} has no rows")
    return Rows(texts, np.array(labels, np.int32 if task.labels else np.float32))


def from_hub(name: str, split: str) -> Rows:
    """The rows of a split on the hub, or of a folder that `load_dataset` can read."""
    task = TASKS[name]
    with hub.errors(f"{name} of hf:{HUB}"):
        rows = datasets.load_dataset(HUB, name, split=split)
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


class ByLength(experimental.FlatMapTransform):
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
    return iter(experimental.FlatMapIterDataset(pools, ByLength(batch, count)))


def score(task: Task, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """All metrics of a task."""
    guesses = logits.argmax(-1) if task.labels else logits[:, 0]
    return {name: float(METRICS[name](labels, guesses)) for name in task.metrics}
