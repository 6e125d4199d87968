"""One chunk in the hands of one worker: batches are committed one by one, then gathered.

Every step may be repeated, by anybody, with the same outcome: a worker that goes on after a dead one need not know how
far that one came.
"""

from __future__ import annotations

import datetime
import errno
import json
import re
from collections.abc import Mapping, Sequence

from toprovar_jax.distributed.batch import manifest, names, shards
from toprovar_jax.distributed.batch.leases import Lease, Leases
from toprovar_jax.distributed.batch.results import (
    Failure,
    Layout,
    Picture,
    Record,
    decode,
    encode,
    record_of,
    sha256,
    writable,
)
from toprovar_jax.distributed.batch.storage import Storage


class Claim:
    """A chunk that this worker makes; from :meth:`toprovar_jax.distributed.batch.ledger.Ledger.claim`.

    Attributes:
      chunk: its number.
    """

    def __init__(self, storage: Storage, layout: Layout, leases: Leases, lease: Lease) -> None:
        self.chunk = lease.chunk
        self._storage, self._leases, self._lease = storage, leases, lease
        self._layout: Layout = layout
        self._known: set[str] = set()

    def committed(self) -> dict[str, list[tuple[int, int]]]:
        """The rows and images in each batch of the chunk that was committed, by anybody."""
        batches = self._batches()
        self._known |= batches.keys()
        return {batch: [(it["row"], it["image"]) for it in records] for batch, records in batches.items()}

    def commit(self, batch: str, results: Sequence[Picture | Failure]) -> None:
        """Commits a batch; when this returns, it will not be made again.

        Args:
          batch: its name, the same in every run.
          results: all pictures and failures of it.

        Raises:
          ValueError: the name cannot be that of a file.
          OSError: the storage failed; the batch is not committed, and may be committed again.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", batch):
            raise ValueError(f"batch {batch!r} must be named by letters, digits, _ and -")
        now = datetime.datetime.fromtimestamp(self._storage.clock(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        records = [record_of(result, self.chunk, self._layout, now) for result in results]
        pictures = {record["key"]: it for record, it in zip(records, results, strict=True) if isinstance(it, Picture)}
        archive, commit = names.batch_archive(self.chunk, batch), names.batch_commit(self.chunk, batch)
        if self._layout == "tar":
            files = {}
            for key, it in pictures.items():
                about = {"key": key, "id": it.id, "prompt": it.prompt, "seed": it.seed, "recipe": dict(it.recipe)}
                described = writable(json.dumps(about, ensure_ascii=False, sort_keys=True))
                files |= shards.members(key, it.content, writable(it.prompt), described)
            self._storage.write(archive, b"".join(shards.pieces(files)))
        else:
            self._storage.write_all({names.picture(self.chunk, key): it.content for key, it in pictures.items()})
        self._storage.write(commit, encode(records))
        self._known.add(batch)
        # Somebody who thought this worker dead has been faster: what was removed then is not to come back.
        if self._complete():
            self._storage.remove(commit)
            self._storage.remove(archive)

    def complete(self) -> None:
        """Makes the chunk complete; all of its batches must have been committed.

        Raises:
          OSError: the storage failed, or somebody has removed or changed what was committed; then it no longer counts
            as committed.
        """
        if not self._complete():
            self._gather()
        for entry in self._storage.list(names.batches(self.chunk)):
            self._storage.remove(entry.name)
        self._leases.clear(self.chunk)

    def release(self) -> None:
        """Lets somebody else go on with the chunk; what was committed stays."""
        self._lease.release()

    def lost(self) -> bool:
        """Whether somebody else goes on with the chunk, having thought this worker dead, or has completed it."""
        return self._lease.lost()

    def _complete(self) -> bool:
        return self._storage.exists(names.part(self.chunk))

    def _gather(self) -> None:
        batches = self._batches()
        files = self._archived(batches) if self._layout == "tar" else {}
        missing = self._damaged(batches, files) | (self._known - batches.keys())
        # Looked for after all was read: as long as there is no part, nobody has begun to remove the batches.
        if self._complete():
            return
        if missing:
            for batch in missing:
                self._storage.remove(names.batch_commit(self.chunk, batch))
            reason = f"pictures committed in {', '.join(sorted(missing))} are missing or damaged; start again"
            raise OSError(errno.EIO, f"{reason}, and they are made again", self._storage.url)
        records = {record["key"]: record for it in batches.values() for record in it}
        made = {key for key, record in records.items() if record["status"] == "made"}
        if made and self._layout == "tar":
            with self._storage.writing(names.shard(self.chunk)) as file:
                for piece in shards.pieces({name: it for name, it in files.items() if name.partition(".")[0] in made}):
                    file.write(piece)
        self._storage.write(names.part(self.chunk), manifest.encode(list(records.values())))

    def _batches(self) -> dict[str, list[Record]]:
        """The records of every committed batch by its name."""
        files = [entry.name for entry in self._storage.list(names.batches(self.chunk))]
        commits = {file: found[1] for file in files if (found := names.batch_of_commit(file))}
        decoded = zip(commits.values(), map(decode, self._storage.read_all(commits)), strict=True)
        return {batch: records for batch, records in decoded if records is not None}

    def _archived(self, batches: Mapping[str, list[Record]]) -> dict[str, bytes]:
        """The files in the archives of batches, by name."""
        files: dict[str, bytes] = {}
        for archive in self._storage.read_all(names.batch_archive(self.chunk, batch) for batch in batches):
            files |= shards.unpack(archive or b"")
        return files

    def _damaged(self, batches: Mapping[str, list[Record]], files: Mapping[str, bytes]) -> set[str]:
        """The batches with pictures that are no longer as recorded; files of their own are judged by their size."""
        folder = names.picture(self.chunk, "").rpartition("/")[0]
        sizes = {entry.name: entry.size for entry in self._storage.list(folder)} if self._layout == "files" else {}

        def good(record: Record) -> bool:
            if record["status"] == "failed":
                return True
            if self._layout == "files":
                return sizes.get(record["file"]) == record["bytes"]
            return sha256(files.get(f"{record['key']}.png", b"")) == record["sha256"]

        return {batch for batch, records in batches.items() if not all(map(good, records))}
