"""What threads hand to one another: bounded, in order, and over for all of them as soon as one has failed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

_LOOK_UP_SECONDS = 0.2


class Halted(Exception):
    """The run is over; whoever gets this while handing something over has nothing more to do."""


class Halt:
    """Whether the run is over, and the first error, if that was why."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, error: BaseException | None = None) -> None:
        """Ends the run; of several errors the first counts."""
        with self._lock:
            if self.error is None and not isinstance(error, Halted):
                self.error = error
            self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleeps, unless the run ends before; returns whether it has ended."""
        return self._event.wait(seconds)


class Handover(Generic[Item]):
    """A bounded queue between two threads.

    Args:
      size: how many items may wait in it.
      halt: ends the waiting of both sides.
    """

    def __init__(self, size: int, halt: Halt):
        self._queue: queue.Queue[Item] = queue.Queue(size)
        self._halt = halt

    def put(self, item: Item) -> None:
        """Waits for room.

        Raises:
          Halted: the run is over.
        """
        while True:
            if self._halt:
                raise Halted
            try:
                return self._queue.put(item, timeout=_LOOK_UP_SECONDS)
            except queue.Full:
                continue

    def get(self, look_up: Callable[[], Any] = bool) -> Item:
        """Waits for an item; ``look_up`` is called now and then meanwhile, and may raise.

        Raises:
          Halted: the run is over.
        """
        while True:
            if self._halt:
                raise Halted
            look_up()
            try:
                return self._queue.get(timeout=_LOOK_UP_SECONDS)
            except queue.Empty:
                continue


def in_thread(work: Callable[[], None], halt: Halt, name: str) -> threading.Thread:
    """Starts a thread whose failure ends the run."""

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            halt.set(error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread
