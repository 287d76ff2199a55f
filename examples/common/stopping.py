"""Ctrl-C and SIGTERM, kept until a step is done."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import jax

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def noted() -> Iterator[list[signal.Signals]]:
    """A list that the first of the signals is put on; a second one acts as it always does.

    Of several processes JAX takes SIGTERM, since all must stop after the same step.
    """
    seen: list[signal.Signals] = []
    before = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: object) -> None:
        seen.append(signal.Signals(number))
        restore()
        print(
            f"\n{seen[0].name}: a checkpoint after this step, then the end; once more ends at once",
            file=sys.stderr,
        )

    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, note) for number in SIGNALS})
    try:
        yield seen
    finally:
        restore()
