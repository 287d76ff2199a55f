"""Training in steps: validations, metrics, checkpoints, a bar; goes on where it was stopped."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import optax
from common import loggers, mesh, plot
from common.run_folder import Checkpoints, OtherRun, RunOptions, clear
from tqdm import tqdm

import sumo_optax

# Steps between two looks at the loss.
LOOK_EVERY = 10


class State(NamedTuple):
    """What training changes."""

    params: Any
    optimizer: Any


# From the number of the step, from 1, the state and a batch: the next state and what to log of it.
Step = Callable[[int, State, Any], tuple[State, Mapping[str, jax.Array]]]


class Run(NamedTuple):
    """All that training needs, with nothing written yet."""

    out: Path
    options: RunOptions
    record: Mapping[str, Any]  # what makes this run this run, as JSON
    title: str
    tx: optax.GradientTransformation
    steps: int
    eval_every: int
    save_every: int
    units: tuple[int, str]  # of a step: 2048, "tokens"
    learning_rate: Callable[[int], Any]  # of a step, from 0
    batches: grain.DatasetIterator
    batch_sharding: jax.sharding.Sharding
    init: Callable[[], State]
    state: State  # shapes, dtypes and shardings of what `init` gives
    loss: Callable[..., jax.Array]  # of parameters and a batch
    compile: Callable[[], Step]
    validate: Callable[[Any], dict[str, float]]  # of parameters: its figures
    figures: Sequence[str]
    loss_unit: str
    write_tokenizer: Callable[[Path], None]


class Stopped(Exception):
    """A signal came before the end, and a checkpoint is written."""


def main(prepare: Callable[[], Run]) -> int:
    """Runs a program: 0 is success, 1 a failure, 2 something given that is wrong.

    128 + n is a stop by signal n, such as 130 by Ctrl-C.
    """
    run = None
    try:
        run = prepare()
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(run.state.params))
        print(f"{run.title}\n{count:,} parameters to train, {run.steps:,} steps\n")
        print(sumo_optax.describe(run.tx, run.state.params), end="\n\n")
        finish(run, *train(run))
    except (ValueError, TypeError, ImportError, OSError) as error:
        if run is not None and not isinstance(error, OSError | OtherRun):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if run is not None and isinstance(error, OSError) else 2
    except Stopped as stopped:
        number, out, step = stopped.args
        words = f"stopped by {number.name}; --resume --out {out} goes on from step {step}"
        print(words, file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def finish(run: Run, state: State, seconds: float, rows: loggers.Rows) -> None:
    """Draws the curves, and says how it went."""
    if not mesh.leads():
        return
    plot.plot_losses(rows, run.title, run.loss_unit, run.out / "loss.png")
    if set(plot.SUBSPACE) <= rows[-1].keys():
        plot.plot_subspace(rows, run.title, run.out / "subspace.png")
    (count, unit), last = run.units, {name: rows[-1][name] for name in run.figures}
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
    summary = {"steps": run.steps, unit: run.steps * count, "seconds": seconds, **last}
    summary |= {"state_bytes": state_bytes}
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    speed = f"{summary[unit] / seconds:,.0f} {unit}/s, {run.steps / seconds:.2f} steps/s"
    print(f"\ntrained for {seconds:,.0f} s: {summary[unit]:,} {unit}, {speed}")
    print(f"{told(last)} ({run.loss_unit}); optimizer state {state_bytes / 2**20:,.1f} MiB")
    print(f"{run.out}/: metrics.jsonl, summary.json, loss.png, checkpoints/{run.steps}")


def told(figures: Mapping[str, float]) -> str:
    """Figures in words."""
    return "  ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in figures.items())


def train(run: Run) -> tuple[State, float, loggers.Rows]:
    """Trains from the start or the last checkpoint; raises Stopped if a signal ends it.

    Gives the last state, the seconds spent on training alone, and the metrics, a row a step.
    """
    mesh.wait("all have looked at the folder, none has written")
    if mesh.leads() and run.options.overwrite:
        clear(run.out)
    mesh.wait("the folder is clear")
    with contextlib.closing(Checkpoints(run.out, run.record)) as checkpoints:
        restored = checkpoints.restore(run.state, run.batches) if run.options.resume else None
        if restored is not None:
            start, state, seconds = restored
            print(f"going on from step {start}")
        else:
            start, seconds = 0, 0.0
            shardings = jax.tree.map(lambda x: x.sharding, run.state)
            state = jax.jit(run.init, out_shardings=shardings)()
            if run.options.resume:
                print("no checkpoint yet: starting from step 0")
        if mesh.leads() and not start:  # they are whole before there is a checkpoint
            run.write_tokenizer(run.out / "tokenizer.json")
            (run.out / "config.json").write_text(json.dumps(run.record, indent=2) + "\n")
        with loggers.opened(run.options, run.out, run.record, start) as metrics, noted() as signals:
            last, state, seconds = loop(run, state, start, seconds, metrics, checkpoints, signals)
    if last != run.steps:
        raise Stopped(signals[0] if signals else signal.SIGTERM, run.out, last)
    return state, seconds, metrics.rows


def loop(
    run: Run,
    state: State,
    start: int,
    seconds: float,
    metrics: loggers.Metrics,
    checkpoints: Checkpoints,
    signals: Sequence[signal.Signals],
) -> tuple[int, State, float]:
    """The steps after `start` until the end or a signal: the last one, its state, the seconds."""
    train_step, pending, step, (count, unit) = run.compile(), [], start, run.units
    place = lambda x: jax.make_array_from_callback(x.shape, run.batch_sharding, x.__getitem__)
    numbers, begun = range(start + 1, run.steps + 1), time.perf_counter()
    for step in (bar := tqdm(numbers, initial=start, total=run.steps, unit="step", disable=None)):
        # Each process gives its own devices the rows they need.
        state, logged = train_step(step, state, jax.tree.map(place, next(run.batches)))
        pending.append((step, logged))
        validate = step % run.eval_every == 0 or step == run.steps
        stop = bool(signals) or checkpoints.manager.reached_preemption(step)
        save = step % run.save_every == 0 or step == run.steps or stop
        # To look at a loss is to wait for it: not after every step.
        if not (validate or save or step % LOOK_EVERY == 0):
            continue
        rows = [{"step": t} | {name: x.item() for name, x in seen.items()} for t, seen in pending]
        elapsed = time.perf_counter() - begun
        seconds += elapsed
        for row in rows:
            row["learning_rate"] = float(run.learning_rate(row["step"] - 1))
            row["step_seconds"] = round(elapsed / len(rows), 6)
            row[f"{unit}_per_second"] = round(len(rows) * count / elapsed, 1)
        bar.set_postfix_str(f"loss {rows[-1]['loss']:.3f}", refresh=False)
        if validate:
            found = run.validate(state.params)
            rows[-1] |= found | {"seconds": round(seconds, 3)}
            bar.write(f"step {step:>6}  {told(found)}")
        metrics.add(rows)
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
    before = {}

    def note(number: int, frame: object) -> None:
        seen.append(signal.Signals(number))
        restore()
        words = "a checkpoint after this step, then the end; once more ends at once"
        print(f"\n{seen[0].name}: {words}", file=sys.stderr)

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if jax.process_count() == 1:
        before = {x: signal.signal(x, note) for x in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        restore()
