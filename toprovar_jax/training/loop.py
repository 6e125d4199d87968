"""The loop that every training here runs: step, log, evaluate, checkpoint, resume.

A step depends on the state and the step number alone (data and noise are derived from the number), so a run that is
killed and resumed from its last checkpoint continues as if nothing had happened.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from toprovar_jax.checkpoint import Checkpoints

State = Any
Metrics = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to write.

    Attributes:
      directory: checkpoints, ``metrics.csv`` and samples go here.
      num_steps: where training ends; learning-rate schedules refer to it.
      checkpoint_minutes: time between checkpoints.
      log_every, evaluate_every: in steps.
    """

    directory: Path
    num_steps: int
    checkpoint_minutes: float = 3.0
    log_every: int = 20
    evaluate_every: int = 200


def run(
    state: State,
    step_fn: Callable[[State, int], tuple[State, Metrics]],
    config: LoopConfig,
    *,
    evaluate: Callable[[State, int], Mapping[str, float]] | None = None,
    report: Callable[[str], None] = print,
) -> State:
    """Train from the newest checkpoint in ``config.directory``, or from ``state``, to ``config.num_steps``.

    Args:
      state: initial state, a pytree of arrays.
      step_fn: ``(state, step) -> (state, metrics)``; the old state may be donated.
      config: lengths and places.
      evaluate: called with the state every so often; its numbers are logged beside the metrics.
      report: receives one line per log.
    """
    directory = Path(config.directory)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / "checkpoints")
    start = checkpoints.latest_step or 0
    if start:
        state = checkpoints.restore(state)
        report(f"resumed at step {start} of {config.num_steps}")
    log = _Log(directory / "metrics.csv", report)
    since_save = since_log = time.monotonic()
    try:
        for step in range(start, config.num_steps):
            state, metrics = step_fn(state, step)
            done = step + 1
            if done % config.log_every == 0 or done == config.num_steps:
                values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
                now = time.monotonic()
                log.write("train", done, values | {"steps_per_second": config.log_every / (now - since_log)})
                since_log = now
            if evaluate is not None and (done % config.evaluate_every == 0 or done == config.num_steps):
                log.write("evaluate", done, evaluate(state, done))
                since_log = time.monotonic()
            if time.monotonic() - since_save > 60 * config.checkpoint_minutes or done == config.num_steps:
                checkpoints.save(done, state)
                since_save = time.monotonic()
    finally:
        checkpoints.close()
    return state


class _Log:
    """Long-format CSV (kind, step, seconds, name, value): columns never change, so a resumed run appends."""

    def __init__(self, path: Path, report: Callable[[str], None]):
        self.path, self.report, self.start = path, report, time.monotonic()
        if not path.exists():
            path.write_text("kind,step,seconds,name,value\n")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        seconds = round(time.monotonic() - self.start, 1)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows((kind, step, seconds, name, f"{v:.6g}") for name, v in values.items())
        self.report(f"{kind} {step}: " + " ".join(f"{name}={value:.4g}" for name, value in values.items()))
