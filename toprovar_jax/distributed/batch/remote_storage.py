"""An object store as storage, through fsspec.

Uploads to object stores appear whole or not at all. Exclusive creation is left to the store where fsspec's file system
can ask for it (Google, Amazon, Azure, memory). Elsewhere it is looked whether the file is there, then written, then
read back: of two workers at the very same moment both may then succeed, and make the same chunk. That costs time and
no more: what they write has the same names and the same bytes. A kind of storage whose uploads can be torn (a remote
file system over ssh) may show half of a file that was being written when its writer was killed; it is written again,
except for a part of the manifest, which is then reported as damaged.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import itertools
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from toprovar_jax.distributed.batch.storage import Entries, Entry, Storage, Writable
from toprovar_jax.errors import UserInputError

_THREADS = 16
"""Requests at a time: each takes tens of milliseconds, most of them waiting."""
_TIMES = ("mtime", "updated", "LastModified", "last_modified", "modified", "created")
"""What different file systems call the time at which a file was written."""


class RemoteStorage(Storage):
    """Objects whose names begin with a URL.

    Raises:
      UserInputError: fsspec or its package for this kind of URL is missing, the kind is unknown, or nothing can be
        written there.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = _file_system(self.url)
        try:
            self.clock()
        except Exception as error:
            if _away(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserInputError(
                f"output {url}", f"must be a place that can be written to ({reason})", "choose another with --out"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        """Uploads a file as a whole."""
        path = self._path(name)
        self._in_folder(path, lambda: self._files.pipe_file(path, content))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Writable]:
        """Collects the pieces in a local temporary file and uploads that."""
        with tempfile.NamedTemporaryFile() as copy:
            with open(copy.name, "wb") as file:
                yield file
            path = self._path(name)
            self._in_folder(path, lambda: self._files.put_file(copy.name, path))

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Uploads many at a time."""
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self.write, files.keys(), files.values()))

    def create(self, name: str, content: bytes) -> bool:
        """Uploads on condition that there is no such file, as far as the store can."""
        # Some file systems take the word "create" and write over what is there all the same.
        if not self.exists(name):
            path = self._path(name)
            try:
                self._in_folder(path, lambda: self._files.pipe_file(path, content, mode="create"))
            except FileExistsError:
                pass
            except (NotImplementedError, ValueError, TypeError):
                self.write(name, content)
        # A request that was answered too late and repeated finds the file that it has written itself.
        try:
            return self.read(name) == content
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return self._files.cat_file(self._path(name))

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Downloads many at a time, in order."""
        remaining = iter(names)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            while some := list(itertools.islice(remaining, _THREADS)):
                yield from pool.map(self._read_present, some)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        # Not the file system's own exists(), for which a lost connection is a missing file.
        self._files.invalidate_cache()
        try:
            return self._files.info(self._path(name))["type"] == "file"
        except FileNotFoundError:
            return False

    def list(self, folder: str) -> Entries:
        """The files below a folder."""
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        start = len(self._path("")) + 1
        return [
            Entry(path[start:], int(info["size"]), _modified(info))
            for path, info in sorted(found.items())
            if path.startswith(self._path(folder) + "/")
        ]

    def top(self) -> set[str]:
        """The names directly below the URL."""
        self._files.invalidate_cache()
        try:
            return {path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)} - {""}
        except FileNotFoundError:
            return set()

    def remove(self, name: str) -> None:
        """Removes a file."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def remove_leftovers(self, age: float) -> None:
        """Removes the probes of the clock that killed workers have left."""
        now = self.clock()
        for entry in self.list(".work/tmp"):
            if now - entry.modified > age:
                self.remove(entry.name)

    def _stamp(self) -> float:
        name = f".work/tmp/{secrets.token_hex(8)}"
        self.write(name, b"")
        try:
            return _modified(self._files.info(self._path(name)))
        finally:
            self.remove(name)

    def _in_folder(self, path: str, action: Callable[[], object]) -> None:
        """Does what needs the folder of ``path``: object stores have none, remote file systems want it made."""
        try:
            action()
        except FileNotFoundError:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            action()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise UserInputError(f"output {url}", "needs fsspec", "pip install 'toprovar-jax[batch]'") from None
    try:
        # Other workers write to the same folders: what was listed a moment ago is no longer true.
        files, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "az": "adlfs", "abfs": "adlfs"}.get(
            scheme
        )
        remedy = f"pip install {package}" if package else f"install it ({error})"
        raise UserInputError(f"output {url}", f"needs fsspec's package for {scheme}://", remedy) from None
    except Exception as error:
        reason = f"must be a local path or a URL that fsspec can open ({error})"
        raise UserInputError(f"output {url}", reason, "check the URL") from None
    return files, root.rstrip("/")


def _modified(info: Mapping[str, Any]) -> float:
    """When a file was written, in seconds, from what a file system says of it."""
    value = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, int | float):
        return float(value)
    raise ValueError(f"a file system that tells when files were written is needed, this one tells {sorted(info)}")


def _away(error: Exception) -> bool:
    """Whether a store could not be reached, which may be otherwise next time; each client has errors of its own."""
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    return any(word in type(error).__name__ for word in ("Connect", "Timeout"))
