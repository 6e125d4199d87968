"""A job of two chunks with three batches each, the worker that makes it, and what its output must be."""

from __future__ import annotations

import contextlib
import hashlib
import io
import secrets
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem

from toprovar_jax.distributed.batch.ledger import Failure, Ledger, Picture
from toprovar_jax.distributed.batch.storage import Storage, open_storage

JOB = {"model": "toy", "seed": 7, "settings": {"guidance": 3.0, "sizes": (1, 2)}}
CHUNKS = 2
BATCHES = 3
ROWS_OF_CHUNK = 5
"""In batches of 0 and 3, 1 and 4, and 2, so that gathering has to sort. Row 4 has failed; row 0 has two pictures."""


def content(row: int, image: int) -> bytes:
    """What stands for the PNG of a picture; ledgers do not look inside."""
    return hashlib.sha256(f"{row} {image}".encode()).digest() * (20 * row + 1)


def results(chunk: int) -> dict[str, list[Picture | Failure]]:
    """The batches of a chunk."""
    batches: dict[str, list[Picture | Failure]] = {f"b{number}": [] for number in range(BATCHES)}
    for row in range(chunk * ROWS_OF_CHUNK, (chunk + 1) * ROWS_OF_CHUNK):
        batch, prompt = batches[f"b{row % ROWS_OF_CHUNK % BATCHES}"], f"prompt “{row}”"
        if row == 4:
            batch.append(Failure(row, 0, str(row), prompt, "prompt: is too\nlong; cut it"))
        else:
            for image in range(2 if row == 0 else 1):
                recipe = {"steps": 13, "guidance": 3.5, "prompt": prompt}
                batch.append(Picture(row, image, f"id-{row}", prompt, 7 + row + image, recipe, content(row, image)))
    return batches


def ledger(storage: Storage, layout: str = "files", worker: str = "w0", lease_seconds: float = 60.0) -> Ledger:
    """A worker's view of the toy job, which it has opened."""
    made = Ledger(storage, layout=layout, worker=worker, lease_seconds=lease_seconds)  # pyright: ignore[reportArgumentType]
    made.open(JOB)
    return made


def work(ledger: Ledger, chunks: int = CHUNKS) -> bool:
    """Makes whatever is missing, as a worker does; returns what finishing said."""
    ledger.heartbeat({"state": "running"})
    for chunk in range(chunks):
        claim = ledger.claim(chunk)
        if claim is not None:
            done = claim.committed()
            for name, made in results(chunk).items():
                if name not in done:
                    claim.commit(name, made)
            claim.complete()
    return ledger.finish(chunks)


def memory() -> Storage:
    """An empty storage, in place of all earlier ones: looking for a file takes as long as there are files."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return open_storage(f"memory://toy/{secrets.token_hex(8)}")


def output(storage: Storage, foreign: Collection[str] = ()) -> dict[str, Any]:
    """Everything in a storage but signs of life and ``foreign`` files; of manifests all rows without their times."""

    def read(name: str) -> Any:
        if not name.endswith(".parquet"):
            return storage.read(name)
        return pq.read_table(io.BytesIO(storage.read(name)), use_threads=False).drop_columns("time").to_pylist()

    names = [entry.name for entry in storage.list("") if not entry.name.startswith(".work/workers/")]
    return {name: read(name) for name in names if name not in foreign}


def undisturbed(layout: str, chunks: int = CHUNKS) -> dict[str, Any]:
    """The output of a run that nothing happened to."""
    storage = memory()
    assert work(ledger(storage, layout), chunks)
    return output(storage)


class Killed(BaseException):
    """A process that ends here; no handler of errors sees it."""


OPERATIONS = ("write", "writing", "write_all", "create", "read", "read_all", "exists", "list", "top", "remove", "clock")


def failing(storage: Storage, at: int, error: type[BaseException], *, after: bool) -> tuple[Storage, list[str]]:
    """The storage of the same URL, at one of whose operations something happens; and those carried out so far.

    Args:
      storage: what is operated on.
      at: the number of the operation, from 0; operations that consist of others count as well.
      error: what is raised there.
      after: whether the operation is carried out first.
    """
    same, calls = open_storage(storage.url), list[str]()

    def counted(name: str, operation: Any) -> Any:
        def number() -> int:
            calls.append(name)
            return len(calls) - 1

        def call(*arguments: Any) -> Any:
            now = number() == at
            if now and not after:
                raise error
            result = operation(*arguments)
            if now:
                raise error
            return result

        @contextlib.contextmanager
        def context(*arguments: Any) -> Iterator[Any]:
            now = number() == at
            if now and not after:
                raise error
            with operation(*arguments) as value:
                yield value
            if now:
                raise error

        return context if name == "writing" else call

    for name in OPERATIONS:
        setattr(same, name, counted(name, getattr(same, name)))
    return same, calls


def every_operation(layout: str, chunks: int = CHUNKS) -> Iterator[int]:
    """The numbers of all operations in the life of the toy job."""
    counting, calls = failing(memory(), -1, Killed, after=False)
    assert work(ledger(counting, layout), chunks)
    assert set(calls) >= {"write", "create", "read", "exists", "list", "remove"}
    yield from range(len(calls))
