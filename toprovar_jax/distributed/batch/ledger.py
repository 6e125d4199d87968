"""What has been made, and who makes what: nothing is lost, torn or made twice, whoever is killed at whatever moment.

A chunk's life: it is claimed; its batches are made and committed one by one; it is completed, which gathers what was
committed and ends with its part of the manifest. That part makes it complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from toprovar_jax.distributed.batch import manifest, names
from toprovar_jax.distributed.batch.claims import Claim
from toprovar_jax.distributed.batch.job import open_job
from toprovar_jax.distributed.batch.leases import Leases, WorkerState
from toprovar_jax.distributed.batch.results import Failure, Layout, Picture, decode
from toprovar_jax.distributed.batch.storage import Storage
from toprovar_jax.errors import UserInputError

__all__ = ["Claim", "Failure", "Ledger", "Picture", "WorkerState"]

_ABANDONED = 86_400.0
"""After how many seconds nobody can still be writing one and the same file."""


class Ledger:
    """One worker's view of a run. Its methods may be called from several threads.

    Args:
      storage: where the output goes.
      layout: pictures as ``"files"``, or each chunk's as one ``"tar"``.
      worker: this worker's name, unlike any other worker's.
      lease_seconds: after how long without a :meth:`heartbeat` others take a worker for dead; a process of the same
        host that has ended is noticed at once.

    Raises:
      UserInputError: the name cannot be that of a file, or a package is missing.
    """

    def __init__(self, storage: Storage, *, layout: Layout, worker: str, lease_seconds: float) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", worker):
            raise UserInputError(
                f"worker {worker!r}", "must be up to 100 letters, digits, dots, _ and -", "choose another name"
            )
        manifest.check_available()
        self._storage, self._seconds = storage, lease_seconds
        self._layout: Layout = layout
        self._leases = Leases(storage, worker, lease_seconds)
        self._failed_of_part: dict[str, int] = {}
        self._failed_of_commit: dict[str, frozenset[int]] = {}

    def open(self, job: Mapping[str, Any]) -> None:
        """Begins the run that makes ``job``, or joins it.

        Args:
          job: everything that the pictures depend on, as JSON values.

        Raises:
          UserInputError: the storage holds another job, or something else.
        """
        open_job(self._storage, {**job, "layout": self._layout})
        self._storage.remove_leftovers(_ABANDONED)

    def complete_chunks(self) -> set[int]:
        """The chunks that are complete."""
        found = (names.chunk_of_part(entry.name) for entry in self._storage.list(names.PARTS))
        return {chunk for chunk in found if chunk is not None}

    def claim(self, chunk: int) -> Claim | None:
        """Claims a chunk; None if it is complete, or claimed by somebody who is alive."""
        if self._storage.exists(names.part(chunk)):
            return None
        lease = self._leases.claim(chunk)
        if lease is not None and self._storage.exists(names.part(chunk)):
            # Completed between the look and the claim, by somebody who did not see this claim.
            self._leases.clear(chunk)
            return None
        return Claim(self._storage, self._layout, self._leases, lease) if lease else None

    def failures(self) -> int:
        """How many rows have failed, in full or in part, in complete chunks and in committed batches.

        Raises:
          UserInputError: a part of the manifest is damaged.
        """
        files = (entry.name for entry in self._storage.list(names.BATCHES))
        commits = {file: found[0] for file in files if (found := names.batch_of_commit(file))}
        unread = sorted(commits.keys() - self._failed_of_commit.keys())
        for file, content in zip(unread, self._storage.read_all(unread), strict=True):
            records = decode(content) or []
            self._failed_of_commit[file] = frozenset(it["row"] for it in records if it["status"] == "failed")
        # After the batches, which may have become complete chunks since.
        complete = self.complete_chunks()
        unread = sorted({names.part(chunk) for chunk in complete} - self._failed_of_part.keys())
        for file, content in zip(unread, self._storage.read_all(unread), strict=True):
            self._failed_of_part[file] = manifest.failed_rows(file, content or b"")
        in_work = [self._failed_of_commit[file] for file, chunk in commits.items() if chunk not in complete]
        return sum(self._failed_of_part[names.part(chunk)] for chunk in complete) + len(frozenset().union(*in_work))

    def finish(self, chunks: int) -> bool:
        """Writes the manifest of the whole run and removes what only served to make it.

        Args:
          chunks: how many chunks the job has.

        Returns:
          Whether all of them are complete; if not, nothing is done.

        Raises:
          UserInputError: a part of the manifest is damaged.
        """
        if not self.complete_chunks() >= set(range(chunks)):
            return False
        if not self._storage.exists(names.MANIFEST):
            manifest.assemble(self._storage, range(chunks))
        # Left by workers that were killed, or taken for dead, when their chunk was complete.
        for folder in (names.BATCHES, names.CLAIMS):
            for entry in self._storage.list(folder):
                self._storage.remove(entry.name)
        self._storage.remove_leftovers(self._seconds)
        return True

    def heartbeat(self, state: Mapping[str, Any]) -> None:
        """Tells the others that this worker makes progress: its claims hold for ``lease_seconds`` from now.

        Args:
          state: what else there is to say, as JSON values.
        """
        self._leases.renew(state)

    def workers(self) -> list[WorkerState]:
        """The last sign of life of every worker there has been."""
        return self._leases.workers()
