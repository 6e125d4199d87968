"""A folder of a local or network disk as storage.

Files are written to ``.work/tmp``, synchronised, and given their names by a rename or a hard link, after which the
folder is synchronised too: neither a kill nor a power cut leaves half a file, or takes one that was reported as
written. The names in ``.work/tmp`` say whose they are, so that what killed processes leave can be removed without
touching anybody else's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import io
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from toprovar_jax.distributed.batch import processes
from toprovar_jax.distributed.batch.storage import Entries, Entry, Storage, Writable
from toprovar_jax.files import ensure_output_dir, publish

Result = TypeVar("Result")

_ATTEMPTS = 100
"""An empty folder may be removed before the first file is in it, but not so often in a row."""
_THREADS = 8

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES}


class LocalStorage(Storage):
    """Files below a folder.

    Raises:
      UserInputError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.url = str(folder)
        self._root = ensure_output_dir(folder).absolute()
        self._temporaries = self._root / ".work" / "tmp"
        self._writer = processes.identity()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Writable]:
        """Writes to a temporary file that then gets the name."""
        path = self._root / name
        with self._temporary() as file:
            yield file
            os.fsync(file.fileno())
            self._replace(file, path)
        _sync(path.parent)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Writes files in threads, for a disk synchronises several at once; their folders follow once, at the end."""
        folders = dict.fromkeys((self._root / name).parent for name in files)

        def write(name: str) -> None:
            with self._temporary() as file:
                file.write(files[name])
                os.fsync(file.fileno())
                self._replace(file, self._root / name)

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(write, files):
                pass
        for folder in folders:
            _sync(folder)

    def create(self, name: str, content: bytes) -> bool:
        """Writes to a temporary file and links it to the name, which fails if that is taken."""
        path = self._root / name
        with self._temporary() as file:
            file.write(content)
            os.fsync(file.fileno())
            created = self._in_folder(path.parent, lambda: publish(file.path, path))
        _sync(path.parent)
        return created

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self._root / name).read_bytes()

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self._root / name).is_file()

    def list(self, folder: str) -> Entries:
        """The files below a folder, except what is still being written."""
        found = []
        for place, folders, names in os.walk(self._root / folder, onerror=_raise_unless_gone):
            path = pathlib.Path(place)
            folders[:] = [name for name in folders if path / name != self._temporaries]
            for name in names:
                # A file that is listed may be gone when it is looked at.
                with contextlib.suppress(FileNotFoundError):
                    status = (path / name).stat()
                    inside = (path / name).relative_to(self._root).as_posix()
                    found.append(Entry(inside, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.name)

    def top(self) -> set[str]:
        """The names directly in the folder."""
        return set(os.listdir(self._root)) - {path.name for path in self._probes()}

    def remove(self, name: str) -> None:
        """Removes a file, and the folders that are empty without it."""
        path = self._root / name
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # until a folder is not empty
            while (path := path.parent) != self._root:
                path.rmdir()

    def remove_leftovers(self, age: float) -> None:
        """Removes the temporary files of processes that are gone."""
        now = self.clock()
        for path in [*self._temporaries.glob("*"), *self._probes()]:
            with contextlib.suppress(FileNotFoundError):
                if processes.is_dead(path.name.rpartition(",")[0]) or now - path.stat().st_mtime > age:
                    path.unlink()
        with contextlib.suppress(OSError):
            self._temporaries.rmdir()

    def _stamp(self) -> float:
        with self._temporary() as file:
            return file.path.stat().st_mtime

    def _probes(self) -> Iterator[pathlib.Path]:
        """What a kill leaves that comes while the folder is being tried."""
        return self._root.glob(".toprovar-*.tmp")

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[_File]:
        """A new file without a name of its own; gone afterwards unless it was given one."""
        path = self._temporaries / f"{self._writer},{secrets.token_hex(8)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = self._in_folder(path.parent, lambda: os.open(path, flags, 0o666))
            with _File(path, descriptor) as file:
                yield file
        except OSError as error:
            if error.filename in (None, str(path)):
                error.filename = self.url  # the user knows the folder, not a file that never was
            raise
        finally:
            path.unlink(missing_ok=True)

    def _replace(self, file: _File, path: pathlib.Path) -> None:
        self._in_folder(path.parent, lambda: os.replace(file.path, path))

    def _in_folder(self, folder: pathlib.Path, action: Callable[[], Result]) -> Result:
        """Does what needs a folder, which is made as often as somebody else removes it for being empty."""
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                self._make(folder)
                return action()
        self._make(folder)
        return action()

    def _make(self, folder: pathlib.Path) -> None:
        if not folder.is_dir():
            if folder == self._root:
                raise FileNotFoundError(errno.ENOENT, "the output folder has vanished", self.url)
            self._make(folder.parent)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
            _sync(folder.parent)


class _File(io.RawIOBase):
    """A file to write to, which takes all of what it is given, and its path."""

    def __init__(self, path: pathlib.Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, content: Any, /) -> int:
        remaining = memoryview(content).cast("B")
        length = len(remaining)
        while remaining:
            remaining = remaining[os.write(self._descriptor, remaining) :]
        return length

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def _raise_unless_gone(error: OSError) -> None:
    """A folder that cannot be read is not an empty one."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync(folder: pathlib.Path) -> None:
    """Makes the names in a folder last; some file systems do that by themselves and refuse to be asked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        pass  # nobody's file is in it any more
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
