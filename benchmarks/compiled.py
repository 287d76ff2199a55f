"""What compilers for a GPU and for TPUs make of an optimizer's step, without having either.

python benchmarks/compiled.py                                            # all: the record
python benchmarks/compiled.py --cases update_60m_h100 --optimizers sumo  # some: into the record
python benchmarks/compiled.py --cases update_60m_h100 --optimizers sumo --no-write
python benchmarks/compiled.py --draw                                     # tables of the record

Needs the extra `compile`. Each program is compiled in a process of its own, within
its case's limit of processor time. These are compilers' figures, not times.
"""

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import optax
import record
import training_step
import tyro
from optax.contrib import MuonDimensionNumbers
from training_step import Model

import sumo_optax


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled, and for what."""

    title: str
    target: str
    model: Model
    rank: int
    update_alone: bool = False
    """The optimizer on the gradients of all layers; otherwise a whole training step."""
    axes: dict[str, int] | None = None
    """Of the mesh, by default one device: "x" divides rows and batch, "tensor" columns."""
    state_dtype: str | None = None
    """Of the low-rank states."""
    planned: tuple[str, ...] = ()
    """Arguments of `python -m sumo_optax plan` for the same model."""
    leave_out: tuple[str, ...] = ()
    """Optimizers that it is not for."""
    few_bits: bool = False
    """Whether it is also for states in few bits."""
    limit: int = 120
    """Processor seconds for a program; one that is not done by then is a row that says so."""


SMALL = Model(width=512, hidden=1376, layers=8, heads=8)
BIG = Model(width=2048, hidden=5461, layers=24, heads=32, dtype="bfloat16", stacked=True)
BIGGEST = Model(width=4096, hidden=11008, layers=32, heads=32, dtype="bfloat16", stacked=True)
STACKED = ("galore",)  # optax's knows no batch axes
TWO_LAYERS = dataclasses.replace(SMALL, layers=2)
ONE_LAYER = dataclasses.replace(BIGGEST, layers=1, dtype="float32", stacked=False)

CASES = {
    "update_60m_h100": Case(
        "update alone of LLaMA-60M's 8 layers: 56 matrices, 16 norms; float32, rank 128, H100",
        "h100",
        SMALL,
        rank=128,
        update_alone=True,
    ),
    "update_60m_2_layers_h100": Case(
        "update alone of 2 of these layers, H100", "h100", TWO_LAYERS, rank=128, update_alone=True
    ),
    "update_60m_v5e": Case(
        "update alone of LLaMA-60M's 8 layers: 56 matrices, 16 norms; float32, rank 128, TPU v5e",
        "v5e:2x2",
        SMALL,
        rank=128,
        update_alone=True,
    ),
    "update_60m_2_layers_v5e": Case(
        "update alone of 2 of these layers, TPU v5e",
        "v5e:2x2",
        TWO_LAYERS,
        rank=128,
        update_alone=True,
    ),
    "update_7b_1_layer_v5e": Case(
        "update alone of one layer of LLaMA-7B, float32, rank 1024, TPU v5e",
        "v5e:2x2",
        ONE_LAYER,
        rank=1024,
        update_alone=True,
    ),
    "train_1b_h100": Case(
        "training step of LLaMA-1B, layers stacked, bfloat16, rank 512, H100",
        "h100",
        BIG,
        rank=512,
        planned=("--preset", "1b", "--rank", "512", "--dtype", "bfloat16"),
        leave_out=STACKED,
    ),
    "train_7b_h100": Case(
        "training step of LLaMA-7B, layers stacked, bfloat16, rank 1024, H100",
        "h100",
        BIGGEST,
        rank=1024,
        state_dtype="bfloat16",
        leave_out=STACKED,
        few_bits=True,
    ),
    "train_7b_8_layers_h100": Case(
        "training step of 8 layers of LLaMA-7B, not stacked, bfloat16, rank 1024, H100",
        "h100",
        dataclasses.replace(BIGGEST, layers=8, stacked=False),
        rank=1024,
        state_dtype="bfloat16",
    ),
    "fsdp_7b_v5e": Case(
        "training step of LLaMA-7B, layers stacked, bfloat16, rank 1024, FSDP on 64 TPU v5e",
        "v5e:8x8",
        dataclasses.replace(BIGGEST, length=1024),
        rank=1024,
        state_dtype="bfloat16",
        axes={"x": 64},
        limit=200,
        leave_out=STACKED,
    ),
}
PEERS = ("sgd", "adamw", "muon", "galore")
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "sumo": ("sumo", {}),
    "sumo, Newton-Schulz": ("sumo", {"polar": "newton_schulz"}),
    "sumo, whole": ("sumo", {"residual": "orthogonal"}),
    "sumo as published": ("sumo", dict(sumo_optax.presets.SUMO)),
    "online_subspace_descent": ("online_subspace_descent", {}),
    "mofasgd": ("mofasgd", {}),
    "sumo, 8 bits": ("sumo", {"state_dtype": "int8"}),
    "sumo, 4 bits": ("sumo", {"state_dtype": "int4"}),
}
# With updates inside the backward pass, in cases that are whole training steps.
FUSED = (
    "sumo, value_and_update",
    "sumo, 4 bits, value_and_update",
    "adamw, value_and_update",
)
OPTIMIZERS = (*PEERS, *OURS, *FUSED)
# Of the code before matrices were stacked, kept for comparison.
BEFORE = ("sumo, before",)
# Columns that are a table together.
PARTS = (
    (
        "peak, MiB (over AdamW's)",
        "temporaries, MiB (over SGD's)",
        "state, MiB",
        "arguments / planned",
        "collectives, MiB",
    ),
    (
        "kernels (over AdamW's)",
        "of them in every step",
        "conditionals",
        "loops",
        "factorisations in every step",
        "calls of factorisations",
    ),
    (
        "equations",
        "tracing, s",
        "compilation, s (over AdamW's)",
        "program, MiB (over AdamW's)",
        "GFLOP",
    ),
)
PACKAGES = ("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
NO_TARGET = "no target"
MIB = 2**20
TPU_FACTORISATIONS = ("Cholesky", "EighTpu", "QrDecompositionBlock")
PLANNED = {
    "adamw": "AdamW",
    "muon": "Muon",
    "sumo": "SUMO",
    "online_subspace_descent": "Online Subspace Descent",
    "mofasgd": "MoFaSGD",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles the step of every optimizer in every case."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which of them."""
    optimizers: tuple[str, ...] = OPTIMIZERS
    """Which of them."""
    limit: int | None = None
    """Processor seconds for a program, in place of each case's own."""
    at_once: int = 2
    """Programs to compile at once: their seconds are of the processor, not of the clock."""
    write: bool = True
    """Put the rows into the record, in place of what it has of them; otherwise print them."""
    draw: bool = False
    """Compile nothing: the tables of what is recorded."""
    keep: Path | None = None
    """A folder for the text of the compiled programs."""


def optimizer(name: str, case: Case) -> optax.GradientTransformation:
    """With the same matrices for all."""
    numbers = training_step.projections
    if name == "sgd":
        return optax.sgd(1e-2)
    if name == "adamw":
        return optax.adamw(1e-3)
    if name == "muon":
        return optax.contrib.muon(1e-2, muon_weight_dimension_numbers=numbers)
    if name == "galore":
        return optax.contrib.galore(1e-2, case.rank, weight_dimension_numbers=galore_numbers)
    function, settings = OURS[name]
    given = {"weight_dimension_numbers": numbers, "state_dtype": case.state_dtype}
    return getattr(sumo_optax, function)(1e-2, case.rank, **(given | settings))


def galore_numbers(params: Any) -> Any:
    """optax's GaLore has a type of its own for the same."""
    return jax.tree.map(
        lambda spec: optax.contrib.GaLoreDimensionNumbers(*spec),
        training_step.projections(params),
        is_leaf=lambda x: isinstance(x, MuonDimensionNumbers),
    )


def run(case: str, optimizer: str, config: Config) -> dict[str, Any]:
    """A row of the record, from a process of its own."""
    row = {"case": case, "optimizer": optimizer, "target": CASES[case].target}
    argv = [sys.executable, str(Path(__file__).with_name("compile_one.py")), case, optimizer]
    limit = config.limit or CASES[case].limit
    argv += ["--limit", str(limit)] + (["--keep", str(config.keep)] if config.keep else [])
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode == 0:
        return row | {"outcome": "compiled"} | json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -signal.SIGXCPU:
        return row | {"outcome": f"not compiled after {limit} s"}
    return row | {"outcome": failure(done.stderr)}


def is_for(case: Case, name: str) -> bool:
    if name in case.leave_out or (name in FUSED and case.update_alone):
        return False
    return case.few_bits or " bits" not in name


def failure(errors: str) -> str:
    """Why a program was not compiled, in a line; too large a one is a result."""
    named = re.findall(r"^(?:\w+\.)*\w+Error: .*", errors, re.MULTILINE)
    last = (named or errors.strip().splitlines() or ["no message"])[-1]
    if no_target := re.search(f"^{NO_TARGET}: .*", errors, re.MULTILINE):
        return no_target[0]
    if needed := re.search(r"memory.*?\(([\d.]+)G\) exceeds.*?\(([\d.]+)G\)", last):
        return "refused: temporaries of {} GiB, a device has {}".format(*needed.groups())
    return f"fails: {last[:200]}"


def summarize() -> list[dict[str, Any]]:
    """The rows of the record, none where there is none."""
    path = record.RESULTS / "compiled.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add(row: dict[str, Any]) -> None:
    """Puts a row into the record, in the order of the tables."""
    key = lambda row: (row["case"], row["optimizer"])
    rows = {key(x): x for x in [*summarize(), row]}
    order = itertools.product(CASES, (*OPTIMIZERS, *BEFORE))
    kept = compared([rows[x] for x in order if x in rows])
    record.write("compiled", kept, arguments=(), packages=PACKAGES)


def refuse_a_mixture() -> None:
    """A record's rows are of one set of versions."""
    path = record.RESULTS / "compiled.json"
    if path.exists():
        versions = json.loads(path.read_text())["versions"]
        here = record.versions((*record.PACKAGES, *PACKAGES))
        differ = [
            f"{name} {versions[name]}"
            for name in ("jax", *PACKAGES)
            if name in versions and versions[name] != here.get(name)
        ]
        if differ:
            raise SystemExit(
                f"error: {path} was made with {', '.join(differ)}: remove it, or write nothing"
            )


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its ratios to AdamW and SGD in the same case."""
    of = {(row["case"], row["optimizer"]): row for row in rows}

    def ratios(row, peer):
        other = of.get((row["case"], peer), {})
        return {
            key: round(row[key] / other[key], 3)
            for key in ("peak_bytes", "temporary_bytes", "program_bytes", "kernels", "compile_s")
            # Over next to nothing a ratio says nothing.
            if row.get(key) is not None and other.get(key, 0) > (MIB if "bytes" in key else 0)
        }

    return [row | {f"over_{peer}": ratios(row, peer) for peer in ("adamw", "sgd")} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Tables for each case; what is nothing for every optimizer has no column."""
    tables = []
    for name, case in CASES.items():
        lines = [line(row) for row in rows if row["case"] == name]
        if lines:
            tables.append(f"**{case.title[0].upper()}{case.title[1:]}**\n")
            parts = [part(lines, names) for names in PARTS]
            tables += [record.table(*x) + "\n" for x in parts if x[0]]
    return "\n".join(tables)


def part(lines: list[dict[str, str]], names: tuple[str, ...]) -> tuple[list, dict[str, str]]:
    """The lines and columns of which something is to be said."""
    columns = [name for name in names if any(x[name] for x in lines)]
    kept = [x for x in lines if any(x[name] for name in columns)]
    return kept, {name: f"{{{name}}}" for name in ("optimizer", *columns)}


def line(row: dict[str, Any]) -> dict[str, str]:
    """A row as it is read; of a program that was not compiled, why."""
    size = lambda key: f"{row[key] / MIB:,.0f}" if row.get(key) else ""
    number = lambda key: f"{row[key]:,}" if row.get(key) else ""
    of = lambda peer, key: f" ({x:,.2f})" if (x := row.get(f"over_{peer}", {}).get(key)) else ""
    libraries = {
        re.sub("^cusolver_|_ffi$|^__cublas\\$", "", name): count
        for name, count in row.get("library_calls", {}).items()
        if "cusolver" in name or "riangular" in name or name in TPU_FACTORISATIONS
    }
    sent = row.get("collectives", {})
    return {
        "optimizer": row["optimizer"],
        "peak, MiB (over AdamW's)": size("peak_bytes") + of("adamw", "peak_bytes")
        or row["outcome"],
        "temporaries, MiB (over SGD's)": size("temporary_bytes") + of("sgd", "temporary_bytes")
        if row.get("temporary_bytes", 0) >= MIB
        else "",
        "state, MiB": size("state_bytes"),
        "arguments / planned": f"{row['argument_bytes'] / row['planned_bytes']:.3f}"
        if "planned_bytes" in row
        else "",
        "program, MiB (over AdamW's)": size("program_bytes") + of("adamw", "program_bytes"),
        "kernels (over AdamW's)": number("kernels") + of("adamw", "kernels"),
        "of them in every step": number("ordinary_kernels"),
        "conditionals": number("conditionals"),
        "loops": number("loops"),
        "GFLOP": number("gigaflop"),
        "factorisations in every step": ", ".join(row.get("factorisations", ())),
        "calls of factorisations": ", ".join(f"{n} {name}" for name, n in libraries.items()),
        "collectives, MiB": ", ".join(f"{n / MIB:,.0f} {kind}" for kind, n in sent.items()),
        "equations": number("equations"),
        "tracing, s": f"{row['trace_s']:.1f}" if "trace_s" in row else "",
        "compilation, s (over AdamW's)": f"{row['compile_s']:.1f}{of('adamw', 'compile_s')}"
        if "compile_s" in row
        else "",
    }


def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(Config, args=argv)
    jax.config.update("jax_platforms", "cpu")  # the plugins' devices are not looked for
    if config.draw:
        print(table(summarize()))
        return
    for name in (*config.cases, *config.optimizers):
        if name not in (*CASES, *OPTIMIZERS):
            raise SystemExit(f"error: {name!r} is none of {', '.join((*CASES, *OPTIMIZERS))}")
    if config.write:
        refuse_a_mixture()
    wanted = [
        (case, name)
        for case, name in itertools.product(config.cases, config.optimizers)
        if is_for(CASES[case], name)
    ]
    absent: dict[str, dict[str, Any]] = {}

    def compiled(what: tuple[str, str]) -> dict[str, Any]:
        case, name = what
        return absent.get(CASES[case].target) or run(case, name, config)

    with ThreadPoolExecutor(config.at_once) as pool:
        for row in pool.map(compiled, wanted):
            if row["outcome"].startswith(NO_TARGET):
                absent[row["target"]] = row
                continue
            print(json.dumps(row), flush=True)
            if config.write:
                add(row)
    for target, row in absent.items():
        print(f"skipped: {target}, {row['outcome']}", file=sys.stderr)


if __name__ == "__main__":
    main()
