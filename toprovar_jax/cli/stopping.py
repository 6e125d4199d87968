"""A wish that work may end in good order: the first SIGTERM or Ctrl-C is remembered, and asked for between batches."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

from toprovar_jax.cli.interrupts import Interrupts


class Stopping:
    """A context in which a SIGTERM, as of a machine that is taken away, and the first Ctrl-C only wait to be asked for.

    Call it to ask. A second Ctrl-C ends the process at once. Outside the main thread, where signals are not received,
    it is never.

    Args:
      interrupts: the command's.
    """

    def __init__(self, interrupts: Interrupts):
        self._interrupts = interrupts
        self._contexts = contextlib.ExitStack()
        self._terminated = False

    def __enter__(self) -> Stopping:
        self._contexts.enter_context(self._interrupts.later())
        if threading.current_thread() is threading.main_thread():
            previous: Any = signal.signal(signal.SIGTERM, self._receive)
            self._contexts.callback(signal.signal, signal.SIGTERM, previous)
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def __call__(self) -> bool:
        """Whether somebody wants the work to end."""
        try:
            self._interrupts.check()
        except KeyboardInterrupt:
            return True
        return self._terminated

    def _receive(self, _signal: int, _frame: FrameType | None) -> None:
        self._terminated = True
