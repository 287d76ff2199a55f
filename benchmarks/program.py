"""What a compiled program says of itself, for one device."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))")
FACTORISATIONS = ("cholesky", "eigh", "lu", "qr", "geqrf", "svd")


def figures(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes, counts and names; the body of a loop counts once."""
    memory, text = memory_of(compiled), compiled.as_text() or ""
    cost = compiled.cost_analysis() or {}
    lines = instructions(text)
    ordinary = "\n".join(line for name in outside_of_branches(lines) for line in lines[name])
    sent: Counter[str] = Counter()
    for shapes, kind in COLLECTIVE.findall(ordinary):
        sent[kind] += shape_bytes(shapes)
    return {
        "peak_bytes": peak_bytes(compiled),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,  # 0 for a GPU
        "gigaflop": round(cost.get("flops", 0) / 1e9, 1),
        "kernels": kernels(text),
        "ordinary_kernels": kernels(ordinary),
        "conditionals": text.count(" conditional("),
        "loops": text.count(" while("),
        "library_calls": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
        "factorisations": factorisations(ordinary),
        "collectives": dict(sent),
    }


def memory_of(compiled: jax.stages.Compiled) -> Any:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, temporaries and results that take the place of no argument."""
    memory = memory_of(compiled)
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return held + memory.output_size_in_bytes - memory.alias_size_in_bytes


def kernels(text: str) -> int:
    """Fused loops and calls of libraries: what is launched one after another."""
    return len(re.findall(r" fusion\(| custom-call\(", text))


def factorisations(text: str) -> list[str]:
    """Names of JAX's factorisations that instructions were traced from."""
    names = " ".join(re.findall(r'op_name="([^"]*)"', text))
    return sorted(set(re.findall(r"\w+", names)) & set(FACTORISATIONS))


def instructions(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, the entry's under "ENTRY"."""
    computations: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = "ENTRY" if line.startswith("ENTRY") else line.split(" ")[0].lstrip("%")
            body = computations.setdefault(name, [])
        elif line.startswith(" "):
            body.append(line)
    return computations


def outside_of_branches(computations: dict[str, list[str]]) -> set[str]:
    """Those that every step comes to: the rest is called in branches of conditionals alone."""
    reached: set[str] = set()
    waiting = ["ENTRY"]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in computations:
            reached.add(name)
            for line in computations[name]:
                waiting += called(BRANCHES.sub("", line), computations)
    return reached


def called(line: str, computations: dict[str, list[str]]) -> Iterator[str]:
    return (name for name in re.findall(r"%([\w.\-]+)", line) if name in computations)


def equations(jaxpr: Any) -> int:
    """Of a jaxpr and all that are inside it."""
    inner = (x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())))
    return len(jaxpr.eqns) + sum(
        equations(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")
    )


def shape_bytes(shapes: str) -> int:
    """Of the arrays in an instruction's type."""
    found = re.findall(rf"({'|'.join(BYTES)})\[([0-9,]*)\]", shapes)
    return sum(BYTES[t] * math.prod(map(int, filter(None, dims.split(",")))) for t, dims in found)
