"""The loop that every training here runs: step, log, evaluate, checkpoint, resume.

A step depends on the state and the step number alone (data and noise are derived from the number), so a run that is
killed and resumed from its last checkpoint continues as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from toprovar_jax.checkpoint import Checkpoints
from toprovar_jax.training.metrics import MetricsTable, speed
from toprovar_jax.training.plots import can_draw, draw_curves
from toprovar_jax.training.progress import Progress
from toprovar_jax.training.record import keep_record

State = Any
Metrics = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to write.

    Attributes:
      directory: checkpoints, ``metrics.csv``, ``curves.png`` and ``recipe.json`` go here.
      num_steps: where training ends; learning-rate schedules refer to it.
      checkpoint_minutes: time between checkpoints.
      log_every, evaluate_every: in steps.
      recipe: what the run is made with, a dataclass or mapping of what JSON can hold. Written beside the checkpoints
        together with ``num_steps``; a folder with another one is refused. None keeps no record.
      images_per_step, flops_per_step: for the throughput; 0 leaves it out.
    """

    directory: Path
    num_steps: int
    checkpoint_minutes: float = 3.0
    log_every: int = 20
    evaluate_every: int = 200
    recipe: Any = None
    images_per_step: int = 0
    flops_per_step: float = 0.0


class Stopped(SystemExit):
    """A signal asked the run to end: its state is saved. Not caught, it ends the program with the signal's status."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def run(
    state: State,
    step_fn: Callable[[State, int], tuple[State, Metrics]],
    config: LoopConfig,
    *,
    evaluate: Callable[[State, int], Mapping[str, float]] | None = None,
    report: Callable[[str], None] = print,
) -> State:
    """Train from the newest checkpoint in ``config.directory``, or from ``state``, to ``config.num_steps``.

    SIGTERM and SIGINT end the run after the step at hand, with a checkpoint; a second one ends it at once.

    Args:
      state: initial state, a pytree of arrays; a checkpoint is restored onto its devices.
      step_fn: ``(state, step) -> (state, metrics)``; the old state may be donated.
      config: lengths and places.
      evaluate: called with the state every so often; its numbers are logged beside the metrics.
      report: receives lines; on a terminal a bar shows the rest.

    Raises:
      UserInputError: the folder's checkpoints were made with another recipe.
      FloatingPointError: the loss is no longer finite.
      Stopped: a signal came.
    """
    directory = Path(config.directory)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / "checkpoints")
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        start = checkpoints.latest_step or 0
        if config.recipe is not None:
            keep_record(directory, {"num_steps": config.num_steps, "recipe": config.recipe}, resumed=start > 0)
        if start:
            state = checkpoints.restore(state)
            report(f"resumed at step {start} of {config.num_steps}")
        log = stack.enter_context(_log(config, state, start, report))
        caught = stack.enter_context(_signals())
        since_save = time.monotonic()
        for step in range(start, config.num_steps):
            state, metrics = step_fn(state, step)
            done = step + 1
            last = done == config.num_steps
            log.progress.advance()
            if done % config.log_every == 0 or last:
                log.train(done, metrics)
            if evaluate is not None and (done % config.evaluate_every == 0 or last):
                log.evaluate(done, evaluate(state, done))
            if caught or last or time.monotonic() - since_save > 60 * config.checkpoint_minutes:
                # A checkpoint that is not finite would be resumed from for ever.
                check_finite(done, jax.device_get(dict(metrics)))
                checkpoints.save(done, state)
                since_save = time.monotonic()
                log.pause(done)
            if caught:
                name = signal.Signals(caught[0]).name
                log.progress.line(f"stopped by {name} after step {done}; the same command goes on from there")
                raise Stopped(caught[0])
    return state


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
    """Raises FloatingPointError if the loss or the gradient's norm of a step is not finite."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(float(metrics.get(name, 0.0))):
            raise FloatingPointError(f"{name} {float(metrics[name])} at step {step}: lower the learning rate")


class _Log:
    """Table, curves and progress of one run."""

    def __init__(self, config: LoopConfig, state: State, start: int, report: Callable[[str], None]):
        self.config = config
        self.table = MetricsTable(Path(config.directory) / "metrics.csv", start)
        self.progress = Progress(start, config.num_steps, config.images_per_step, report)
        # An abstract or empty state has no devices.
        arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
        self.devices = sorted(arrays[0].devices(), key=lambda d: d.id) if arrays else jax.devices()[:1]
        self.draws = can_draw()
        if not self.draws:
            self.progress.line("no curves will be drawn: matplotlib is missing; install toprovar-jax[demo] for them")
        self.pause(start)

    def train(self, step: int, metrics: Metrics) -> None:
        # Fetching the numbers waits for the device, so the clock is read afterwards.
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        check_finite(step, values)
        if step > self.step:
            seconds = (time.monotonic() - self.since) / (step - self.step)
            options = {"images": self.config.images_per_step, "flops": self.config.flops_per_step}
            values |= speed(max(seconds, 1e-9), devices=self.devices, **options)
        self._write("train", step, values)
        self.pause(step)

    def evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._write("evaluate", step, values)
        if self.draws:
            draw_curves(self.table.path, self.table.path.with_name("curves.png"))
        self.pause(step)

    def pause(self, step: int) -> None:
        """Measure speed from here: what has just been done was no training."""
        self.step, self.since = step, time.monotonic()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.table.write(kind, step, values)
        self.progress.log(kind, step, values)


@contextlib.contextmanager
def _log(config: LoopConfig, state: State, start: int, report: Callable[[str], None]) -> Iterator[_Log]:
    log = _Log(config, state, start, report)
    try:
        yield log
    finally:
        log.progress.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that receives the number of a SIGTERM or SIGINT; the second one of a kind acts as it did before."""
    caught: list[int] = []
    # Python lets only the main thread handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
