"""What a program does at a terminal: arguments, one clear line for what is wrong, exit codes."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from common import training

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
    _, *framed = [line.strip("│ ") for line in stderr.getvalue().splitlines()]
    lines = itertools.dropwhile(is_rule, framed)
    message = itertools.takewhile(lambda line: not is_rule(line), lines)
    words = " ".join(message).removeprefix("Error parsing ")
    if words.startswith(UNKNOWN):
        words = unknown(words, framed)
    raise ValueError(re.sub(WRONG_NUMBER, r"must be a number (\1), got '\2'", words))


def is_rule(line: str) -> bool:
    """Whether tyro draws a line there, in Unicode or ASCII, or leaves it empty."""
    return not line.strip("─-╰╯")


UNKNOWN = "Unrecognized options: "


def unknown(words: str, similar: list[str]) -> str:
    """The first unknown option, and the one that tyro takes for the nearest."""
    option = next((x for x in words.split() if x.startswith("--")), words.removeprefix(UNKNOWN))
    options = (x for x in similar if x.startswith("--") and not is_rule(x))
    near = next((line.split()[0] for line in options), None)
    hint = f"did you mean {near}?" if near else "--help has all options"
    return f"unknown option {option.rstrip(',')}; {hint}"


def choose(what: str, name: str, among: Iterable[str]) -> str:
    """The name, if it is one of these; else an error that says the nearest."""
    among = list(among)
    if name not in among:
        near = difflib.get_close_matches(name, among, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "choose among"
        raise ValueError(f"{what} {name!r}; {hint} {', '.join(among)}")
    return name


def flat(config: Any) -> dict[str, Any]:
    """The options by name, without their groups."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    groups = {name: flat(x) for name, x in values.items() if dataclasses.is_dataclass(x)}
    options = {name: x for name, x in values.items() if name not in groups}
    return options | {name: x for group in groups.values() for name, x in group.items()}


def check(config: Config) -> Config:
    """The same, if its numbers make sense."""
    for name, value in flat(config).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) is int and value < 1 and name not in ("seed", "process"):
            raise ValueError(f"{flag} must be an integer of at least 1, got {value}")
        if type(value) is float and not value >= 0:
            raise ValueError(f"{flag} must be a number of at least 0, got {value}")
    return config
