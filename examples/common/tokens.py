"""Text to tokens and back: bytes, or byte-level BPE."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# Ends a document: no text holds it.
END = "\0"


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    vocab = 256
    token_bytes = np.ones(256, int)

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """The tokens of all texts in a row, an end after each."""
        return np.frombuffer("".join(text + END for text in texts).encode(), np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """The text again."""
        return bytes(tokens.astype(np.uint8)).decode(errors="replace")

    def write(self, path: Path) -> None:
        """There is nothing to keep."""


class BpeTokenizer:
    """A token is a run of bytes that is frequent in the training text."""

    def __init__(self, bpe: tokenizers.Tokenizer):
        self.bpe = bpe
        self.vocab = bpe.get_vocab_size()
        # Byte-level BPE spells each byte as one character.
        self.token_bytes = np.array([len(bpe.id_to_token(i) or "") for i in range(self.vocab)])

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> "BpeTokenizer":
        """Learns the tokens from texts."""
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def read(cls, path: Path) -> "BpeTokenizer":
        """The tokenizer that `write` left in a file."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    def write(self, path: Path) -> None:
        """Keeps the tokenizer, which a trained model is of no use without."""
        self.bpe.save(str(path))

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """The tokens of all texts in a row, an end after each."""
        encodings = self.bpe.encode_batch_fast([text + END for text in texts])
        return np.concatenate([np.array(e.ids, np.int32) for e in encodings])

    def decode(self, tokens: np.ndarray) -> str:
        """The text again."""
        return self.bpe.decode(tokens.tolist())


Tokenizer = ByteTokenizer | BpeTokenizer


def make(spec: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `bytes` or `bpe:SIZE` asks for, trained on texts."""
    kind, _, size = spec.partition(":")
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "bpe" and size.isdecimal() and int(size) > 256:
        return BpeTokenizer.train(texts, int(size))
    raise ValueError(f"--tokenizer must be bytes or bpe:SIZE with SIZE above 256, got {spec!r}")
