"""Text to batches, from the Python standard library, a file, a folder or the Hugging Face hub.

A window is length + 1 tokens in a row: all but the last are inputs, all but the first targets.
"""

import dataclasses
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import grain
import numpy as np
from common import hub, tokens
from common.tokens import BpeTokenizer, Tokenizer

# What is in the library's folder but is not the library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
T = TypeVar("T")

# Documents of a stream that a tokenizer learns from.
SAMPLE = 10_000


@dataclasses.dataclass
class Corpus:
    """Batches to train on and windows to validate with."""

    name: str
    tokenizer: Tokenizer
    batches: grain.DatasetIterator[np.ndarray]  # each (batch, length + 1)
    validation: np.ndarray  # (windows, length + 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text in a target of the validation windows."""
        return float(self.tokenizer.token_bytes[self.validation[:, 1:]].mean())


def load(
    data: str | None,
    tokenizer: str,
    *,
    length: int,
    batch: int,
    validation_windows: int,
    seed: int,
    earlier: Path | None = None,
) -> Corpus:
    """Reads the text and cuts windows; `earlier` is the file of an earlier run's tokenizer."""
    stream = hub.open_stream(data[3:]) if data and data.startswith("hf:") else None
    if stream:
        training, validation = [], stream.validation
        sample = stream.sample(SAMPLE)
    else:
        documents = read(Path(data)) if data else standard_library()
        training, validation = split(documents)
        sample = iter(training)

    if earlier and earlier.exists():
        encoder = BpeTokenizer.read(earlier)
    else:
        encoder = tokens.make(tokenizer, sample)

    if stream:
        batches = stream.batches(encoder, length=length, batch=batch, seed=seed)
    else:
        windows = Windows(encoder.encode(training), length, "training")
        batches = shuffled_batches(windows, batch=batch, seed=seed)
    held_out = Windows(encoder.encode(validation), length, "validation")
    return Corpus(
        data or "the standard library", encoder, batches, held_out.spread(validation_windows)
    )


def standard_library() -> dict[str, str]:
    """The sources of the running Python's library, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    return read_files(root, files)


def read(path: Path) -> dict[str, str]:
    """The text of a file, or of all files in a folder that are UTF-8 and not hidden, by name."""
    if path.is_dir():
        files = (
            p
            for p in path.rglob("*")
            if p.is_file() and not any(part[0] == "." for part in p.relative_to(path).parts)
        )
        documents = read_files(path, files)
    else:
        try:
            documents = {path.name: path.read_text("utf-8")}
        except OSError as error:
            raise ValueError(f"--data {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"--data {path} is not text in UTF-8") from None
    if not any(documents.values()):
        raise ValueError(f"--data {path} is empty: give a text file, a folder of them or hf:NAME")
    return documents


def read_files(root: Path, files: Iterator[Path]) -> dict[str, str]:
    """Those files that are UTF-8, by their name under root, in the same order everywhere."""
    documents = {}
    for path in files:
        try:
            documents[path.relative_to(root).as_posix()] = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
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
            raise ValueError(
                f"the {name} text has {len(tokens)} tokens, too few for a window of {length + 1};"
                " give more text or a smaller --length"
            )
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int32)

    def spread(self, count: int) -> np.ndarray:
        """At most so many windows, spread evenly over the text."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self)), dtype=int)
        return np.stack([self[i] for i in indices])


def shuffled_batches(
    source: grain.sources.RandomAccessDataSource[T], *, batch: int, seed: int
) -> grain.DatasetIterator[T]:
    """Batches without end, in another order each time round."""
    return iter(shuffled(source, seed).batch(batch))


def shuffled(source: grain.sources.RandomAccessDataSource[T], seed: int) -> grain.IterDataset[T]:
    """Its elements without end, in another order each time round."""
    data = grain.MapDataset.source(source).shuffle(seed).repeat()
    # All of it is in memory: threads would only wait for each other.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return data.to_iter_dataset(options)
