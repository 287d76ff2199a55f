"""Training in steps: validations, metrics, checkpoints, a bar; goes on where it was stopped."""

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import optax
from common import mesh, metrics, optimizers
from common.run_folder import Checkpoints, OtherRun
from tqdm import tqdm

import sumo_optax

# Steps between two looks at the loss.
LOOK_EVERY = 10


class State(NamedTuple):
    """What training changes."""

    params: Any
    optimizer: Any


Logged = dict[str, jax.Array]
# From the number of the step, from 1, the state and a batch: the next state and what to log of it.
Step = Callable[[int, State, Any], tuple[State, Logged]]
Place = tuple[int, State, float]  # the number of the step, after it, and the seconds of training


class Run(Protocol):
    """All that training needs, with nothing written yet."""

    config: Any  # the program's options
    out: Path
    record: Mapping[str, Any]  # what makes this run this run, as JSON
    tx: optax.GradientTransformation
    steps: int
    every: int  # steps between two validations, and two checkpoints, if none are given
    units: tuple[int, str]  # of a step: 2048, "tokens"
    batches: Any  # an iterator with get_state and set_state, as those of grain
    state: State  # shapes, dtypes and shardings of what `init` gives
    write_tokenizer: Callable[[Path], None]

    def params(self) -> Any: ...  # at first
    def compile(self) -> Step: ...
    def validate(self, params: Any) -> dict[str, float]: ...  # all its figures

    def init(self) -> State:
        params = self.params()
        return State(params, self.tx.init(params))

    def updated(self, state: State, loss: jax.Array, gradients: Any) -> tuple[State, Logged]:
        """The state after a step, and what to log of it."""
        updates, optimizer = self.tx.update(gradients, state.optimizer, state.params)
        logged = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return State(optax.apply_updates(state.params, updates), optimizer), logged


told = lambda figures: "  ".join(f"{x.replace('_', ' ')} {y:.4f}" for x, y in figures.items())


def main(prepare: Callable[[], Run]) -> int:
    """Runs a program: 0 is success, 1 a failure, 2 something given that is wrong.

    128 + n is a stop by signal n, such as 130 by Ctrl-C.
    """
    run = None
    try:
        run = prepare()
        count = sum(x.size for x in jax.tree.leaves(run.state.params))
        print(f"{run.out}: {count:,} parameters to train, {run.steps:,} steps\n")
        print(sumo_optax.describe(run.tx, run.state.params), end="\n\n")
        return train(run)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if run is not None and not isinstance(error, OSError | OtherRun):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if run is not None and isinstance(error, OSError) else 2
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


def finish(run: Run, state: State, seconds: float, rows: metrics.Rows) -> None:
    """Draws the curves, and says how it went."""
    if not mesh.leads():
        return
    metrics.plot(rows, run.out / "loss.png")
    (size, unit), names = run.units, list(rows[-1])
    last = {name: rows[-1][name] for name in names[names.index("validation_loss") : -1]}
    state_bytes, count = sum(x.nbytes for x in jax.tree.leaves(state.optimizer)), run.steps * size
    summary = {"steps": run.steps, unit: count, "seconds": seconds, "state_bytes": state_bytes}
    (run.out / "summary.json").write_text(json.dumps(summary | last, indent=2) + "\n")
    print(f"\n{count:,} {unit} in {seconds:,.0f} s, {count / seconds:,.0f} {unit}/s")
    print(f"{told(last)}; optimizer state {state_bytes / 2**20:,.1f} MiB")
    print(f"{run.out}/: metrics.jsonl, summary.json, loss.png, checkpoints/{run.steps}")


def train(run: Run) -> int:
    """Trains from the start or the last checkpoint until the end or a signal; see `main`."""
    mesh.wait("all have looked at the folder, none has written")
    if mesh.leads() and run.config.overwrite:
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
        for name in ("metrics.jsonl", "tokenizer.json", "wandb.txt"):
            (run.out / name).unlink(missing_ok=True)
    mesh.wait("the folder is clear")
    with contextlib.closing(Checkpoints(run.out, run.record)) as checkpoints:
        restored = checkpoints.restore(run.state, run.batches) if run.config.resume else None
        shardings = jax.tree.map(lambda x: x.sharding, run.state)
        init = jax.jit(run.init, out_shardings=shardings)
        at = restored or (0, init(), 0.0)
        if run.config.resume:
            going_on = f"going on from step {at[0]}"
            print(going_on if restored else "no checkpoint yet: starting from step 0")
        # A checkpoint comes later: who finds one finds these whole.
        if mesh.leads() and not restored:
            run.write_tokenizer(run.out / "tokenizer.json")
            (run.out / "config.json").write_text(json.dumps(run.record, indent=2) + "\n")
        log = metrics.Metrics(run.out, at[0], run.config, run.record)
        with log, noted() as signals:
            step, state, seconds = loop(run, at, log, checkpoints, signals)
    if step == run.steps:
        finish(run, state, seconds, log.rows)
        return 0
    stopped = signals[0] if signals else signal.SIGTERM
    words = f"stopped by {stopped.name}; --resume --out {run.out} goes on from step {step}"
    print(words, file=sys.stderr)
    return 128 + stopped


def loop(
    run: Run, at: Place, log: metrics.Metrics, checkpoints: Checkpoints, signals: Sequence[int]
) -> Place:
    """The steps after a place, until the end or a signal."""
    step, state, seconds = at
    train_step, pending, (size, unit) = run.compile(), [], run.units
    is_due = lambda every: step % (every or run.every) == 0 or step == run.steps
    rate: Any = optimizers.schedule(run.record["learning_rate"], run.steps)
    sharding = mesh.batch_sharding(run.state)
    # Each process gives its own devices the rows they need.
    place = lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    numbers = range(step + 1, run.steps + 1)
    bar = tqdm(numbers, initial=step, total=run.steps, unit="step", disable=None)
    begun = time.perf_counter()
    for step in bar:
        state, logged = train_step(step, state, jax.tree.map(place, next(run.batches)))
        pending.append((step, logged))
        stop = bool(signals) or checkpoints.manager.reached_preemption(step)
        validate, save = is_due(run.config.eval_every), is_due(run.config.save_every) or stop
        # To look at a loss is to wait for it: not after every step.
        if not (validate or save or step % LOOK_EVERY == 0):
            continue
        rows = [{"step": t} | {name: x.item() for name, x in seen.items()} for t, seen in pending]
        elapsed = time.perf_counter() - begun
        seconds += elapsed
        speeds = {"step_seconds": round(elapsed / len(rows), 6)}
        speeds[f"{unit}_per_second"] = round(len(rows) * size / elapsed, 1)
        for row in rows:
            row |= {"learning_rate": rate(row["step"] - 1).item()} | speeds
        bar.set_postfix_str(f"loss {rows[-1]['loss']:.3f}", refresh=False)
        if validate:
            found = run.validate(state.params)
            rows[-1] |= found | {"seconds": round(seconds, 3)}
            bar.write(f"step {step:>6}  {told(found)}")
        log.add(rows)
        if save:
            checkpoints.save(step, state, run.batches, seconds)
        if stop:
            break
        pending, begun = [], time.perf_counter()
    bar.close()
    return step, state, seconds


@contextlib.contextmanager
def noted() -> Iterator[list[signal.Signals]]:
    """A list that the first Ctrl-C or SIGTERM is put on; a second one acts as it always does.

    Of several processes JAX takes SIGTERM, since all must stop after the same step.
    """
    seen: list[signal.Signals] = []
    ours = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
    with contextlib.ExitStack() as before:

        def note(number: int, frame: object) -> None:
            before.close()
            seen.append(signal.Signals(number))
            words = "a checkpoint after this step, then the end; once more ends at once"
            print(f"\n{seen[0].name}: {words}", file=sys.stderr)

        for number in ours:
            before.callback(signal.signal, number, signal.signal(number, note))
        yield seen
