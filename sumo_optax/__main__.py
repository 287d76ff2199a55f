"""python -m sumo_optax plan: what training a LLaMA will hold on each device."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sumo_optax._plan import PRESETS, parse_mesh, plan, read_config


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _rank(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sumo_optax")
    commands = parser.add_subparsers(required=True, metavar="plan")
    command = commands.add_parser(
        "plan", help=__doc__, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", choices=PRESETS, help="a model of examples/pretrain.py")
    model.add_argument("--config", type=Path, help="config.json of a Hugging Face LLaMA or Mistral")
    command.add_argument(
        "--rank",
        type=_rank,
        default=0.25,
        help="an integer, or a fraction of each matrix's short side; by default 0.25",
    )
    command.add_argument("--mesh", help="data=N,fsdp=N,tensor=N; by default one device")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of parameters and gradients, by default bfloat16",
    )
    command.add_argument(
        "--state-dtype",
        choices=("float32", "bfloat16", "float16", "int8", "int4"),
        help="of low-rank states, by default float32; AdamW's and Muon's have --dtype",
    )
    command.add_argument(
        "--tokens",
        type=int,
        default=2048,
        help="of the one sequence that the column 'fused' counts, by default 2,048",
    )
    command.add_argument("--json", action="store_true", help="bytes as JSON instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program: 0 is success, 2 something given that is wrong."""
    try:
        given = _parser().parse_args(argv)
        model = PRESETS[given.preset] if given.preset else read_config(given.config)
        planned = plan(
            given.preset or str(given.config),
            model,
            rank=given.rank,
            mesh={} if given.mesh is None else parse_mesh(given.mesh),
            dtype=given.dtype,
            state_dtype=given.state_dtype,
            tokens=given.tokens,
        )
        print(planned.as_json() if given.json else planned, flush=True)
    except (ValueError, TypeError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
