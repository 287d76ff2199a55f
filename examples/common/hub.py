"""A data set of the Hugging Face hub, streamed; the place in it can be saved."""

import contextlib
import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
from common.tokens import Tokenizer

# Data sets that want a configuration, and the one of the GaLore protocol.
CONFIGS = {"allenai/c4": "en"}
# Documents to validate with: of the validation split if there is one, else the first of all.
HELD_OUT = 1_000
# Windows that are shuffled among each other.
SHUFFLED = 4_096


@dataclasses.dataclass
class Stream:
    """Documents to train on, without end, and some to validate with."""

    training: Any  # datasets.IterableDataset
    validation: list[str]

    def sample(self, documents: int) -> Iterator[str]:
        """The texts of the first documents, for a tokenizer to learn from."""
        return (row["text"] for row in self.training.take(documents))

    def batches(
        self, tokenizer: Tokenizer, *, length: int, batch: int, seed: int
    ) -> grain.DatasetIterator[np.ndarray]:
        """Shuffled batches of windows."""
        windows = StreamedWindows(self.training.repeat(None), tokenizer, length)
        shuffled = grain.experimental.WindowShuffleIterDataset(
            windows, window_size=SHUFFLED, seed=seed
        )
        return iter(shuffled.batch(batch))


def open_stream(spec: str) -> Stream:
    """Opens `NAME` or `NAME:CONFIG`, of the hub or a folder that `load_dataset` can read."""
    name, _, config = spec.partition(":")
    config = config or CONFIGS.get(name)
    with errors(f"--data hf:{spec}"):
        import datasets

        held_out_split = "validation" in datasets.get_dataset_split_names(name, config)
        training = datasets.load_dataset(name, config, split="train", streaming=True)
        if held_out_split:
            validation = datasets.load_dataset(name, config, split="validation", streaming=True)
        else:
            training, validation = training.skip(HELD_OUT), training
        held_out, first = list(islice(validation, HELD_OUT)), list(training.take(1))
        if not (held_out and first):
            raise ValueError("it has too few rows to train on some and to validate with others")
        if not all("text" in row for row in held_out + first):
            raise ValueError(f"it has no column `text`, but {', '.join(first[0])}")
        return Stream(training, [row["text"] for row in held_out])


@contextlib.contextmanager
def errors(what: str) -> Iterator[None]:
    """What goes wrong with it, in words."""
    try:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it logs every retry; the error at the end says it all
        yield
    except ImportError:
        raise ValueError(f"{what} needs `pip install datasets`") from None
    except Exception as error:  # the hub, the network and the file readers raise anything
        message = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be read: {message}") from error


class StreamedWindows(grain.IterDataset):
    """Rows of text as windows of tokens."""

    def __init__(self, rows: Any, tokenizer: Tokenizer, length: int):
        super().__init__()
        self.rows = rows
        self.tokenizer = tokenizer
        self.length = length

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return StreamedWindowIterator(self.rows, self.tokenizer, self.length)


class StreamedWindowIterator(grain.DatasetIterator[np.ndarray]):
    """Its state is the place in the rows, as `datasets` has it, and the tokens left over."""

    def __init__(self, rows: Any, tokenizer: Tokenizer, length: int):
        super().__init__()
        self.rows = rows
        self.iterator = iter(rows)
        self.tokenizer = tokenizer
        self.length = length
        self.left = np.array([], np.int32)

    def __next__(self) -> np.ndarray:
        while len(self.left) <= self.length:
            new = self.tokenizer.encode([next(self.iterator)["text"]])
            self.left = np.concatenate([self.left, new])
        window, self.left = np.split(self.left, [self.length + 1])
        return window

    def get_state(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict(), "left": self.left.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])
        self.iterator = iter(self.rows)
        self.left = np.array(state["left"], np.int32)


def download(name: str) -> Path:
    """The folder of a model on the hub: its shape, weights and tokenizer."""
    with errors(f"--model {name}, which is no folder here,"):
        import huggingface_hub

        files = ["config.json", "model.safetensors", "tokenizer.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
