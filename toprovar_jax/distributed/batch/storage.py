"""Where the output of a run goes: a small set of operations that any file system or object store can do safely.

Names are paths within the storage, with forward slashes. Folders are made as they are needed and vanish with their
last file, as in object stores. What a write replaces is read whole until the new content is there whole. Imports
neither jax nor numpy.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import io
import time
from collections.abc import Iterable, Iterator, Mapping

Writable = io.RawIOBase | io.BufferedIOBase
"""What bytes are written to; takes all of what it is given."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of the storage.

    Attributes:
      name: its path within the storage, folders included.
      size: in bytes.
      modified: when it was written, in seconds on :meth:`Storage.clock`.
    """

    name: str
    size: int
    modified: float


_CLOCK_SECONDS = 60.0
"""How long the storage's clock is extrapolated by the host's."""

Entries = list[Entry]  # within a class that has a method of that name, list is the method


class Storage(abc.ABC):
    """Files by name; safe for any number of processes on any number of hosts at once.

    Every operation raises ``OSError`` when the storage fails (a full disk, a lost connection), and then has done
    nothing, or all of it. Made by :func:`open_storage`.
    """

    url: str
    _measured: tuple[float, float] | None = None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, over one of that name; on the disk when it returns."""
        with self.writing(name) as file:
            file.write(content)

    @abc.abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[Writable]:
        """As :meth:`write`, for content that comes in pieces: appears when the context ends without an exception."""

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Writes several files, each whole or not at all; all on the disk when it returns."""
        for name, content in files.items():
            self.write(name, content)

    @abc.abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Writes a file whole, unless there is one of that name: then returns False, also to all but one of many."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file; ``FileNotFoundError`` if there is none."""

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """The contents of files, in order, None for those that are gone; few of them are in memory at a time."""
        return map(self._read_present, names)

    def _read_present(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    @abc.abstractmethod
    def list(self, folder: str) -> Entries:
        """The files below a folder, at any depth, by name; none if there is no such folder."""

    @abc.abstractmethod
    def top(self) -> set[str]:
        """The names of files and folders directly in the storage."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file; no error if it is gone."""

    def clock(self) -> float:
        """The time that a file written now would get, in seconds: hosts' own clocks may be wrong."""
        if self._measured is None or time.monotonic() - self._measured[0] > _CLOCK_SECONDS:
            self._measured = time.monotonic(), self._stamp()
        at, stamp = self._measured
        return stamp + time.monotonic() - at

    @abc.abstractmethod
    def _stamp(self) -> float:
        """The time that the storage gives to a file that is written now."""

    def remove_leftovers(self, age: float) -> None:  # noqa: B027 - most storages leave nothing
        """Removes what killed writers left half written.

        Args:
          age: after how many seconds a writer that cannot be asked, being on another host, is taken for dead.
        """


def open_storage(url: str) -> Storage:
    """The storage at a local path or at any URL that fsspec knows (``gs://bucket/run``, ``memory://x``).

    Folders are created, and it is proven that files can be written.

    Raises:
      UserInputError: the place cannot be written to, something in the way is a file, the kind of URL is unknown, or a
        package for it is missing.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in ("file", "local"):
        from toprovar_jax.distributed.batch.local_storage import LocalStorage

        return LocalStorage(rest if separator else url)
    from toprovar_jax.distributed.batch.remote_storage import RemoteStorage

    return RemoteStorage(url)
