"""One worker's part of a job: claims chunks, makes their missing batches, commits them, until none is left.

Three threads, so that the device never waits: one reads, claims and tokenises ahead; the caller's runs the device; one
commits what threads of a pool have encoded. What is between them is bounded.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from toprovar_jax.distributed.batch.batches import FAILED_ROWS, Call, Wanted
from toprovar_jax.distributed.batch.encoding import encode_picture
from toprovar_jax.distributed.batch.group import Group, SingleProcess
from toprovar_jax.distributed.batch.handover import Halt, Halted, Handover, in_thread
from toprovar_jax.distributed.batch.ledger import Claim, Failure, Ledger, Picture
from toprovar_jax.distributed.batch.progress import Progress
from toprovar_jax.distributed.batch.rows import BrokenRow
from toprovar_jax.distributed.batch.work import Work
from toprovar_jax.errors import UserInputError
from toprovar_jax.recipes import recipe_of

Outcome = Literal["finished", "left to others", "stopped"]

_AHEAD = 2
"""Batches that may wait for the device."""

_BEHIND = 8
"""Batches that may wait for their commit: as many as the device makes while a chunk is completed."""

_RELIST_SECONDS = 20.0
_OWN_SECONDS = 0.02


class TooManyFailures(Exception):
    """More rows of the job have failed than are allowed; the message says how many."""


class _Stopped(Exception):
    """Somebody wants the run to stop."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """What is handed from thread to thread: batches of a claimed chunk, results of one, or the chunk's end.

    Attributes:
      claim: of the chunk.
      call: what is to be drawn; None: nothing.
      name: under which the results are committed; None: the chunk has no more batches.
      results: what is to be committed, or what will be.
    """

    claim: Claim
    call: Call | None = None
    name: str | None = None
    results: tuple[Any, ...] = ()


class BatchRun:
    """One worker's run.

    Args:
      work: what there is to do.
      ledger: what is claimed and committed; touched by the group's leader alone.
      progress: is told what happens.
      group: the processes that share the model.
      first_chunk: where this worker begins to look for work.
      wait: at the end, whether to wait for other workers' chunks, and take over those that are abandoned.
      max_failures: how many rows of the job may fail; None: all of them.
      stopping: whether somebody wants the run to stop; asked between batches, in the caller's thread.
      poll_seconds: how often to look after other workers' chunks.
    """

    def __init__(
        self,
        work: Work,
        ledger: Ledger,
        progress: Progress,
        *,
        group: Group | None = None,
        first_chunk: int = 0,
        wait: bool = True,
        max_failures: int | None = None,
        stopping: Callable[[], bool] = bool,
        poll_seconds: float = 2.0,
    ):
        self._work, self._ledger, self._progress = work, ledger, progress
        self._group: Group = group or SingleProcess()
        self._first, self._wait, self._max_failures = first_chunk, wait, max_failures
        self._stopping, self._poll = stopping, poll_seconds
        self._preparing, self._committing = Halt(), Halt()
        self._prepared: Handover[_Step | None] = Handover(_AHEAD, self._preparing)
        self._made: Handover[_Step | None] = Handover(_BEHIND, self._committing)
        self._held: dict[int, Claim] = {}
        self._lost: set[int] = set()
        self._encoders = concurrent.futures.ThreadPoolExecutor(
            max(2, min(16, os.cpu_count() or 2)), thread_name_prefix="encode"
        )

    def run(self) -> Outcome:
        """Works until everything is complete, or there is nothing left for this worker.

        Raises:
          TooManyFailures: more rows have failed than are allowed.
          UserInputError: the prompt file has changed, or the pipeline refuses the job's own settings.
          Exception: whatever else went wrong in any thread. In every case what is committed stays, and claims are
            given back.
        """
        self._check_failures()
        threads = [
            in_thread(self._prepare, self._preparing, "prepare"),
            in_thread(self._commit, self._committing, "commit"),
        ]
        outcome: Outcome = "left to others"
        try:
            self._draw()
        except _Stopped:
            outcome = "stopped"
        except Halted:
            pass
        finally:
            self._conclude(*threads)
        if error := self._committing.error or self._preparing.error:
            raise error
        if outcome == "left to others" and self._ledger.finish(self._work.chunks):
            outcome = "finished"
        return outcome

    def _conclude(self, preparer: Any, committer: Any) -> None:
        """Lets the threads come to an end: nothing new is begun, what is drawn is committed, claims are given back."""
        self._preparing.set()
        with contextlib.suppress(Halted):
            self._made.put(None)
        self._group.agree(json.dumps({"chunk": None}).encode())
        preparer.join()
        committer.join()
        self._encoders.shutdown(cancel_futures=True)
        self._work.rows.close()
        for chunk in list(self._held):
            with contextlib.suppress(OSError):  # a lease that cannot be given back runs out
                self._held.pop(chunk).release()

    def _prepare(self) -> None:
        for claim in self._claims():
            chunk = self._work.of(claim.chunk)
            self._progress.warn(chunk.warnings)
            done = claim.committed()
            if chunk.broken and FAILED_ROWS not in done:
                results = tuple(_failed(row) for row in chunk.broken)
                self._prepared.put(_Step(claim, name=FAILED_ROWS, results=results))
            missing = (batch for batch in chunk.batches if batch.name not in done)
            for call in self._work.planner.calls(missing):
                self._prepared.put(_Step(claim, call))
            self._prepared.put(_Step(claim))
        self._prepared.put(None)

    def _claims(self) -> Iterator[Claim]:
        """Claims of this worker as it gets them, until there is nothing left to claim."""
        chunks = self._work.chunks
        while True:
            complete, listed = self._ledger.complete_chunks(), time.monotonic()
            order = (chunk % chunks for chunk in range(self._first, self._first + chunks))
            left = [chunk for chunk in order if chunk not in complete]
            if not left:
                return
            claimed = False
            for chunk in left:
                if self._preparing:
                    raise Halted
                if chunk in complete or chunk in self._held:
                    continue
                claim = self._ledger.claim(chunk)
                if claim is not None:
                    claimed, self._held[chunk] = True, claim
                    self._lost.discard(chunk)
                    yield claim
                elif time.monotonic() - listed > _RELIST_SECONDS:
                    complete, listed = self._ledger.complete_chunks(), time.monotonic()
            if not claimed:
                others = sum(chunk not in self._held for chunk in left)
                if others and not self._wait:
                    return
                self._progress.waiting(others)
                self._pause(left, others)

    def _pause(self, left: Sequence[int], others: int) -> None:
        """Until it is time to look after other workers' chunks again, or this worker's own are complete."""
        while True:
            if self._preparing.wait(self._poll if others else _OWN_SECONDS):
                raise Halted
            if others or not all(chunk in self._held for chunk in left):
                return

    def _draw(self) -> None:
        """The caller's thread: the device's work."""
        while (step := self._prepared.get(self._check_stop)) is not None:
            if step.call is None:
                self._made.put(step)
            elif step.claim.chunk not in self._lost:
                self._check_stop()
                names = [batch.name for batch in step.call.batches]
                self._group.agree(json.dumps({"chunk": step.claim.chunk, "batches": names}).encode())
                for name, results in zip(names, self._results(step.call), strict=True):
                    self._made.put(_Step(step.claim, name=name, results=results))

    def _check_stop(self) -> None:
        if self._committing:  # nothing can be committed any more
            raise Halted
        if self._stopping():
            raise _Stopped

    def _results(self, call: Call) -> list[tuple[Any, ...]]:
        """Pictures as the encoding threads will have made them; failures if the pipeline refuses rows' own settings."""
        batches = call.batches
        with self._progress.drawing(batches):
            try:
                drawn = call.draw(self._work.pipeline)
            except UserInputError as error:
                if not all(picture.own for batch in batches for picture in batch.pictures):
                    raise
                return [tuple(_refused(picture, error) for picture in batch.pictures) for batch in batches]
        return [
            tuple(
                self._encoders.submit(self._encode, *pair, batch.text_length)
                for pair in zip(batch.pictures, images, strict=True)
            )
            for batch, images in zip(batches, drawn, strict=True)
        ]

    def _encode(self, wanted: Wanted, image: Any, text_length: int) -> Picture | Failure:
        recipe = recipe_of(self._work.pipeline, wanted.prompt, wanted.seed, wanted.size, wanted.arguments)
        recipe["text_length"] = text_length
        try:
            content = encode_picture(image, recipe)
        except ValueError as error:
            return Failure(wanted.row, wanted.image, wanted.id, wanted.prompt, f"row {wanted.row}: {error}")
        return Picture(wanted.row, wanted.image, wanted.id, wanted.prompt, wanted.seed, recipe, content)

    def _commit(self) -> None:
        while (step := self._made.get()) is not None:
            claim = step.claim
            if claim.chunk in self._lost:
                continue
            if step.name is None:
                claim.complete()
                self._held.pop(claim.chunk, None)
                self._progress.completed(self._work.rows_in(claim.chunk))
                self._check_failures()
                continue
            results = [
                found.result() if isinstance(found, concurrent.futures.Future) else found for found in step.results
            ]
            claim.commit(step.name, results)
            failures = sum(isinstance(result, Failure) for result in results)
            self._progress.committed(len(results) - failures, failures)
            if failures:
                self._check_failures()
            if claim.lost():
                self._lost.add(claim.chunk)
                self._held.pop(claim.chunk, None)
                self._progress.warn(
                    (f"chunk {claim.chunk} was taken over by another worker, which thought this one dead",)
                )

    def _check_failures(self) -> None:
        if self._max_failures is not None:
            failures = self._ledger.failures()
            if failures > self._max_failures:
                raise TooManyFailures(f"{failures} rows have failed, more than --max-failures {self._max_failures}")


def follow(work: Work, group: Group) -> None:
    """The part of a process that shares the model with its group's leader: draws what it is told to.

    Args:
      work: the same as the leader's.
      group: whose leader runs a :class:`BatchRun`.
    """
    number, batches = None, ()
    while (told := json.loads(group.agree(None)))["chunk"] is not None:
        if told["chunk"] != number:
            number = told["chunk"]
            batches = work.of(number).batches
        with contextlib.suppress(UserInputError):  # the leader gets the same, and decides what it means
            work.planner.call([batch for batch in batches if batch.name in told["batches"]]).draw(work.pipeline)
    work.rows.close()


def _failed(row: BrokenRow) -> Failure:
    return Failure(row.number, 0, row.id, row.prompt, row.reason)


def _refused(wanted: Wanted, error: UserInputError) -> Failure:
    return Failure(wanted.row, wanted.image, wanted.id, wanted.prompt, f"row {wanted.row}: {error}")
