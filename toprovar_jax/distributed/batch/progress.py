"""What one worker has done so far, told by its threads and asked by the one that watches over it."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from toprovar_jax.distributed.batch.batches import Batch, padding_of

_WINDOW_SECONDS = 300.0
_KEPT_WARNINGS = 100


class Progress:
    """Counters of one worker; all methods may be called from any thread.

    Attributes:
      made: pictures committed.
      failures: rows and pictures that failed.
      rows: rows of the chunks completed.
      thrown: pictures that were computed as padding.
      programs: kinds of batches drawn so far, each of which is compiled once.

    Args:
      index: the worker's number among all.
      chips: how many devices it computes on.
      warned: is called with each new warning.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        index: int = 0,
        chips: int = 1,
        warned: Callable[[str], object] = str,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._index, self._chips, self._warned, self._clock = index, chips, warned, clock
        self._lock = threading.Lock()
        self.made = self.failures = self.rows = self.thrown = self._drawn = 0
        self._state = "starting"
        self._began = self._last = clock()
        self._compiling = self._at_work = False
        self._seen: set[Any] = set()
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._warnings: dict[str, None] = {}

    @property
    def programs(self) -> int:
        """Kinds of batches drawn so far, each of which is compiled once."""
        return len(self._seen)

    @contextlib.contextmanager
    def drawing(self, batches: Sequence[Batch]) -> Iterator[None]:
        """While batches of one kind are on the device; the first of a kind are compiling, which may take long."""
        kind = batches[0].key
        with self._lock:
            self._compiling, self._at_work, self._state = kind not in self._seen, True, "making"
            self._last = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._seen.add(kind)
                made, thrown = padding_of(batches)
                self._drawn += made
                self.thrown += thrown
                self._compiling, self._last = False, self._clock()

    def committed(self, pictures: int, failures: int) -> None:
        """A batch is safe."""
        with self._lock:
            self.made += pictures
            self.failures += failures
            now = self._last = self._clock()
            self._recent.append((now, pictures))
            while self._recent[0][0] < now - _WINDOW_SECONDS:
                self._recent.popleft()

    def completed(self, rows: int) -> None:
        """A chunk of so many rows is complete."""
        with self._lock:
            self.rows += rows
            self._last = self._clock()

    def waiting(self, chunks: int) -> None:
        """Nothing to claim: so many chunks are with other workers."""
        with self._lock:
            if chunks and not self._compiling:
                self._state, self._at_work = "waiting", False

    def ended(self, state: str) -> None:
        """The run is over: ``finished``, ``stopped`` or ``failed``."""
        with self._lock:
            self._state, self._at_work = state, False

    def warn(self, warnings: Iterable[str]) -> None:
        """Passes on what has not been said; of very many, only the first."""
        for warning in warnings:
            line = " ".join(warning.split())
            with self._lock:
                new = line not in self._warnings and len(self._warnings) < _KEPT_WARNINGS
                if new:
                    self._warnings[line] = None
            if new:
                self._warned(line)

    @property
    def warnings(self) -> list[str]:
        """What was warned of."""
        with self._lock:
            return list(self._warnings)

    def stalled(self, seconds: float) -> bool:
        """Whether work has not moved for so long, and not because a program is being compiled."""
        with self._lock:
            return self._at_work and not self._compiling and self._clock() - self._last > seconds

    def images_per_second(self) -> float:
        """Of the last minutes; 0 before the first batch."""
        with self._lock:
            now = self._clock()
            recent = [(when, count) for when, count in self._recent if when >= now - _WINDOW_SECONDS]
            if len(recent) < 2:
                return sum(count for _, count in recent) / max(now - self._began, 1e-3)
            # The first batch was made before the time that is divided by.
            return sum(count for _, count in recent[1:]) / max(now - recent[0][0], 1e-3)

    def state(self) -> dict[str, Any]:
        """All of it, for the worker's heartbeat."""
        rate = self.images_per_second()
        with self._lock:
            return {
                "index": self._index,
                "chips": self._chips,
                "state": "compiling" if self._compiling else self._state,
                "images": self.made,
                "failures": self.failures,
                "rows": self.rows,
                "padding": self.thrown / max(1, self.thrown + self._drawn),
                "programs": len(self._seen),
                "images_per_second": rate,
                "seconds_since_batch": self._clock() - self._last,
            }
