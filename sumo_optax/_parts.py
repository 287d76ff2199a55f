"""Parameters and their state in parts, each of which an optimizer may update by itself."""

import dataclasses
import re
from collections.abc import Container, Sequence
from typing import Any, NoReturn

import jax
import optax

from sumo_optax._last_norm import LastNormState
from sumo_optax._paths import Path, PyTree, Whole, leaves_of, parts_of, path_string
from sumo_optax._program import sources

Arrays = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which leaves of parameters and state are updated together.

    A leaf of the state belongs to the parameter in whose path its own path ends, or is shared: a
    counter or a hyperparameter. Part 0 is updated last, and its update of what is shared counts.
    """

    tx: optax.GradientTransformationExtraArgs
    whole: Whole
    members: dict[int, list[int]]  # of each part: leaves of the parameters
    treedef: Any  # of the parameters
    state: Arrays
    state_def: Any
    owners: list[int | None]  # of each leaf of the state: a leaf of the parameters
    sums: list[bool]  # of each leaf of the state: whether it is a sum over all gradients
    counts: list[bool]  # whether every update adds to it

    @classmethod
    def of(cls, tx: Any, params: PyTree, state: PyTree, numbers: dict[Path, int]):
        members: dict[int, list[int]] = {0: []}
        for i, part in enumerate(numbers.values()):
            members.setdefault(part, []).append(i)
        index = {path: i for i, path in enumerate(numbers)}
        named, state_def = leaves_of(state), jax.tree.structure(state)
        # The longest path of a parameter that a path in the state ends in.
        ends = lambda path: (index.get(path[k:]) for k in range(len(path)))
        owner = lambda path: next((i for i in ends(path) if i is not None), None)
        is_sum = lambda x: isinstance(x, LastNormState)
        sums = jax.tree.map(lambda x: jax.tree.map(lambda _: is_sum(x), x), state, is_leaf=is_sum)
        return cls(
            tx,
            Whole(params, numbers),
            members,
            jax.tree.structure(params),
            [x.value for x in named],
            state_def,
            [owner(x.path) for x in named],
            jax.tree.leaves(sums),
            [x.path[-1:] == ("skipped",) for x in named],
        )

    @property
    def inside(self) -> list[int]:
        """Parts that are updated inside the backward pass."""
        return [part for part in self.members if part]

    @property
    def shared(self) -> Arrays:
        return [x for x, i in zip(self.state, self.owners, strict=True) if i is None]

    def held(self, part: int) -> Arrays:
        """The state of a part's leaves."""
        own = set(self.members[part])
        return [x for x, i in zip(self.state, self.owners, strict=True) if i in own]

    def update(
        self, part: int, grads: Arrays, values: Arrays, held: Arrays, shared: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        """New values, new state, and the new state of what all parts share."""
        own = set(self.members[part])
        leaves = range(self.treedef.num_leaves)
        masked = lambda arrays: self.treedef.unflatten(_filled(leaves, own, arrays))
        common = iter(shared)
        state = [
            next(common) if i is None else x
            for i, x in zip(self.owners, _filled(self.owners, own, held), strict=True)
        ]
        params = masked(values)
        with parts_of(self.whole):
            updates, new = self.tx.update(masked(grads), self.state_def.unflatten(state), params)
        owners = [i for i in self.owners if i is None or i in own]
        new = list(zip(owners, jax.tree.leaves(new), strict=True))
        new_held = [x for i, x in new if i is not None]
        new_held = [x.astype(old.dtype) for x, old in zip(new_held, held, strict=True)]
        new_values = jax.tree.leaves(optax.apply_updates(params, updates))
        return new_values, new_held, [x for i, x in new if i is None]

    def check_stacked(self, loops: Container[int]) -> None:
        """A loop takes the state of its layers apart like the layers."""
        leaves = jax.tree.leaves(self.whole.params)
        for x, i in zip(self.state, self.owners, strict=True):
            if i is not None and i in loops and x.shape[:1] != (shape := leaves[i].shape)[:1]:
                raise ValueError(
                    f"the state of {self._name(i)}, of shape {shape}, has shape {x.shape}: it is"
                    " not stacked like the layers, and so cannot be updated layer by layer"
                )

    def adding(self) -> list[int]:
        """Which of what is shared every part adds to; ValueError if parts depend on each other."""
        if not self.inside:
            return []
        leaves = jax.tree.leaves(self.whole.params)
        state = self.state_def.unflatten(self.state)
        with parts_of(self.whole):
            program = jax.make_jaxpr(self.tx.update)(self.whole.params, state, self.whole.params)
        own = [frozenset([i]) for i in range(len(leaves))]
        nothing = [frozenset()] * (len(program.jaxpr.invars) - len(leaves))
        found = sources(program.jaxpr, own + nothing)
        part = list(self.whole.parts.values())
        shared = []
        outputs = [*leaves, *self.state]
        owners = [*range(len(leaves)), *self.owners]
        adds = [a or b for a, b in zip(self.sums, self.counts, strict=True)]
        adds = [*[False] * len(leaves), *adds]
        for x, i, may_add, seen in zip(outputs, owners, adds, found, strict=True):
            if i is not None:
                others = [k for k in seen if part[k] != part[i]]
                if others:
                    self._refuse(f"the update of {self._name(i)}", min(others))
                continue
            if seen and not may_add:
                self._refuse(f"a state of shape {x.shape}", min(seen))
            shared.append(bool(seen))
        return [k for k, seen in enumerate(shared) if seen]

    def _refuse(self, what: str, other: int) -> NoReturn:
        raise ValueError(
            f"{what} depends on the gradient of {self._name(other)}, which does not exist at the"
            " same time: transformations such as clip_by_global_norm need all gradients at once."
            " SUMO's step does not depend on the gradient's size; sumo_optax.clip_by_last_norm"
            " clips by the norm of the previous step"
        )

    def state_of(self, held: dict[int, Arrays], shared: Arrays) -> PyTree:
        """The whole state, from that of the parts and from what they share."""
        part = list(self.whole.parts.values())
        each = {number: iter(arrays) for number, arrays in held.items()}
        common = iter(shared)
        leaves = [next(common) if i is None else next(each[part[i]]) for i in self.owners]
        return self.state_def.unflatten(leaves)

    def _name(self, i: int) -> str:
        return path_string(list(self.whole.parts)[i])


def _filled(owners: Sequence[int | None], own: set[int], arrays: Arrays) -> list[Any]:
    """Arrays in the place of what belongs to a part; nothing in that of all else."""
    each = iter(arrays)
    return [next(each) if i in own else optax.MaskedNode() for i in owners]


def numbers_of_parts(paths: list[Path], loops: dict[int, int]) -> dict[Path, int]:
    """0 for what is updated last; leaves of one loop, or of one layer, have a number in common."""
    names: dict[Any, int] = {}
    number = lambda name: names.setdefault(name, len(names) + 1)
    parts = {}
    for i, path in enumerate(paths):
        depth = next((k for k, name in enumerate(path) if re.search(r"\d", name)), None)
        if i in loops:
            parts[path] = number(loops[i])
        else:
            parts[path] = 0 if depth is None else number(path[: depth + 1])
    return parts
