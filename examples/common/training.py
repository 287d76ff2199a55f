"""Training in steps: validations, metrics, checkpoints, a bar; goes on where it was stopped."""

import itertools
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from common import processes, run_folder, stopping
from common.loggers import Log
from jax.typing import ArrayLike
from tqdm import tqdm

# Steps between two looks at the loss.
LOOK_EVERY = 10
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} < {remaining}{postfix}"

Batch = Any  # tree of arrays


class State(NamedTuple):
    """What training changes."""

    params: Any
    optimizer: Any


# From the number of the step, from 1, the state and a batch: the next state and what to log of it.
Step = Callable[[int, State, Batch], tuple[State, Mapping[str, jax.Array]]]


class Run(NamedTuple):
    """All that training needs, with nothing written yet."""

    out: Path
    record: Mapping[str, Any]  # what makes this run this run, as JSON
    resume: bool
    overwrite: bool
    steps: int
    eval_every: int
    save_every: int
    units: tuple[int, str]  # of a step: 2048, "tokens"
    learning_rates: Sequence[float]  # of all steps
    batches: grain.DatasetIterator
    batch_sharding: jax.sharding.Sharding | None  # on a mesh
    init: Callable[[], State]
    state: State  # shapes, dtypes and shardings of what `init` gives
    compile: Callable[[], Step]
    validate: Callable[[Any], dict[str, float]]  # of the parameters
    tell: Callable[[int, Mapping[str, float]], str]  # what a validation after a step has found
    write_tokenizer: Callable[[Path], None]
    # Of the steps after the one given.
    loggers: Callable[[int], AbstractContextManager[Sequence[Log]]]

    @property
    def shardings(self) -> State | None:
        """Of the state, on a mesh."""
        if self.batch_sharding is None:
            return None
        return jax.tree.map(lambda x: x.sharding, self.state)


def on_one_device(state: State) -> State:
    """Shapes and dtypes of a state, and that one device of this process holds it."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


class Trained(NamedTuple):
    """What training leaves."""

    state: State
    seconds: float  # spent on training alone
    rows: list[dict[str, Any]]  # of the metrics, one a step


class Stopped(Exception):
    """A signal came before the end."""

    def __init__(self, number: signal.Signals, out: Path, last: int):
        self.signal = number
        super().__init__(f"stopped by {number.name}; --resume --out {out} goes on from step {last}")


def look(run: Run) -> None:
    """The last refusals before anything is written: a folder of another run, or none."""
    if run.resume:
        run_folder.check_same(run.out, run.record)
        run_folder.Checkpoints(run.out).check_shapes(run.state)
    processes.wait("all have looked at the folder, none has written")
    run.out.mkdir(parents=True, exist_ok=True)


def train(run: Run) -> Trained:
    """Trains from the start or the last checkpoint; raises Stopped if a signal ends it."""
    if run.overwrite and processes.leads():
        run_folder.clear(run.out)
    processes.wait("the folder is clear")
    if processes.leads() and not (run.resume and (run.out / "config.json").exists()):
        # The configuration comes last of these, the checkpoints' folder after it: see `check_same`.
        with run_folder.whole(run.out / "tokenizer.json") as part:
            run.write_tokenizer(part)
        with run_folder.whole(run.out / "config.json") as part:
            part.write_text(json.dumps(run.record, indent=2) + "\n")
    checkpoints = run_folder.Checkpoints(run.out)
    restored = checkpoints.restore(run.state, run.batches) if run.resume else None
    if restored is None:
        start, seconds = 0, 0.0
        state = jax.jit(run.init, out_shardings=run.shardings)()
    else:
        start, state, seconds = restored
    if run.resume:
        print(f"going on from step {start}" if start else "no checkpoint yet: starting from step 0")
    metrics = run_folder.Metrics(run.out / "metrics.jsonl", start)
    with stopping.noted() as signals, run.loggers(start) as logs:
        writers = (metrics.add, *logs)
        try:
            state, step, seconds = loop(run, state, start, seconds, writers, checkpoints, signals)
        except KeyboardInterrupt:
            signals.append(signal.SIGINT)
            step = None
        checkpoints.close()
    if step != run.steps:
        last = max(checkpoints.steps(), default=0)
        raise Stopped(signals[0] if signals else signal.SIGTERM, run.out, last)
    return Trained(state, seconds, metrics.rows)


def loop(
    run: Run,
    state: State,
    start: int,
    seconds: float,
    writers: Sequence[Log],
    checkpoints: run_folder.Checkpoints,
    signals: Sequence[signal.Signals],
) -> tuple[State, int, float]:
    """The steps after `start` until the end or a signal.

    Gives the last state, its step and the seconds spent on training alone.
    """
    train_step = run.compile()
    pending, step = [], start
    begun = time.perf_counter()
    with tqdm(
        total=run.steps,
        initial=start,
        disable=None,
        unit="step",
        dynamic_ncols=True,
        bar_format=BAR,
    ) as bar:
        for step in range(start + 1, run.steps + 1):
            state, logged = train_step(step, state, shared(next(run.batches), run.batch_sharding))
            pending.append(logged)
            validate = step % run.eval_every == 0 or step == run.steps
            stop = bool(signals) or checkpoints.manager.reached_preemption(step)
            save = step % run.save_every == 0 or step == run.steps or stop
            # To look at a loss is to wait for it: not after every step.
            if not (validate or save or step % LOOK_EVERY == 0):
                continue
            numbers = itertools.count(step - len(pending) + 1)
            rows = [
                {"step": number} | {name: x.item() for name, x in logged.items()}
                for number, logged in zip(numbers, pending, strict=False)
            ]
            elapsed = time.perf_counter() - begun
            seconds += elapsed
            count, unit = run.units
            speed = len(rows) * count / elapsed
            for row in rows:
                row["learning_rate"] = run.learning_rates[row["step"] - 1]
                row["step_seconds"] = round(elapsed / len(rows), 6)
                row[f"{unit}_per_second"] = round(speed, 1)
            bar.set_postfix_str(
                f"loss {rows[-1]['loss']:.3f}, {speed:,.0f} {unit}/s", refresh=False
            )
            bar.update(len(rows))
            if validate:
                found = run.validate(state.params)
                rows[-1] |= found | {"seconds": round(seconds, 3)}
                bar.write(run.tell(step, found))
            for write in writers:
                write(rows)
            if save:
                checkpoints.save(step, state, run.batches, seconds)
            if stop:
                break
            pending = []
            begun = time.perf_counter()
    return state, step, seconds


def shared(batch: Batch, sharding: jax.sharding.Sharding | None) -> Batch:
    """The batch on its devices: each process gives its own the rows they need."""
    if sharding is None:
        return batch

    def place(x: np.ndarray) -> ArrayLike:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)
