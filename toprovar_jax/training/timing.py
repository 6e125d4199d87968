"""How many steps fit into a given time: measured once, then fixed, since schedules refer to the number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from toprovar_jax.errors import UserInputError
from toprovar_jax.training.record import read_record

EVALUATIONS = 10
"""Evaluations of a run whose length is a time."""

_MEASURED_STEPS = 30
_MARGIN = 0.93  # for checkpoints, logs and captions that come late


class Work(NamedTuple):
    """A training as :func:`toprovar_jax.training.loop.run` takes it."""

    state: Any
    step: Callable[[Any, int], tuple[Any, Mapping[str, jax.Array]]]
    evaluate: Callable[[Any, int], Mapping[str, float]]


def steps_within(directory: Path, build: Callable[[int], Work], minutes: float, begun: float) -> int:
    """The number of steps for a run of ``minutes``, what was spent since ``begun`` included.

    A run that was begun in ``directory`` keeps its number. Otherwise some steps and evaluations are tried out on a
    state that is thrown away; compiling is counted a second time, since the run has to do it again.

    Args:
      directory: of the run.
      build: the training for a number of steps.
      minutes: from start to end.
      begun: when the stage began, by ``time.monotonic``.

    Raises:
      UserInputError: ``minutes`` is not positive.
    """
    if not minutes > 0:
        raise UserInputError(f"{minutes} minutes", "must be positive", "allow a minute at least")
    recorded = read_record(directory)
    if recorded is not None and any((directory / "checkpoints").glob("[0-9]*")):
        return int(recorded["num_steps"])
    work = build(1000)
    state, once, each = _measure_steps(work, 0.1 * 60 * minutes)
    clock = time.monotonic()
    work.evaluate(state, 1)
    first = time.monotonic() - clock
    work.evaluate(state, 1)
    again = time.monotonic() - clock - first
    left = 60 * minutes - (time.monotonic() - begun) - once - first - EVALUATIONS * again
    return max(1, int(_MARGIN * left / each))


def _measure_steps(work: Work, limit: float) -> tuple[Any, float, float]:
    """A state, and the seconds of the first step and of every later one; at least three steps, no longer than limit."""
    clock = time.monotonic()
    state = jax.block_until_ready(work.step(work.state, 0)[0])
    once = time.monotonic() - clock
    state = jax.block_until_ready(work.step(state, 1)[0])
    clock, count = time.monotonic(), 0
    while count < 2 or (count < _MEASURED_STEPS and time.monotonic() - clock < limit):
        state = jax.block_until_ready(work.step(state, 2 + count)[0])
        count += 1
    return state, once, (time.monotonic() - clock) / count
