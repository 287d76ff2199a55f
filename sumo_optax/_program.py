"""The loss as a program: what it does with a parameter, and how to run it with rules of our own.

The only file that touches jaxprs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

_CALLS = ("jit", "pjit")


class Program(NamedTuple):
    """A function of arrays, without what its result does not need."""

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    structure: Any  # of the result

    def result(self, outputs: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, outputs)


def traced(fun: Callable[..., Any], arrays: Sequence[jax.Array]) -> Program:
    program, shapes = jax.make_jaxpr(fun, return_shape=True)(*arrays)
    # Loops that hand weights on unchanged, as Flax's do, would form their whole gradients.
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals), True)
    return Program(jaxpr, program.consts, jax.tree.structure(shapes))


class Evaluator(NamedTuple):
    """Runs a program some of whose values are of a `kind` that the `rules` of operations know."""

    kind: type
    plain: Callable[[Any], jax.Array]  # such a value for an operation without a rule
    rules: dict[str, Callable[..., list[Any]]]

    def __call__(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]):
        values: dict[core.Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)
        read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
        for eqn in jaxpr.eqns:
            arguments = [read(x) for x in eqn.invars]
            rule = Evaluator.bind
            if any(isinstance(x, self.kind) for x in arguments):
                name = eqn.primitive.name
                rule = self.rules.get(name, Evaluator.inlined if name in _CALLS else rule)
            values |= zip(eqn.outvars, rule(self, eqn, *arguments), strict=True)
        return [read(x) for x in jaxpr.outvars]

    def bind(self, eqn: core.JaxprEqn, *arguments: Any) -> list[Any]:
        """The operation as it is."""
        arguments = tuple(self.plain(x) if isinstance(x, self.kind) else x for x in arguments)
        found = eqn.primitive.get_bind_params(eqn.params)
        # Older versions of jax give a pair.
        functions, parameters = found if isinstance(found, tuple) else ((), found)
        outputs = eqn.primitive.bind(*functions, *arguments, **parameters)
        return outputs if eqn.primitive.multiple_results else [outputs]

    def inlined(self, eqn: core.JaxprEqn, *arguments: Any) -> list[Any]:
        inner = eqn.params["jaxpr"]
        return self(inner.jaxpr, inner.consts, arguments)


class Scan(NamedTuple):
    """A loop: its body is a function of constants, what is carried, and slices."""

    body: core.ClosedJaxpr
    consts: int
    carry: int
    options: dict[str, Any]  # of `jax.lax.scan`

    @classmethod
    def of(cls, eqn: core.JaxprEqn):
        """Slices are what has another shape inside: versions of jax count in different words."""
        body = eqn.params["jaxpr"]
        differ = lambda xs, ys: sum(
            x.aval.shape != y.aval.shape for x, y in zip(xs, ys, strict=True)
        )
        carry = len(eqn.outvars) - differ(eqn.outvars, body.jaxpr.outvars)
        consts = len(eqn.invars) - differ(eqn.invars, body.jaxpr.invars) - carry
        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        return cls(body, consts, carry, options)

    def split(self, arguments: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        i, j = self.consts, self.consts + self.carry
        return list(arguments[:i]), list(arguments[i:j]), list(arguments[j:])

    def run(self, turn: Callable[..., Any], carry: Any, xs: Any) -> Any:
        return jax.lax.scan(turn, carry, xs, **self.options)

    def turn(self, *inputs: Any) -> list[Any]:
        """Constants, what is carried and slices: what is carried then, and slices of results."""
        return core.jaxpr_as_fun(self.body)(*inputs)

    def slices(self) -> list[jax.ShapeDtypeStruct]:
        avals = [x.aval for x in self.body.jaxpr.invars[self.consts + self.carry :]]
        return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in avals]


class Uses(NamedTuple):
    """How a program uses its inputs."""

    loops: dict[int, int]  # the one scan that takes an input apart, where there is no other use
    taken_apart: set[int]  # by any scan


def uses(jaxpr: core.Jaxpr) -> Uses:
    found: dict[int, list[int | None]] = {}
    taken_apart: set[int] = set()
    numbers = itertools.count()

    def visit(jaxpr, inputs):
        """`inputs`: for a variable, which input it is."""
        for eqn in jaxpr.eqns:
            known = [inputs.get(x) if isinstance(x, core.Var) else None for x in eqn.invars]
            name = eqn.primitive.name
            if all(i is None for i in known):
                continue
            if name in _CALLS:
                inner = eqn.params["jaxpr"].jaxpr
                visit(inner, {v: i for v, i in zip(inner.invars, known, strict=True)})
                continue
            if name == "convert_element_type":
                inputs |= {eqn.outvars[0]: known[0]}
                continue
            number, first = next(numbers), len(known)
            if name == "scan":
                scan = Scan.of(eqn)
                first = scan.consts + scan.carry
            for k, i in enumerate(known):
                if i is not None:
                    found.setdefault(i, []).append(number if k >= first else None)
                    taken_apart.update({i} if k >= first else ())
        for x in jaxpr.outvars:
            if isinstance(x, core.Var) and inputs.get(x) is not None:
                found.setdefault(inputs[x], []).append(None)

    visit(jaxpr, {v: i for i, v in enumerate(jaxpr.invars)})
    loops = {i: each[0] for i, each in found.items() if len(each) == 1 and each[0] is not None}
    return Uses(loops, taken_apart)


def sources(jaxpr: core.Jaxpr, inputs: Sequence[frozenset]) -> list[frozenset]:
    """For each output the union of what stands for the inputs that it may depend on."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda x: known.get(x, frozenset()) if isinstance(x, core.Var) else frozenset()
    for eqn in jaxpr.eqns:
        found = [of(x) for x in eqn.invars]
        if eqn.primitive.name in _CALLS:
            found = sources(eqn.params["jaxpr"].jaxpr, found)
        elif eqn.primitive.name != "optimization_barrier":
            found = [functools.reduce(frozenset.union, found, frozenset())] * len(eqn.outvars)
        known |= zip(eqn.outvars, found, strict=True)
    return [of(x) for x in jaxpr.outvars]


class Pullback(NamedTuple):
    """A function of lists of arrays that gives its outputs and what its pullback needs.

    What that needs is most often among the inputs, and is then not an output again.
    """

    fun: Callable[..., tuple[list[Any], list[Any]]]  # of flat inputs: outputs, what is to be kept
    kept: list[int | None]  # for each thing that is needed, which input it is
    structure: Any

    @classmethod
    def of(cls, fun: Callable[..., Any], inputs: Sequence[list[Any]], given: Sequence[int]):
        """`given`: the lists of which inputs will be at hand again."""
        program, (outputs, pullback) = jax.make_jaxpr(
            lambda *x: jax.vjp(fun, *x), return_shape=True
        )(*inputs)
        ends = list(itertools.accumulate(map(len, inputs)))
        again = [i for k in given for i in range(ends[k] - len(inputs[k]), ends[k])]
        where = {program.jaxpr.invars[i]: i for i in again}
        n = len(jax.tree.leaves(outputs))
        needed = program.jaxpr.outvars[n:]
        kept = [where.get(x) if isinstance(x, core.Var) else None for x in needed]
        run = core.jaxpr_as_fun(program)

        def both(*flat):
            found = run(*flat)
            return found[:n], [x for x, i in zip(found[n:], kept, strict=True) if i is None]

        return cls(both, kept, jax.tree.structure(pullback))

    def back(self, inputs: Sequence[Any], kept: Sequence[Any]) -> Callable[..., Any]:
        rest = iter(kept)
        needed = [next(rest) if i is None else inputs[i] for i in self.kept]
        return jax.tree.unflatten(self.structure, needed)
