"""What the batch command says on stderr: progress, each warning once, and of many only the first."""

from __future__ import annotations

import sys
import threading

SHOWN_WARNINGS = 5
"""A million prompts may have as many warnings; after these the rest is counted."""


class Voice:
    """The voice of one run; may be used from any thread.

    Args:
      shown: whether anything is said at all.
    """

    def __init__(self, *, shown: bool):
        self._shown = shown
        self._live = shown and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._warnings = 0
        self._open_line = False

    def tell(self, line: str) -> None:
        """Says one line."""
        if self._shown:
            with self._lock:
                self._close_line()
                print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """Says a warning, unless there were many."""
        self._warnings += 1
        if self._warnings <= SHOWN_WARNINGS:
            self.tell(f"warning: {line}")

    def progress(self, line: str, lasting: bool) -> None:
        """Says how things are; on a terminal each such line replaces the one before, unless that was ``lasting``."""
        if not self._live or lasting:
            self.tell(line)
            return
        with self._lock:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._open_line = True

    def end(self) -> None:
        """Leaves the last line of progress standing."""
        with self._lock:
            self._close_line()

    def left_out(self) -> None:
        """Counts the warnings that were not said."""
        if self._warnings > SHOWN_WARNINGS:
            self.tell(f"warning: {self._warnings - SHOWN_WARNINGS} more like these")

    def _close_line(self) -> None:
        if self._open_line:
            print(file=sys.stderr)
            self._open_line = False
