"""Pre-trains a LLaMA-style language model with any optimizer of sumo_optax or optax.

python examples/pretrain.py
python examples/pretrain.py --optimizer adamw --data my_folder --tokenizer bpe:8192
python examples/pretrain.py --preset 60m --data hf:allenai/c4 --tokenizer bpe:32000 --scan-layers
"""

import dataclasses
import math
import os
import sys
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

# LAPACK's threads and XLA's wait for each other; must be said before LAPACK is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import mesh, optimizers, options, run_folder, text, training
from common.llama import PRESETS, Llama, LlamaConfig
from common.training import State
from flax import nnx

import sumo_optax


@dataclasses.dataclass(frozen=True)
class Model(LlamaConfig):
    """What is trained, and for how long."""

    # The model whose shape, length, batch and steps are the defaults.
    preset: Literal["tiny", "60m", "130m", "350m", "1b", "7b"] = "tiny"


@dataclasses.dataclass(frozen=True)
class Optimizer(optimizers.Options):
    """What trains it."""

    subspace_gradients: bool = False  # Take whole ones at refreshes alone: sumo, mofasgd.
    fused: bool = False  # Update layers in the backward pass; clip by the norm of the step before.
    log_subspace: bool = False  # Log at every step how the subspaces are doing; draw it at the end.


class Config(NamedTuple):
    """Pre-train a LLaMA-style language model."""

    model: Model
    optimizer: Optimizer = Optimizer()
    data: text.Options = text.Options()
    devices: mesh.Options = mesh.Options()
    output: run_folder.Options = run_folder.Options()


# Those that read no more than projected gradients between refreshes, and the form in which they do.
SUBSPACE_GRADIENTS: dict[str, dict[str, Any]] = {
    "sumo": {"basis": "randomized_svd", "side": "long", "residual": None, "refresh_every": 200},
    "mofasgd": {},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; its exit codes are those of `training.main`."""
    return training.main(lambda: prepare(parse(argv)))


def parse(argv: Sequence[str] | None) -> Any:
    """The options; what the command line leaves out is the preset's."""
    model = Model(**vars(PRESETS["tiny"]))
    given, _ = options.parse(Model, argv, default=model, add_help=False, return_unknown_args=True)
    model = Model(**vars(PRESETS[given.preset]), preset=given.preset)
    return options.flat(options.parse(Config, argv, default=Config(model)))


class Pretraining(training.Run):
    """A LLaMA that learns to foresee the next token of each in a window."""

    def __init__(self, config: Any):
        self.config, self.steps, self.every = config, config.steps, math.ceil(config.steps / 10)
        self.out = run_folder.choose(config, f"{config.preset}-{config.optimizer}")
        mesh.join(config.coordinator, config.processes, config.process)
        self.arguments, self.tx = optimizer(config)
        tokenizer, self.batches, self.validation = text.load(config, self.out / "tokenizer.json")
        self.write_tokenizer, config.vocab = tokenizer.write, tokenizer.vocab
        self.create = lambda: Llama(config, nnx.Rngs(config.seed))
        self.graph = nnx.graphdef(nnx.eval_shape(self.create))
        self.validation_loss = jax.jit(self.loss)
        self.units = config.batch * config.length, "tokens"
        devices = mesh.parse(config.mesh)
        shares = devices.shape["data"] * devices.shape["fsdp"]
        if config.batch % shares:
            wanted = f"--batch must be a multiple of data x fsdp, {shares}"
            raise ValueError(f"{wanted}, got {config.batch}")
        params = jax.eval_shape(self.params)
        self.state = State(*mesh.abstract_state(devices, self.tx, params))
        checksum = {"validation checksum": zlib.crc32(self.validation.tobytes())}
        self.record = run_folder.record(config, self.arguments | checksum)

    def params(self) -> Any:
        return nnx.to_pure_dict(nnx.state(self.create(), nnx.Param))

    def loss(self, params: Any, windows: jax.Array) -> jax.Array:
        """The mean over all tokens, in nats."""
        logits = nnx.merge(self.graph, params)(windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    def validate(self, params: Any) -> dict[str, float]:
        held_out, batch = self.validation, self.config.batch
        parts = [held_out[i : i + batch] for i in range(0, len(held_out), batch)]
        total = sum(len(part) * float(self.validation_loss(params, part)) for part in parts)
        return {"validation_loss": total / len(held_out)}

    def compile(self) -> training.Step:
        """A step; of two kinds, where most of them need no whole gradient."""
        config, lies = self.config, mesh.batch_sharding(self.state)
        shape = (config.batch, config.length + 1)
        windows = jax.ShapeDtypeStruct(shape, np.int32, sharding=lies)
        out = jax.tree.map(lambda x: x.sharding, self.state), None
        jitted = jax.jit(self.update, donate_argnums=0, static_argnums=2, out_shardings=out)
        kinds = (True, False) if config.subspace_gradients else (True,)
        steps = {full: jitted.lower(self.state, windows, full).compile() for full in kinds}
        # Without refreshes the first gradient alone is whole.
        every = self.arguments.get("refresh_every", config.steps) if len(kinds) > 1 else 1
        return lambda number, *given: steps[(number - 1) % every == 0](*given)

    def update(self, state: State, windows: jax.Array, full: bool) -> tuple[State, training.Logged]:
        params, held = state
        if self.config.fused:
            step = sumo_optax.value_and_update(self.loss, self.tx)
            loss, *new = step(params, held, windows)
            # Gradients are never there together; clipping has their norm.
            logged = {"loss": loss, "gradient_norm": jnp.sqrt(optax.tree.get(new[1], "squared"))}
            state = State(*new)
        else:
            value_and_grad = sumo_optax.subspace_value_and_grad(self.loss)
            state, logged = self.updated(state, *value_and_grad(params, held, windows, full=full))
        if self.config.log_subspace:
            logged |= sumo_optax.subspace_metrics(state.optimizer).summary
        return state, logged


prepare = Pretraining


def optimizer(config: Any) -> tuple[dict[str, Any], optax.GradientTransformation]:
    """The optimizer's arguments, and the optimizer with the clipping that the step can do."""
    name, projected = config.optimizer, config.subspace_gradients
    if projected and (config.fused or config.log_subspace):
        raise ValueError("--subspace-gradients goes with neither --fused nor --log-subspace")
    if projected and name not in SUBSPACE_GRADIENTS:
        raise ValueError(
            f"{name} has no --subspace-gradients; {' and '.join(SUBSPACE_GRADIENTS)} have"
        )
    if config.fused and name == "galore":
        raise ValueError("galore of optax fails on a layer without matrices; leave out --fused")
    if config.log_subspace and name in optimizers.OPTAX:
        raise ValueError(f"{name} has no subspace to log; leave out --log-subspace")
    known = {"rank": max(1, config.width // 4), **(SUBSPACE_GRADIENTS[name] if projected else {})}
    arguments = optimizers.complete(config, known)
    # Updates inside the backward pass: no norm is known before the last gradient is gone.
    clip = sumo_optax.clip_by_last_norm if config.fused else optax.clip_by_global_norm
    metrics = {"metrics": True} if config.log_subspace else {}
    return arguments, optimizers.create(name, config.steps, arguments | metrics, clip)


if __name__ == "__main__":
    sys.exit(main())
