"""Text to batches, from the Python standard library, a file, a folder or the Hugging Face hub.

A token is a byte of UTF-8, or a run of bytes that is frequent in the training text. A window is
length + 1 tokens in a row: all but the last are inputs, all but the first targets.
"""

import contextlib
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import grain
import numpy as np
import tokenizers
from common import hub

# What is in the standard library's folder but is not the library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
END = "\0"  # of a document: no text holds it
SAMPLE = 10_000  # documents of a stream that a tokenizer learns from
T = TypeVar("T")


class Tokenizer:
    """Bytes, or byte-level BPE where one is given."""

    def __init__(self, bpe: tokenizers.Tokenizer | None = None):
        self.bpe = bpe
        self.vocab = bpe.get_vocab_size() if bpe else 256

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """The tokens of all texts in a row, an end after each."""
        ended = [text + END for text in texts]
        if self.bpe is None:
            return np.frombuffer("".join(ended).encode(), np.uint8)
        return np.concatenate(
            [np.array(e.ids, np.int32) for e in self.bpe.encode_batch_fast(ended)]
        )

    def write(self, path: Path) -> None:
        """Keeps what a trained model is of no use without."""
        if self.bpe is not None:
            self.bpe.save(str(path))


def make_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `bytes` or `bpe:SIZE` asks for, trained on texts."""
    kind, _, size = spec.partition(":")
    if spec == "bytes":
        return Tokenizer()
    if kind != "bpe" or not size.isdecimal() or int(size) <= 256:
        raise ValueError(f"--tokenizer must be bytes or bpe:SIZE with SIZE above 256, got {spec!r}")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, int(size), min_frequency=0, show_progress=False)
    return Tokenizer(tokenizers.Tokenizer.from_str(bpe.to_str()))


class Corpus(NamedTuple):
    """Batches to train on and windows to validate with."""

    tokenizer: Tokenizer
    batches: grain.DatasetIterator[np.ndarray]  # each (batch, length + 1)
    validation: np.ndarray  # (windows, length + 1)


def load(
    data: str | None,
    tokenizer: str,
    earlier: Path | None,
    *,
    length: int,
    batch: int,
    validation_windows: int,
    seed: int,
) -> Corpus:
    """Reads the text and cuts windows; `earlier` is the file of an earlier run's tokenizer."""
    stream = None
    if data and data.startswith("hf:"):
        stream, validation = hub.open_stream(data[3:])
        training = (row["text"] for row in stream.take(SAMPLE))
    else:
        training, validation = split(read(Path(data) if data else None))
    encoder = None
    with contextlib.suppress(Exception):  # there is none, or a kill has left half of it
        encoder = Tokenizer(tokenizers.Tokenizer.from_file(str(earlier)))
    encoder = encoder or make_tokenizer(tokenizer, training)
    if stream is not None:
        batches = hub.batches(stream, encoder.encode, length=length, batch=batch, seed=seed)
    else:
        windows = Windows(encoder.encode(training), length, "training")
        batches = iter(shuffled(windows, seed).batch(batch))
    held_out = Windows(encoder.encode(validation), length, "validation")
    indices = np.linspace(0, len(held_out) - 1, min(validation_windows, len(held_out)), dtype=int)
    return Corpus(encoder, batches, np.stack([held_out[i] for i in indices]))


def read(path: Path | None) -> dict[str, str]:
    """The text of a file, or of all in a folder that are UTF-8 and not hidden, by name.

    By default those of the running Python's library. They are in the same order everywhere.
    """
    root = path or Path(sysconfig.get_path("stdlib"))
    skipped = set() if path else SKIPPED
    documents = {}
    for file in [root] if root.is_file() else root.rglob("*" if path else "*.py"):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not hidden and not skipped & set(parts):
            with contextlib.suppress(UnicodeDecodeError):
                documents["/".join(parts)] = file.read_text("utf-8")
    if not any(documents.values()):
        raise ValueError(f"--data {path} is no text file in UTF-8, nor a folder of them or hf:NAME")
    return dict(sorted(documents.items()))


def split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and validation: each 20th file, by a hash of its name, is for validation.

    Where that leaves one of them empty, as with a single file, the last 20th of the text is.
    """
    training, validation = [], []
    for name, text in documents.items():
        (validation if zlib.crc32(name.encode()) % 20 == 0 else training).append(text)
    if training and validation:
        return training, validation
    text = "".join(documents.values())
    cut = len(text) * 19 // 20
    return [text[:cut]], [text[cut:]]


class Windows:
    """Tokens cut to windows, each starting with the last token of the one before."""

    def __init__(self, tokens: np.ndarray, length: int, name: str):
        if len(tokens) <= length:
            few = f"the {name} text has {len(tokens)} tokens, too few for a window of {length + 1}"
            raise ValueError(f"{few}; give more text or a smaller --length")
        self.tokens, self.length = tokens, length
        self.starts = range(0, len(tokens) - length, length)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.tokens[start : start + self.length + 1].astype(np.int32)


def shuffled(source: grain.sources.RandomAccessDataSource[T], seed: int) -> grain.IterDataset[T]:
    """Its elements without end, in another order each time round."""
    data = grain.MapDataset.source(source).shuffle(seed).repeat()
    # All of it is in memory: threads would only wait for each other.
    return data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
