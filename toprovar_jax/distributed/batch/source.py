"""The file of prompts as bytes: on a local disk or behind any fsspec URL, and watched for changes during a run.

Imports neither jax nor numpy.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import absence

Readable = Any
"""A binary file open for reading; the files of fsspec have no class in common with those of Python."""

MAX_LINE = 2**20
"""Bytes of a line beyond which it is dropped: a file without line ends must not fill the memory."""

_BLOCK = 2**20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_VERSIONS = ("size", "mtime", "updated", "LastModified", "last_modified", "etag", "ETag", "created", "generation")
"""What filesystems tell about a file that changes when it is written anew."""


class Source:
    """A prompt file, and what it looked like when it was first seen.

    Args:
      url: a local path, or a URL that fsspec knows, such as ``gs://bucket/prompts.jsonl``.

    Raises:
      UserInputError: no such file, or nothing here can read such a URL.
    """

    def __init__(self, url: str):
        self.url = url
        self._filesystem, self._path = _filesystem_of(url) if "://" in url else (None, url)
        self._seen = self._look()
        if self._seen is None:
            what = absence(_local(url)) if self._filesystem is None else "cannot be found"
            raise UserInputError(f"prompts file {url}", what, "check --prompts")

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.url.rstrip("/").replace("\\", "/").rpartition("/")[2]

    def open(self) -> Readable:
        """The file, for reading.

        Raises:
          UserInputError: it cannot be read, or is no longer what it was.
        """
        self.check()
        try:
            return open(self._path, "rb") if self._filesystem is None else self._filesystem.open(self._path, "rb")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserInputError(f"prompts file {self.url}", f"cannot be read ({reason})", "check --prompts") from None

    def check(self) -> None:
        """Refuses a file that is no longer what it was.

        Raises:
          UserInputError: it has vanished or changed.
        """
        now = self._look()
        if now != self._seen:
            raise self.changed("vanished" if now is None else "changed")

    def changed(self, how: str) -> UserInputError:
        """The error for a file that another one has taken the place of during the run."""
        remedy = "put it back as it was and run the same command again; what is committed stays"
        return UserInputError(f"prompts file {self.url}", f"has {how} during the run", remedy)

    def digest(self) -> tuple[int, str]:
        """Size in bytes and SHA-256 of the content."""
        told, size = hashlib.sha256(), 0
        with self.open() as file:
            while block := file.read(_BLOCK):
                told.update(block)
                size += len(block)
        return size, told.hexdigest()

    def _look(self) -> tuple[Any, ...] | None:
        if self._filesystem is None:
            try:
                found = os.stat(self._path)
            except (OSError, ValueError):
                return None
            return (found.st_size, found.st_mtime_ns) if _local(self._path).is_file() else None
        try:
            self._filesystem.invalidate_cache()
            found = self._filesystem.info(self._path)
        except FileNotFoundError:
            return None
        return tuple(str(found.get(key)) for key in _VERSIONS) if found.get("type") == "file" else None


def lines_of_bytes(file: Readable, start: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file from a byte on, whatever their ends, in constant memory.

    Args:
      file: open for reading.
      start: where a line begins.

    Yields:
      Where the next line begins, and the line with its end; None for one of more than ``MAX_LINE`` bytes.
    """
    file.seek(start)
    position, pending, too_long = start, b"", False
    while block := file.read(_BLOCK):
        pending += block
        taken = 0
        for end in _LINE_END.finditer(pending):
            if end.end() == len(pending) and end[0] == b"\r":  # half of what ends the line, perhaps
                break
            line = pending[taken : end.end()]
            taken = end.end()
            yield position + taken, None if too_long or len(line) > MAX_LINE else line
            too_long = False
        position, pending = position + taken, pending[taken:]
        if len(pending) > MAX_LINE:
            position, pending, too_long = position + len(pending) - 1, pending[-1:], True
    if pending:
        yield position + len(pending), None if too_long else pending


def _local(path: str) -> Any:
    import pathlib

    return pathlib.Path(path)


def _filesystem_of(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        rule = f"needs a package that is not installed ({error})"
        raise UserInputError(f"prompts file {url}", rule, "install it, or copy the file here") from None
    except Exception as error:  # unknown protocols, credentials: every filesystem has errors of its own
        rule = f"cannot be opened ({type(error).__name__}: {error})"
        raise UserInputError(f"prompts file {url}", rule, "check --prompts") from None
