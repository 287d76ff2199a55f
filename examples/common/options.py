"""What the command lines of both programs have in common."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

# A group of options is a dataclass, whose name does not stand before them.
SETTINGS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def optional(metavar: str, default: str) -> Any:
    """How --help shows an option that may be left out: what it takes, and what it then is."""
    hint = lambda value: f"(default: {default if value == 'None' else value})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is written, and where."""

    out: Annotated[Path | None, optional("FOLDER", "a new one in runs/")] = None
    """Folder to write to."""
    resume: bool = False
    """Go on from the last checkpoint."""
    overwrite: bool = False
    """Delete the run in the folder first."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, into FOLDER/tensorboard."""
    wandb: Annotated[str | None, optional("PROJECT", "none")] = None
    """Send the metrics to this project of Weights & Biases, too."""
