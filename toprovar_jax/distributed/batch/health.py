"""Watching over a run: leases are renewed only while work moves, and one worker tells how all of them are doing."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from toprovar_jax.distributed.batch.handover import Halt, in_thread
from toprovar_jax.distributed.batch.leases import WorkerState
from toprovar_jax.distributed.batch.ledger import Ledger
from toprovar_jax.distributed.batch.progress import Progress
from toprovar_jax.distributed.batch.storage import Storage

_ENDED = ("finished", "stopped", "failed")
_REPORT_SECONDS = 10.0
_LINE_SECONDS = 30.0
_LOOK_SECONDS = 60.0
_FORGOTTEN_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Status:
    """How a job is doing, over all workers.

    Attributes:
      rows, rows_done: of the job, and of its complete chunks.
      chunks, chunks_done: the same.
      images, failures: made and failed by workers of now, since they began.
      images_per_second: of all of them together, over the last minutes.
      chips: how many devices they compute on.
      seconds_left: at that rate; None where there is none yet.
      padding: share of the pictures computed that were thrown away.
      workers: of each, what its heartbeat says.
      silent: one line per worker that has stalled or vanished.
    """

    rows: int
    rows_done: int
    chunks: int
    chunks_done: int
    images: int
    failures: int
    images_per_second: float
    chips: int
    seconds_left: float | None
    padding: float
    workers: tuple[dict[str, Any], ...]
    silent: tuple[str, ...]

    @property
    def per_chip(self) -> float:
        """Images per second and device."""
        return self.images_per_second / max(1, self.chips)

    def line(self) -> str:
        """All of it on one line."""
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        compiling = sum(worker.get("state") == "compiling" for worker in self.workers)
        waited_for = f", {compiling} compiling" if compiling else ""
        parts = [
            f"{self.rows_done:,} of {self.rows:,} prompts ({100 * self.rows_done / self.rows:.1f} %)",
            f"{self.images_per_second:.3g} images/s ({self.per_chip:.3g} per chip){left}",
            f"{len(self.workers)} worker{'s' * (len(self.workers) != 1)}{waited_for}",
            f"{self.failures} failed",
        ]
        if self.padding >= 0.05:
            parts.append(
                f"{100 * self.padding:.0f} % of what is computed is padding: fewer different settings, or a "
                "larger --chunk, would spare it"
            )
        return "; ".join([*parts, *self.silent])

    def as_json(self) -> bytes:
        """All of it as a JSON object."""
        return (json.dumps({**dataclasses.asdict(self), "time": time.time()}, indent=1) + "\n").encode()

    def as_prometheus(self) -> bytes:
        """The numbers in Prometheus' text format."""
        metrics = {
            "rows": ("gauge", "Rows of the prompt file.", self.rows),
            "rows_done": ("gauge", "Rows of complete chunks.", self.rows_done),
            "images_total": ("counter", "Pictures committed by the workers of now.", self.images),
            "failures_total": ("counter", "Rows and pictures that failed, of the workers of now.", self.failures),
            "images_per_second": ("gauge", "Of all workers, over the last minutes.", self.images_per_second),
            "images_per_second_per_chip": ("gauge", "The same per device.", self.per_chip),
            "seconds_left": ("gauge", "At this rate.", self.seconds_left),
            "padding_ratio": ("gauge", "Share of computed pictures thrown away.", self.padding),
            "workers": ("gauge", "Workers that are alive.", len(self.workers)),
            "workers_silent": ("gauge", "Workers that have stalled or vanished.", len(self.silent)),
        }
        lines = []
        for name, (kind, words, value) in metrics.items():
            if value is not None:
                name = f"toprovar_batch_{name}"
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", f"{name} {value}"]
        return ("\n".join(lines) + "\n").encode()


class Health:
    """Renews this worker's leases, and, as the first of those alive, reports on all. A context.

    Args:
      storage: where ``status.json`` and ``status.prom`` go.
      ledger: whose leases are renewed.
      progress: of this worker.
      index: of this worker.
      rows, chunk, chunks: rows of the job, rows per chunk, and how many chunks.
      lease_seconds: after which a silent worker is thought dead.
      stall_seconds: without a finished batch, after which this worker lets others take over.
      tell: says a line, or replaces the last one said so; the second argument is whether it must be seen.
    """

    def __init__(
        self,
        storage: Storage,
        ledger: Ledger,
        progress: Progress,
        *,
        index: int,
        rows: int,
        chunk: int,
        chunks: int,
        lease_seconds: float,
        stall_seconds: float,
        tell: Callable[[str, bool], None],
    ):
        self._storage, self._ledger, self._progress, self._index = storage, ledger, progress, index
        self._rows, self._chunk, self._chunks = rows, chunk, chunks
        self._lease, self._stall, self._tell = lease_seconds, stall_seconds, tell
        self._halt = Halt()
        self._thread: threading.Thread | None = None
        self._said_stalled = self._said_storage = False
        self._looked, self._reported = float("-inf"), float("-inf")

    def __enter__(self) -> Health:
        self._beat()
        self._thread = in_thread(self._watch, self._halt, "health")
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        if self._thread is not None:
            self._thread.join()
        self.tick(last=True)

    def _watch(self) -> None:
        while not self._halt.wait(min(self._lease / 4, _REPORT_SECONDS)):
            self.tick()

    def tick(self, *, last: bool = False) -> None:
        """Renews leases unless the work has stalled, and reports if it is this worker's turn."""
        if self._progress.stalled(self._stall):
            if not self._said_stalled:
                self._tell(
                    f"no batch for {_duration(self._stall)}: this worker lets others take over; look at its device",
                    True,
                )
            self._said_stalled = True
        else:
            self._said_stalled = False
            self._beat()
        now = time.monotonic()
        pause = _REPORT_SECONDS if self._index == 0 else _LOOK_SECONDS
        if last or now - self._looked >= pause:
            self._looked = now
            try:
                self._report(last)
            except Exception as error:  # whatever it is, leases must go on being renewed
                self._complain(error)

    def _beat(self) -> None:
        try:
            self._ledger.heartbeat(self._progress.state())
        except OSError as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._said_storage:
            reason = (
                error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
            )
            self._tell(f"progress could not be written to the output ({reason}); trying again", True)
        self._said_storage = True

    def _report(self, last: bool) -> None:
        workers = self._ledger.workers()
        alive = [worker for worker in workers if _alive(worker)]
        if alive and min(worker.state.get("index", 0) for worker in alive) != self._index:
            return
        if last and alive:
            return
        status = self.status(workers)
        self._storage.write("status.json", status.as_json())
        self._storage.write("status.prom", status.as_prometheus())
        now = time.monotonic()
        if not last and (sys.stderr.isatty() or now - self._reported >= _LINE_SECONDS):
            self._reported = now
            self._tell(status.line(), False)

    def status(self, workers: Sequence[WorkerState]) -> Status:
        """The job as its storage and all heartbeats show it."""
        alive = [worker for worker in workers if _alive(worker)]
        complete = self._ledger.complete_chunks()
        last_chunk = self._rows - (self._chunks - 1) * self._chunk
        done = len(complete) * self._chunk - (self._chunk - last_chunk if self._chunks - 1 in complete else 0)
        states = [worker.state for worker in workers]
        rate = math.fsum(worker.state.get("images_per_second", 0.0) for worker in alive)
        images, rows = (sum(state.get(name, 0) for state in states) for name in ("images", "rows"))
        seconds = (self._rows - done) * max(1.0, images / rows if rows else 1.0) / rate if rate else None
        computed = [state.get("images", 0) for state in states]
        weight = max(1, sum(computed))
        padding = sum(state.get("padding", 0.0) * count for state, count in zip(states, computed, strict=True)) / weight
        return Status(
            rows=self._rows,
            rows_done=done,
            chunks=self._chunks,
            chunks_done=len(complete),
            images=images,
            failures=sum(state.get("failures", 0) for state in states),
            images_per_second=rate,
            chips=sum(worker.state.get("chips", 1) for worker in alive),
            seconds_left=seconds,
            padding=padding,
            workers=tuple(
                {"worker": worker.worker, "host": worker.host, "pid": worker.pid, **worker.state, "age": worker.age}
                for worker in alive
            ),
            silent=tuple(_silence(worker) for worker in workers if _silent(worker, self._lease)),
        )


def _alive(worker: WorkerState) -> bool:
    return worker.alive and worker.state.get("state") not in _ENDED


def _silent(worker: WorkerState, lease_seconds: float) -> bool:
    """Whether it should still be heard of; those that were silent for long belong to a run of long ago."""
    return worker.state.get("state") not in _ENDED and lease_seconds < worker.age < _FORGOTTEN_SECONDS


def _silence(worker: WorkerState) -> str:
    return f"host {worker.host} (worker {worker.worker}) has been silent for {_duration(worker.age)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
