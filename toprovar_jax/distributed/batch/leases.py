"""Who makes which chunk: claims that hold as long as their owner shows signs of life.

A claim is a file that is created exclusively; the next generation, created the same way, takes it over from an owner
that is dead. Should two workers hold the same chunk after all (one was only slow, or the storage cannot create
exclusively), both write the same names and the same bytes: nothing but time is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

from toprovar_jax.distributed.batch import names, processes
from toprovar_jax.distributed.batch.storage import Entry, Storage


@dataclasses.dataclass(frozen=True)
class WorkerState:
    """A worker's last sign of life.

    Attributes:
      worker: its name.
      host, pid: where it ran.
      time: when that was, ISO 8601 UTC.
      age: for how many seconds it has been silent, on the storage's clock.
      alive: whether its claims hold.
      state: what it said of itself.
    """

    worker: str
    host: str
    pid: int
    time: str
    age: float
    alive: bool
    state: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Lease:
    """A claim that was obtained.

    Attributes:
      storage: where it was obtained.
      chunk: what was claimed.
      generation: how often it had been taken over.
      content: the claim file's content, which no other claim has.
    """

    storage: Storage
    chunk: int
    generation: int
    content: bytes

    def lost(self) -> bool:
        """Whether somebody else holds the chunk now, or has completed it."""
        try:
            mine = self.storage.read(names.claim(self.chunk, self.generation)) == self.content
        except FileNotFoundError:
            return True
        return not mine or self.storage.exists(names.claim(self.chunk, self.generation + 1))

    def release(self) -> None:
        """Gives the claim up; nothing happens if it is lost."""
        if not self.lost():
            # The newest last: without it an older one, of a worker that only seemed dead, would count again.
            for generation in range(self.generation + 1):
                self.storage.remove(names.claim(self.chunk, generation))


class Leases:
    """The claims and signs of life of one worker.

    Args:
      storage: the run's.
      worker: its name, unlike any other worker's.
      seconds: after how long without a sign of life it may be taken for dead.
    """

    def __init__(self, storage: Storage, worker: str, seconds: float) -> None:
        self._storage, self._worker, self._seconds = storage, worker, seconds
        # A worker that is started again has the name of its predecessor, but does not keep its claims alive.
        self._owner = {"worker": worker, "token": secrets.token_hex(8), "process": processes.identity()}

    def claim(self, chunk: int) -> Lease | None:
        """Claims a chunk, or returns None if somebody alive, this worker included, has claimed it."""
        claims = {}
        for entry in self._storage.list(names.CLAIMS):
            found = names.generation_of_claim(entry.name)
            if found and found[0] == chunk:
                claims[found[1]] = entry
        newest = max(claims, default=-1)
        if claims and self._holds(claims[newest]):
            return None
        # Unlike any other claim, also of this worker on this chunk.
        content = json.dumps({**self._owner, "claim": secrets.token_hex(8)}).encode()
        if not self._storage.create(names.claim(chunk, newest + 1), content):
            return None
        return Lease(self._storage, chunk, newest + 1, content)

    def clear(self, chunk: int) -> None:
        """Removes all claims on a chunk that is complete."""
        for entry in self._storage.list(names.CLAIMS):
            found = names.generation_of_claim(entry.name)
            if found and found[0] == chunk:
                self._storage.remove(entry.name)

    def renew(self, state: Mapping[str, Any]) -> None:
        """Gives a sign of life, by which all claims hold for another while."""
        now = datetime.datetime.fromtimestamp(self._storage.clock(), datetime.UTC)
        sign = {
            **self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": now.isoformat(timespec="seconds"),
            "state": dict(state),
        }
        self._storage.write(names.worker(self._worker), json.dumps(sign).encode())

    def workers(self) -> list[WorkerState]:
        """The last signs of life of all workers, by name."""
        now, states = self._storage.clock(), []
        for entry in self._storage.list(names.WORKERS):
            sign = self._read(entry.name)
            with contextlib.suppress(KeyError, TypeError):  # a file of somebody else
                age = max(now - entry.modified, 0.0)
                alive = age < self._seconds and not processes.is_dead(sign["process"])
                place = sign["worker"], sign["host"], int(sign["pid"]), sign["time"]
                states.append(WorkerState(*place, age=age, alive=alive, state=sign["state"]))
        return states

    def _holds(self, claim: Entry) -> bool:
        """Whether the owner of a claim is alive."""
        owner = self._read(claim.name)
        modified = claim.modified
        if isinstance(owner.get("process"), str) and processes.is_dead(owner["process"]):
            return False
        if owner.get("token") == self._owner["token"]:
            return True
        sign = names.worker(str(owner.get("worker")))
        for entry in self._storage.list(names.WORKERS):
            if entry.name == sign and self._read(sign).get("token") == owner["token"]:
                modified = max(modified, entry.modified)
        return self._storage.clock() - modified < self._seconds

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object; empty for a file that is gone or holds something else."""
        try:
            content = json.loads(self._storage.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
