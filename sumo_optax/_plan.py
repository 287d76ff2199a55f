"""What training a decoder will hold on each device, before any of it is made."""

import json
import math
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sumo_optax import _check
from sumo_optax._conventions import flax_dimension_numbers
from sumo_optax._decoder import Model, parameters
from sumo_optax._in_subspace import scale_in_subspace
from sumo_optax._mofasgd import mofasgd
from sumo_optax._online_subspace_descent import online_subspace_descent
from sumo_optax._paths import PyTree
from sumo_optax._report import in_words, table
from sumo_optax._sharding import abstract_state
from sumo_optax._sumo import sumo

MESH_AXES = ("data", "fsdp", "tensor")


def _preset(width: int, hidden: int, layers: int, heads: int, vocab: int = 32_000) -> Model:
    return Model(vocab, width, hidden, layers, heads, width, width)


# Those of examples/pretrain.py: a byte-level one, and GaLore's (arXiv 2403.03507, appendix C).
PRESETS = {
    "tiny": _preset(128, 344, 4, 4, vocab=256),
    "60m": _preset(512, 1376, 8, 8),
    "130m": _preset(768, 2048, 12, 12),
    "350m": _preset(1024, 2736, 24, 16),
    "1b": _preset(2048, 5461, 24, 32),
    "7b": _preset(4096, 11008, 32, 32),
}


LEGEND = (
    "of AdamW's: the state as a fraction of AdamW's.",
    "total: parameters, gradients and state, without activations and temporary arrays.",
    "fused: the peak of a training step with sumo_optax.value_and_update on one device, for one"
    " sequence of {tokens:,} tokens and for stacked, checkpointed layers. It counts parameters,"
    " state, the inputs of the layers, the gradient of the head, and the larger of these two: the"
    " logits, or the gradients, attention scores and update of one layer.",
    "projected: the gradients between two refreshes with sumo_optax.subspace_value_and_grad. SUMO"
    " accepts them with residual=None. The total counts whole gradients.",
)
WHOLE_POLAR_STEP = (
    'whole polar step: in a training step of T tokens, residual="orthogonal" of SUMO takes more'
    " operations than the default. Divided by those of the matrix products, they are"
    " {newton_schulz:,} / T with five Newton-Schulz steps and at most {exact:,} / T with the exact"
    " polar factor."
)


class Row(NamedTuple):
    """Bytes on one device with one optimizer."""

    optimizer: str
    parameters: int
    gradients: int
    projected: int | None  # gradients in the subspace, for those that can do with them
    state: int
    fused: int | None  # peak of a training step with `value_and_update`, on one device

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.state


class Plan(NamedTuple):
    """What `plan` returns: data by its fields, a table by `str`, JSON by `as_json`."""

    model: str
    parameters: int  # how many, all devices together
    dtype: str
    rank: int | float
    tokens: int  # of the sequence that `fused` is for
    mesh: dict[str, int]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # on how the model was read, and on what the mesh does not divide
    # Whose products take as many operations as the polar factors of whole matrices, by their kind.
    polar_tokens: dict[str, int] | None = None

    def __str__(self) -> str:
        legend = [line.format(tokens=self.tokens) for line in LEGEND]
        if self.polar_tokens is not None:
            legend.append(WHOLE_POLAR_STEP.format(**self.polar_tokens))
        return "\n\n".join((self._heading, self._table, *map(_wrapped, (*self.notes, *legend))))

    @property
    def _heading(self) -> str:
        devices, held = math.prod(self.mesh.values()), self.rows[0]
        mesh = ",".join(f"{name}={size}" for name, size in self.mesh.items())
        where = f"Each of {devices} devices ({mesh})" if devices > 1 else "One device"
        whole = isinstance(self.rank, int)
        rank = f"rank {self.rank}" if whole else f"a rank of {self.rank} of each short side"
        return "\n".join(
            (
                _wrapped(f"{self.model}: {self.parameters:,} parameters in {self.dtype}"),
                _wrapped(
                    f"{where} holds {in_words(held.parameters)} of parameters and"
                    f" {in_words(held.gradients)} of gradients. At {rank}:"
                ),
            )
        )

    @property
    def _table(self) -> str:
        header = ("optimizer", "state", "of AdamW's", "total", "fused", "projected")
        words = lambda x: "-" if x is None else in_words(x)
        rows = [
            (
                x.optimizer,
                words(x.state),
                f"{x.state / self.rows[0].state:.2f}",
                *map(words, (x.total, x.fused, x.projected)),
            )
            for x in self.rows
        ]
        return table([header, *rows])

    def as_json(self) -> str:
        rows = [{**x._asdict(), "total": x.total} for x in self.rows]
        return json.dumps({**self._asdict(), "rows": rows}, indent=2)


def _wrapped(text: str) -> str:
    """In lines of a terminal."""
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)


def plan(
    name: str,
    model: Model,
    *,
    rank: int | float,
    mesh: dict[str, int],
    dtype: str,
    state_dtype: str | None = None,
    tokens: int = 2048,
) -> Plan:
    """Bytes of parameters, gradients and optimizer state per device; nothing is allocated."""
    _check.integer("tokens", tokens, least=1)
    params = parameters(model, jnp.dtype(dtype))
    placed = None
    if math.prod(mesh.values()) > 1:
        types = (AxisType.Auto,) * len(mesh)
        placed = shardings(
            AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=types), params
        )
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
        )
    held = bytes_on_a_device(params)
    rows = []
    in_floats = optimizers(rank)
    state_of = lambda tx: (
        jax.eval_shape(tx.init, params) if placed is None else abstract_state(tx, params, placed)
    )
    for optimizer, tx in optimizers(rank, state_dtype).items():
        state = state_of(tx)
        # As many arrays, and as large ones, as a step works with.
        floats = state if state_dtype is None else state_of(in_floats[optimizer])
        projected = None
        if optimizer in PROJECTED:
            like_them = [optax.tree.get_all_with_path(floats, x) for x in PROJECTED[optimizer]]
            arrays = [x for found in like_them for _, tree in found for x in jax.tree.leaves(tree)]
            # They have the parameters' dtype, whatever the state's is.
            projected = bytes_on_a_device([x.update(dtype=jnp.dtype(dtype)) for x in arrays])
        kept = bytes_on_a_device(state)
        fused = None
        if placed is None:
            # Adam's update is made number by number, and needs no arrays.
            needed = 0 if optimizer == "AdamW" else bytes_of_an_update(model, floats)
            fused = held + kept + bytes_of_a_fused_step(model, params, tokens, needed)
        rows.append(Row(optimizer, held, held, projected, kept, fused))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    notes, polar_tokens = undivided(mesh, placed), tokens_of_whole_polar_steps(model, params)
    return Plan(name, count, dtype, rank, tokens, mesh, tuple(rows), notes, polar_tokens)


def undivided(mesh: dict[str, int], placed: PyTree) -> tuple[str, ...]:
    """What a user may not expect: axes of the mesh that divide few of the matrices, or none."""
    notes = []
    if mesh.get("data", 1) > 1:
        notes.append(
            "data: every device along this axis holds the same parameters, gradients and state."
        )
    for axis in ("fsdp", "tensor"):
        if mesh.get(axis, 1) == 1:
            continue
        kernels = [
            (jax.tree_util.keystr(path[:-1], simple=True, separator="/"), sharding.spec)
            for path, sharding in jax.tree.leaves_with_path(placed)
            if _is_table(path)
        ]
        whole = [name for name, spec in kernels if axis not in spec]
        if len(whole) == len(kernels):
            notes.append(
                f"{axis}={mesh[axis]} divides nothing: no matrix has a size that is a multiple of"
                f" {mesh[axis]}, so every device along this axis holds the same."
            )
        elif whole:
            notes.append(f"{axis}={mesh[axis]} does not divide {', '.join(whole)}.")
    return tuple(notes)


def tokens_of_whole_polar_steps(model: Model, params: PyTree) -> dict[str, int] | None:
    """How many tokens' products take as many operations as the polar factors of all matrices.

    A token takes 6 operations for each number of a matrix, forward and backward. The formulas are
    those of docs/which_optimizer.md. None with experts, of which a token does not see all.
    """
    if model.experts:
        return None
    leaves = jax.tree.leaves_with_path(params["layers"])
    kernels = [x.shape for path, x in leaves if path[-1].key == "kernel"]
    products = model.vocab * model.width + sum(math.prod(shape) for shape in kernels)
    newton_schulz = exact = 0
    for count, *sides in kernels:
        m, n = sorted(sides)
        newton_schulz += count * 5 * (4 * m**2 * n + 2 * m**3)
        exact += count * 7 * (4 * m**2 * n + 18 * m**3)
    in_tokens = lambda operations: math.ceil(operations / (6 * products))
    return {"newton_schulz": in_tokens(newton_schulz), "exact": in_tokens(exact)}


def bytes_of_a_fused_step(model: Model, params: PyTree, tokens: int, update: int) -> int:
    """What a step with `value_and_update` holds for a while, at the most, beside what it keeps.

    The layers' inputs are kept for the backward pass, and the head's gradient comes first and is
    used last. Attention is XLA's: scores and their gradient in float32, weights in the model's
    dtype. The compiler works out most of a layer's gradients and its update while these are there.
    """
    itemsize = params["norm"]["scale"].dtype.itemsize
    inputs = model.layers * tokens * model.width * itemsize
    head = model.vocab * model.width * itemsize
    logits = tokens * model.vocab * (4 + itemsize)
    gradients = bytes_on_a_device(params["layers"]) // model.layers
    scores = model.heads * tokens**2 * (4 + 4 + itemsize)
    return inputs + head + max(logits, gradients + scores + update)


def bytes_of_an_update(model: Model, state: PyTree) -> int:
    """Of a layer's matrices: about its state in float32, before and after."""
    leaves = jax.tree.leaves_with_path(state)
    of_layers = [x for path, x in leaves if "layers" in jax.tree_util.keystr(path)]
    return 2 * 4 * sum(math.prod(x.shape) for x in of_layers) // model.layers


# The names of state arrays that have the shapes of projected gradients, one array each; `mu` is
# Adam's, of the leaves that are no matrices too.
PROJECTED = {
    "GaLore": ("mu",),
    "SUMO": ("moment", "mu"),
    "MoFaSGD": ("basis", "row_basis", "mu"),
}


def optimizers(
    rank: int | float, state_dtype: str | None = None
) -> dict[str, optax.GradientTransformation]:
    """AdamW first; the others train embedding, head and norms with Adam."""
    galore = scale_in_subspace(optax.scale_by_adam(), rank, basis="svd", state_dtype=state_dtype)
    return {
        "AdamW": optax.adamw(1.0),
        "Muon": optax.contrib.muon(1.0, muon_weight_dimension_numbers=flax_dimension_numbers),
        "GaLore": optax.chain(galore, optax.scale_by_learning_rate(1.0)),
        "SUMO": sumo(1.0, rank, state_dtype=state_dtype),
        "Online Subspace Descent": online_subspace_descent(1.0, rank, state_dtype=state_dtype),
        "MoFaSGD": mofasgd(1.0, rank, state_dtype=state_dtype),
    }


def _is_table(path: jax.tree_util.KeyPath) -> bool:
    """Whether a leaf is a matrix or a stack of them, whatever the optimizer takes it for."""
    return path[-1].key in ("kernel", "embedding")


def shardings(mesh: AbstractMesh, params: PyTree) -> PyTree:
    """Matrices over `fsdp` and `tensor` along their last two axes, all else on every device.

    Projections that end a block split their inputs over `tensor`, the embedding its rows, and both
    their outputs over `fsdp`. An axis that the devices do not divide stays whole.
    """

    def sharding(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes: tuple[str | None, str | None] = ("fsdp", "tensor")
        if any(last in name for last in ("o_proj", "down_proj", "embed_tokens")):
            axes = ("tensor", "fsdp")
        entries: list[str | None] = [None] * len(x.shape)
        if _is_table(path):
            entries[-2:] = [
                a if a in mesh.shape and size % mesh.shape[a] == 0 else None
                for a, size in zip(axes, x.shape[-2:], strict=True)
            ]
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map_with_path(sharding, params)


def bytes_on_a_device(tree: PyTree) -> int:
    """Of arrays or shapes; all of an array that has no sharding."""
    shape = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,fsdp=4` as sizes by name."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh takes data=N,fsdp=N,tensor=N, any of them, each N at least 1, got {text!r}"
            )
        sizes[name] = int(size)
    return sizes
