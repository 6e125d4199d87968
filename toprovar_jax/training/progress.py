"""What a person sees of a running training: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Progress:
    """A bar with images per second, the time left and the loss; without a terminal, a line for every
    log, the time left at its end.

    Args:
      start, num_steps: where the run begins and ends.
      images: per step; with 0 the bar counts steps.
      report: receives lines.
    """

    def __init__(self, start: int, num_steps: int, images: int, report: Callable[[str], None]):
        self._start, self._num_steps, self._report = start, num_steps, report
        self._begun: float | None = None
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            unit, scale = (" images", images) if images else (" steps", False)
            self._bar = tqdm(
                total=num_steps, initial=start, unit=unit, unit_scale=scale, file=sys.stderr, dynamic_ncols=True
            )

    def advance(self) -> None:
        """One step is under way."""
        # The first one was compiled, which says nothing about the others.
        self._begun = time.monotonic() if self._begun is None else self._begun
        if self._bar is not None:
            self._bar.update()

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a log; on a terminal those of training only show in the bar."""
        if self._bar is not None and kind == "train":
            self._bar.set_postfix({"loss": f"{values['loss']:.4g}"} if "loss" in values else {}, refresh=False)
        else:
            line = f"{kind} {step}: " + " ".join(f"{name}={value:.4g}" for name, value in values.items())
            self.line(line + self._left(step) if kind == "train" else line)

    def _left(self, step: int) -> str:
        """How long the steps that are left will take, if they take as long as those so far."""
        timed = step - self._start - 1
        if self._begun is None or timed < 1 or step == self._num_steps:
            return ""
        return " left " + duration((time.monotonic() - self._begun) / timed * (self._num_steps - step))

    def line(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            self._report(text)
        else:
            with self._bar.external_write_mode(file=sys.stderr):
                self._report(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """``3h12m``, ``12m05s`` or ``8s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
