"""Ctrl-C as an answer in one line, also where something on the way swallows it or turns it into another exception."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which the first Ctrl-C raises ``KeyboardInterrupt`` and is remembered, and a second one ends it all.

    Compiled libraries answer a ``KeyboardInterrupt`` during their import or in their callbacks with an exception of
    their own, with or without its cause, or with a printed traceback and nothing else: only the signal itself is
    certain. Outside the main thread, where signals are not received, the chain of causes alone decides.

    Args:
      lost: what a Ctrl-C costs where there is nothing to lose, in words.
    """

    def __init__(self, lost: str = "no picture was saved") -> None:
        self._lost = lost
        self._pressed = False
        self._nothing_to_lose = False
        self._later = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    @contextlib.contextmanager
    def nothing_to_lose(self, condition: bool = True) -> Iterator[None]:
        """Where, if ``condition`` holds, a Ctrl-C ends the process at once: no code of others gets to answer it."""
        previous, self._nothing_to_lose = self._nothing_to_lose, condition
        try:
            yield
        finally:
            self._nothing_to_lose = previous

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Where a Ctrl-C waits for the next :meth:`check`: an event loop does not survive one in its midst."""
        previous, self._later = self._later, True
        try:
            yield
        finally:
            self._later = previous

    def check(self) -> None:
        """Raises the ``KeyboardInterrupt`` that something swallowed, or that waits."""
        if self._pressed:
            raise KeyboardInterrupt

    def explain(self, error: BaseException) -> bool:
        """Whether ``error`` is a Ctrl-C or came of one."""
        seen: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in seen:
            if isinstance(link, KeyboardInterrupt):
                return True
            seen.append(link)
            link = link.__cause__ or link.__context__
        return self._pressed

    def _receive(self, _signal: int, _frame: FrameType | None) -> None:
        if self._pressed or self._nothing_to_lose:
            words = "interrupted again; stopped at once" if self._pressed else f"interrupted; {self._lost}"
            below_the_bar = b"\n" if os.isatty(2) else b""
            os.write(2, below_the_bar + b"error: " + words.encode() + b"\n")
            os._exit(130)
        self._pressed = True
        if not self._later:
            raise KeyboardInterrupt
