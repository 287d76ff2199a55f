"""A data set of the Hugging Face hub, streamed; the place in it can be saved."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import grain
import huggingface_hub
import numpy as np

CONFIGS = {"allenai/c4": "en"}  # of data sets that want one: that of the GaLore protocol
HELD_OUT = 1_000  # documents to validate with
SHUFFLED = 4_096  # windows that are shuffled among each other


@contextlib.contextmanager
def errors(what: str) -> Iterator[None]:
    """What goes wrong with it, in words; of the hub's retries, the last one's."""
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the hub, the network and the file readers raise anything
        raise ValueError(f"{what} cannot be read: {error}") from error


def open_stream(spec: str) -> tuple[Any, list[str]]:
    """Rows to train on and texts to validate with, of `NAME` or `NAME:CONFIG`.

    They are the first of the validation split, if there is one, else the first of all. The name is
    that of a data set of the hub, or of a folder that `load_dataset` can read.
    """
    name, _, config = spec.partition(":")
    config = config or CONFIGS.get(name)
    with errors(f"--data hf:{spec}"):
        load = lambda split: datasets.load_dataset(name, config, split=split, streaming=True)
        training = validation = load("train")
        if "validation" in datasets.get_dataset_split_names(name, config):
            validation = load("validation")
        else:
            training = training.skip(HELD_OUT)
        held_out, first = list(validation.take(HELD_OUT)), list(training.take(1))
        if not (held_out and first):
            raise ValueError("it has too few rows to train on some and to validate with others")
        if not all("text" in row for row in held_out + first):
            raise ValueError(f"it has no column `text`, but {', '.join(first[0])}")
        return training, [row["text"] for row in held_out]


Encode = Callable[[list[str]], np.ndarray]


def batches(rows: Any, encode: Encode, *, length: int, batch: int, seed: int):
    """Shuffled batches of windows, without end."""
    windows = Windows(rows.repeat(None), encode, length)
    shuffled = grain.experimental.WindowShuffleIterDataset(windows, window_size=SHUFFLED, seed=seed)
    return iter(shuffled.batch(batch))


@dataclasses.dataclass
class Windows(grain.IterDataset[np.ndarray]):
    """Rows of text as windows of tokens."""

    rows: Any  # datasets.IterableDataset
    encode: Encode
    length: int

    def __post_init__(self):
        super().__init__()

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return WindowIterator(self)


class WindowIterator(grain.DatasetIterator[np.ndarray]):
    """Its state is the place in the rows, as `datasets` has it, and the tokens left over."""

    def __init__(self, of: Windows):
        super().__init__()
        self.of, self.iterator, self.left = of, iter(of.rows), np.array([], np.int32)

    def __next__(self) -> np.ndarray:
        while len(self.left) <= self.of.length:
            new = self.of.encode([next(self.iterator)["text"]])
            self.left = np.concatenate([self.left, new])
        window, self.left = np.split(self.left, [self.of.length + 1])
        return window

    def get_state(self) -> dict[str, Any]:
        return {"rows": self.of.rows.state_dict(), "left": self.left.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.of.rows.load_state_dict(state["rows"])
        self.iterator, self.left = iter(self.of.rows), np.array(state["left"], np.int32)


def download(name: str) -> Path:
    """The folder of a model on the hub: its shape, weights and tokenizer."""
    with errors(f"--model {name}, which is no folder here,"):
        files = ["config.json", "model.safetensors", "tokenizer.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
