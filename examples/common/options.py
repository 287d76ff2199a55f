"""Options of a program, in the groups in which its help shows them."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import tyro


def default(what: str) -> Any:
    """What the help says of an option that is None where it is not given."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")


def parse(kind: Any, argv: Sequence[str] | None, **given: Any) -> Any:
    """The command line as tyro reads it."""
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)
    return tyro.cli(kind, args=argv, config=style, **given)


def flat(groups: Iterable[Any]) -> Any:
    """The options of some dataclasses as attributes of one object."""
    return SimpleNamespace(**{name: x for group in groups for name, x in vars(group).items()})
