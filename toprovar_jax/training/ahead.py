"""Batches made on the host while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """``make(number)`` for a number and, in background threads, for the ones that follow it.

    What a number gives depends on the number alone, whoever asks when; a failure of ``make`` is raised where its
    number is asked for.

    Args:
      make: a function of the step number.
      stop: numbers from here on are not made.
      depth: how many are made ahead.
      threads: how many calls of ``make`` run at a time.
    """

    def __init__(self, make: Callable[[int], Batch], stop: int, *, depth: int = 2, threads: int = 1):
        self._make, self._stop, self._depth = make, stop, depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
        self._waiting: dict[int, Future[Batch]] = {}

    def __call__(self, number: int) -> Batch:
        """The batch of step ``number``."""
        wanted = [number, *range(number + 1, min(self._stop, number + 1 + self._depth))]
        for other in self._waiting.keys() - set(wanted):
            self._waiting.pop(other).cancel()
        for each in wanted:
            if each not in self._waiting:
                self._waiting[each] = self._pool.submit(self._make, each)
        return self._waiting.pop(number).result()

    def close(self) -> None:
        """Forget what is still waiting and end the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._waiting.clear()
