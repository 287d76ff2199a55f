"""Text to batches, from the Python standard library, a file, a folder or the Hugging Face hub.

A token is a byte of UTF-8, or a run of bytes that is frequent in the training text. A window is
length + 1 tokens in a row: all but the last are inputs, all but the first targets.
"""

import contextlib
import dataclasses
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import grain
import numpy as np
import tokenizers
from common.options import default

# What is in the standard library's folder but is not the library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
END = "\0"  # of a document: no text holds it
CONFIGS = {"allenai/c4": "en"}  # of data sets that want one: that of the GaLore protocol
SAMPLE = 10_000  # documents of a stream that a tokenizer learns from
HELD_OUT = 1_000  # those that it validates with


@dataclasses.dataclass(frozen=True)
class Options:
    """What it learns from."""

    # Text file, folder or hf:NAME[:CONFIG].
    data: Annotated[str | None, default("Python's standard library")] = None
    tokenizer: str = "bytes"  # What makes tokens of text: bytes or bpe:SIZE.
    eval_windows: int = 256  # Windows of the validation text to validate with.
    seed: int = 0  # Of the initial parameters and the order of the data.


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
        encodings = self.bpe.encode_batch_fast(ended)
        return np.concatenate([np.array(x.ids, np.int32) for x in encodings])

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


def load(options: Any, earlier: Path) -> tuple[Tokenizer, Any, np.ndarray]:
    """Tokenizer, that of `earlier` to resume it, batches and validation windows for pretrain.py."""
    rows, data, length = None, options.data, options.length
    if data and data.startswith("hf:"):
        rows, validation = stream(data[3:])
        training = (row["text"] for row in rows.take(SAMPLE))
    else:
        training, validation = split(read(Path(data) if data else None))
    tokenizer = None
    if options.resume:
        with contextlib.suppress(Exception):  # there is none, or a kill has left half of it
            tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(earlier)))
    tokenizer = tokenizer or make_tokenizer(options.tokenizer, training)
    if rows is not None:
        batches = Stream(rows, tokenizer.encode, options)
    else:
        seen = windows(tokenizer.encode(training), length, "training")
        batches = shuffled(seen, options.seed).batch(options.batch)
        batches = iter(batches.map(lambda x: x.astype(np.int32)))
    held_out = windows(tokenizer.encode(validation), length, "validation")
    spread = np.linspace(0, len(held_out) - 1, min(options.eval_windows, len(held_out)), dtype=int)
    return tokenizer, batches, held_out[spread].astype(np.int32)


def read(path: Path | None) -> dict[str, str]:
    """The text of a file, or of all in a folder that are UTF-8 and not hidden, by name.

    By default those of the running Python's library. They are in the same order everywhere.
    """
    root, documents = path or Path(sysconfig.get_path("stdlib")), {}
    for file in [root] if root.is_file() else root.rglob("*" if path else "*.py"):
        parts = file.relative_to(root).parts
        skipped = any(x.startswith(".") for x in parts) or (not path and SKIPPED & set(parts))
        if file.is_file() and not skipped:
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


def windows(tokens: np.ndarray, length: int, name: str) -> np.ndarray:
    """Tokens cut to windows, each starting with the last token of the one before."""
    if len(tokens) <= length:
        few = f"the {name} text has {len(tokens)} tokens, too few for a window of {length + 1}"
        raise ValueError(f"{few}; give more text or a smaller --length")
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def shuffled(source: Any, seed: int) -> grain.IterDataset:
    """Its elements without end, in another order each time round."""
    # All of it is in memory: threads would only wait for each other.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(source).shuffle(seed).repeat().to_iter_dataset(options)


def stream(spec: str) -> tuple[Any, list[str]]:
    """Rows to train on and texts to validate with, of `NAME` or `NAME:CONFIG`.

    They are the first of the validation split, if there is one, else the first of all. The name is
    that of a data set of the hub, or of a folder that `load_dataset` can read.
    """
    import datasets  # takes seconds

    name, _, config = spec.partition(":")
    config = config or CONFIGS.get(name)
    load = lambda split: datasets.load_dataset(name, config, split=split, streaming=True)
    training = validation = load("train")
    if "validation" in datasets.get_dataset_split_names(name, config):
        validation = load("validation")
    else:
        training = training.skip(HELD_OUT)
    held_out, first = list(validation.take(HELD_OUT)), list(training.take(1))
    if not (held_out and first and all("text" in row for row in held_out + first)):
        raise ValueError(f"--data hf:{spec} needs a column `text` and more rows, got {first}")
    return training, [row["text"] for row in held_out]


class Stream:
    """Batches of windows of rows of text, without end; `datasets` keeps the place in them."""

    def __init__(self, rows: Any, encode: Callable[[list[str]], np.ndarray], options: Any):
        def cut(texts: list[str], indices: list[int]) -> dict[str, np.ndarray]:
            """Windows of some documents in another order; the last is filled up from the first."""
            tokens, size = encode(texts), options.length + 1
            windows = np.resize(tokens, (-(-len(tokens) // size), size))
            rng = np.random.default_rng([options.seed, indices[0]])
            return {"windows": rng.permutation(windows).astype(np.int32)}

        rows = rows.select_columns("text").repeat(None)
        how = {"batched": True, "with_indices": True, "remove_columns": "text"}
        self.rows = rows.map(cut, input_columns="text", **how).batch(options.batch)
        self.iterator = iter(self.rows)

    def __next__(self) -> np.ndarray:
        return np.array(next(self.iterator)["windows"], np.int32)

    def get_state(self) -> dict[str, Any]:
        """The place, as JSON."""
        return self.rows.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place."""
        self.rows.load_state_dict(state)
        self.iterator = iter(self.rows)
