"""The command line, `python -m sumo_optax`: what training will hold on each device."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sumo_optax._decoder import read_config
from sumo_optax._plan import PRESETS, parse_mesh, plan
from sumo_optax._version import __version__

PLAN = "Print the memory that each device needs to train a decoder, for each optimizer."
DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _rank(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        allowed = "an integer, or a fraction such as 0.25"
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}") from None


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """That of the program, and that of its command."""
    parser = _Parser(
        prog="python -m sumo_optax",
        description="Tools for the optimizers of sumo_optax.",
        epilog="`python -m sumo_optax plan --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sumo_optax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    command = commands.add_parser(
        "plan",
        help=PLAN,
        description=PLAN,
        usage=f"{parser.prog} plan (--preset NAME | --config FILE) [options]",
        allow_abbrev=False,
    )
    _add_options(command)
    return parser, command


def _add_options(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model, one of the two")
    model = model.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", choices=PRESETS, help="a model of examples/pretrain.py")
    model.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.json of a decoder on Hugging Face, or the folder that has it: Llama, Mistral,"
        " Mixtral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT and models like these",
    )
    training = command.add_argument_group("training")
    training.add_argument(
        "--rank",
        type=_rank,
        default=0.25,
        help="rank of low-rank states: an integer, or a fraction of each matrix's short side"
        " (default: %(default)s)",
    )
    training.add_argument(
        "--mesh",
        metavar="data=N,fsdp=N,tensor=N",
        help="mesh axes and their sizes; any of them (default: one device)",
    )
    training.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of parameters and gradients, and of the states of AdamW and Muon"
        " (default: %(default)s)",
    )
    training.add_argument(
        "--state-dtype",
        choices=(*DTYPES, "int8", "int4"),
        help="dtype of low-rank states (default: float32)",
    )
    training.add_argument(
        "--tokens",
        type=int,
        default=2048,
        help="length of the sequence for the column 'fused' (default: %(default)s)",
    )
    output = command.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print bytes as JSON instead of a table"
    )


def _check_options(given: Sequence[str], *parsers: argparse.ArgumentParser) -> None:
    """Refuses an unknown option before anything that is missing because of it."""
    known = [name for parser in parsers for name in parser._option_string_actions]
    for word in given:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help has all options"
            raise ValueError(f"unknown option {option}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program: 0 is success, 2 something given that is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    parser, command = _parsers()
    if not argv:
        parser.print_help()
        return 0
    try:
        _check_options(argv, parser, command)
        print(_planned(parser.parse_args(argv)), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}")
    except (ValueError, TypeError) as error:
        return _failed(str(error))
    return 0


def _failed(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _planned(given: argparse.Namespace) -> str:
    """The table or the JSON that is asked for."""
    model, remark = (PRESETS[given.preset], "") if given.preset else read_config(given.config)
    planned = plan(
        given.preset or str(given.config),
        model,
        rank=given.rank,
        mesh={} if given.mesh is None else parse_mesh(given.mesh),
        dtype=given.dtype,
        state_dtype=given.state_dtype,
        tokens=given.tokens,
    )
    if remark:
        planned = planned._replace(notes=(remark, *planned.notes))
    return planned.as_json() if given.json else str(planned)


if __name__ == "__main__":
    sys.exit(main())
