"""The tasks of GLUE: their rows from TSV files or the Hugging Face hub, and their metrics."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import grain
import numpy as np
import tokenizers
from common import text
from grain import experimental
from scipy import stats
from sklearn import metrics

HUB = "nyu-mll/glue"
PAIR = ("sentence1", "sentence2")
F1 = ("f1", "accuracy")
# As TSV files have them; the hub has the numbers.
LABELS = {"0": 0, "1": 1, "entailment": 0, "not_entailment": 1, "neutral": 1, "contradiction": 2}


class Task(NamedTuple):
    """Where the columns of a task are, and what is reported of it."""

    hub_texts: tuple[str, ...]  # columns on the hub
    label: str = "label"  # column of the TSV files
    classes: int = 2  # none where there is a score
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the task's own
    texts: tuple[str, ...] = ()  # columns of the TSV files where they are others
    header: tuple[str, ...] | None = None  # of TSV files that have none


Name = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
COLA = ("source", "label", "mark", "sentence")
TASKS = {
    "cola": Task(("sentence",), metrics=("matthews",), header=COLA),
    "mnli": Task(("premise", "hypothesis"), "gold_label", classes=3, texts=PAIR),
    "mrpc": Task(PAIR, "Quality", metrics=F1, texts=("#1 String", "#2 String")),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), "is_duplicate", metrics=F1),
    "rte": Task(PAIR),
    "sst2": Task(("sentence",)),
    "stsb": Task(PAIR, "score", classes=0, metrics=("spearman",)),
    "wnli": Task(PAIR),
}
METRICS = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "spearman": lambda true, scores: stats.spearmanr(true, scores).statistic,
}
Examples = dict[str, np.ndarray]
Rows = tuple[list[tuple[str, ...]], np.ndarray]  # one or two texts each; labels or scores


def load(name: str, data: str | Path | None) -> Iterator[Rows]:
    """Rows to train on and to validate with, of a folder of TSV files or else of the hub."""
    task, matched = TASKS[name], "_matched" if name == "mnli" else ""
    if data is not None:
        yield read_tsv(task, Path(data, "train.tsv"))
        yield read_tsv(task, Path(data, f"dev{matched}.tsv"))
        return
    import datasets  # takes seconds

    for split in ("train", f"validation{matched}"):
        rows = datasets.load_dataset(HUB, name, split=split)
        texts = list(zip(*(rows[column] for column in task.hub_texts), strict=True))
        yield texts, np.array(rows["label"], np.int32 if task.classes else np.float32)


def read_tsv(task: Task, path: Path) -> Rows:
    """The rows of a TSV file as GLUE has them: no quoting, a byte order mark or none."""
    known, texts, labels = {x: i for x, i in LABELS.items() if i < task.classes}, [], []
    number = known.__getitem__ if task.classes else float
    with path.open(encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, task.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in rows:
                if None in row.values():
                    raise ValueError("there are too few columns")
                texts.append(tuple(row[column] for column in task.texts or task.hub_texts))
                labels.append(number(row[task.label]))
        except (KeyError, ValueError, csv.Error) as error:
            there = f"columns are {rows.fieldnames}, labels {', '.join(known)}"
            raise ValueError(f"{path}, line {rows.line_num}: {error}; {there}") from None
    if not texts:
        raise ValueError(f"{path} has no rows")
    return texts, np.array(labels, np.int32 if task.classes else np.float32)


def tokenized(rows: Rows, tokenizer: tokenizers.Tokenizer, length: int) -> Examples:
    """Rows as arrays of the same length: tokens, their types, which are no padding, labels."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    texts, labels = rows
    # A pair, or the text alone.
    encodings = tokenizer.encode_batch_fast([x if len(x) > 1 else x[0] for x in texts])
    names = {"tokens": "ids", "types": "type_ids", "mask": "attention_mask"}
    array = lambda name: np.array([getattr(x, name) for x in encodings], np.int32)
    return {name: array(theirs) for name, theirs in names.items()} | {"labels": labels}


class ByLength(experimental.FlatMapTransform):
    """A pool of rows as batches of like length, without most of the padding."""

    def __init__(self, examples: Examples, batch: int, count: int):
        self.examples, self.batch, self.max_fan_out = examples, batch, count  # batches in a pool

    def flat_map(self, element: np.ndarray) -> list[Examples]:
        batches, lengths = [], self.examples["mask"][element].sum(1)
        for some in np.argsort(lengths, kind="stable").reshape(-1, self.batch):
            # Up to the next multiple of 32 tokens: a program for each such is compiled.
            rows, end = element[some], -(-lengths[some].max() // 32) * 32
            cut = lambda x, rows=rows, end=end: x[rows, :end] if x.ndim == 2 else x[rows]
            batches.append({name: cut(x) for name, x in self.examples.items()})
        return batches


def batches(examples: Examples, *, batch: int, seed: int) -> grain.DatasetIterator:
    """Batches without end, in another order each time round, of rows of like length."""
    total = len(examples["labels"])
    # Pools of a quarter of all rows at most, so that other rows meet each time round.
    count = max(1, min(8, total // (4 * batch)))
    pools = text.shuffled(range(total), seed).batch(count * batch)
    return iter(experimental.FlatMapIterDataset(pools, ByLength(examples, batch, count)))


def score(task: Task, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """All metrics of a task."""
    guesses = logits.argmax(-1) if task.classes else logits[:, 0]
    return {name: float(METRICS[name](labels, guesses)) for name in task.metrics}
