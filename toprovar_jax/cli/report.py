"""What the generate command says: paths or JSON on stdout; progress, warnings and the summary on stderr."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from toprovar_jax.timings import Timings

ScaleCallback = Callable[[int, int, Any], None]
"""Called after each scale with its index, the number of scales, and what the pipeline tells about it."""


class Report:
    """The voice of one run.

    Args:
      as_json: stdout is one JSON object at the end instead of a path a line.
      quiet: stderr is for errors only.
    """

    def __init__(self, *, as_json: bool, quiet: bool):
        self._as_json = as_json
        self._quiet = quiet
        self._warnings: list[str] = []

    def warn(self, warnings: Iterable[str]) -> None:
        """Says each warning once, on one line, as soon as it is known."""
        for warning in warnings:
            line = " ".join(warning.split())
            if line not in self._warnings:
                self._warnings.append(line)
                self._tell(f"warning: {line}")

    def path(self, path: pathlib.Path) -> None:
        """Names a finished file."""
        if not self._as_json:
            print(path, flush=True)

    @contextlib.contextmanager
    def scale_bar(self, label: str) -> Iterator[ScaleCallback | None]:
        """A progress bar over the scales of one call; None when nobody watches a terminal."""
        if self._quiet or not sys.stderr.isatty():
            yield None
            return
        from tqdm import tqdm

        with tqdm(desc=label, unit=" scales", leave=False, mininterval=0, file=sys.stderr) as bar:

            def advance(index: int, num_scales: int, _info: Any) -> None:
                bar.total = num_scales
                bar.update(index + 1 - bar.n)

            yield advance

    def summary(self, count: int, directory: pathlib.Path, timings: Timings) -> None:
        """The closing line: what was spent once, apart from what every picture costs."""
        each = timings.steady / count
        parts = f"text {timings.text:.2f}, transformer {timings.transformer:.2f}, decoder {timings.decoder:.2f}"
        self._tell(
            f"{count} picture{'s' * (count > 1)} in {directory}: {timings.total:.1f} s in all; once: load "
            f"{timings.load:.1f} s, compile {timings.compile:.1f} s; steady: {each:.2f} s per picture ({parts} in all)"
        )

    def plan(self, plan: Any, size: tuple[int, int], count: int) -> None:
        """What a dry run would make of one plan: how many pictures of which height and width, and the plan's table."""
        if not self._as_json:
            print(f"{count} picture{'s' * (count > 1)}, {size[0]} x {size[1]} pixels (height x width)\n{plan}")

    def result(self, images: Sequence[dict[str, Any]], timings: Timings, plans: Sequence[Any], **more: Any) -> None:
        """The one JSON object; ``plans`` appears in it only if the pictures do not share one plan."""
        if not self._as_json:
            return
        distinct = [plan.as_dict() for plan in plans]
        record = {"images": list(images), "timings": timings.as_dict(), "plan": distinct[0], **more}
        if len(distinct) > 1:
            record["plans"] = distinct
        print(json.dumps({**record, "warnings": self._warnings}))

    def _tell(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)
