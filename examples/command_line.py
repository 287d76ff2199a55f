"""What a program does at a terminal: arguments, one clear line for what is wrong, exit codes."""

import contextlib
import dataclasses
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import training

Config = TypeVar("Config")
Prepared = TypeVar("Prepared")


def run(prepare: Callable[[], Prepared], train: Callable[[Prepared], None]) -> int:
    """Runs a program: 0 is success, 1 a failure, 2 something given that is wrong.

    128 + n is a stop by signal n, such as 130 by Ctrl-C.
    """
    try:
        prepared = prepare()
    except (ValueError, TypeError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted before anything was written", file=sys.stderr)
        return 128 + signal.SIGINT
    try:
        train(prepared)
    except OSError as error:
        return fail(error, 1)
    except training.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    return 0


def fail(error: Exception, code: int) -> int:
    """Says what went wrong, in a line."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


# tyro's words for an optional number that is none.
WRONG_NUMBER = r"no type matching \{None\}\|(\w+) could be instantiated from \['(.*)'\]\."


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """What tyro says of a wrong argument, as an error of one line."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            yield
        except SystemExit as exit:
            if not exit.code:
                raise
        else:
            return
    # tyro frames a message of several lines, then repeats the help: one line is enough.
    lines = [line.strip("│ ") for line in stderr.getvalue().splitlines()[1:]]
    message = itertools.takewhile(lambda line: line.strip("─"), lines)
    words = " ".join(message).removeprefix("Error parsing ")
    raise ValueError(re.sub(WRONG_NUMBER, r"must be a number (\1), got '\2'", words))


def check(config: Config) -> Config:
    """The same, if its numbers make sense."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if type(value) is int and value < 1 and field.name not in ("seed", "process"):
            raise ValueError(f"{flag} must be an integer of at least 1, got {value}")
        if type(value) is float and not value >= 0:
            raise ValueError(f"{flag} must be a number of at least 0, got {value}")
    return config
