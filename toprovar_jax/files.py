"""Files that appear complete or not at all, over an existing one only on demand; output directories checked up front.

Imports neither jax nor numpy: commands check where they will write before they touch a device.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pathlib
import secrets
from collections.abc import Iterator

from toprovar_jax.errors import UserInputError

_PROBE = bytes(4096)
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def write_new(directory: str | pathlib.Path, stem: str, suffix: str, content: bytes | memoryview) -> pathlib.Path:
    """Writes ``directory/stem+suffix``, or ``stem-2`` and so on if that name is taken, also by a writer at work now.

    Args:
      directory: where; created if it is missing.
      stem: the file name without its ending.
      suffix: the ending with its dot.
      content: the whole file.

    Returns:
      The path that was written. The content is on disk before the name appears.

    Raises:
      OSError: the directory cannot be written or the disk is full; nothing is left behind.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _temporary_file(directory, content) as temporary:
        target = directory / f"{stem}{suffix}"
        numbers = itertools.count(2)
        while not publish(temporary, target):
            target = directory / f"{stem}-{next(numbers)}{suffix}"
    return target


def replace_file(path: str | pathlib.Path, content: bytes | memoryview) -> None:
    """Writes ``path`` in place of whatever has that name; readers see the old file or the new one, whole.

    Args:
      path: the file; its directory is created if it is missing.
      content: the whole file.

    Raises:
      OSError: the directory cannot be written or the disk is full; the old file stays as it was.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(path.parent, content) as temporary:
        os.replace(temporary, path)


def absence(path: pathlib.Path) -> str:
    """What to say of a path at which no file is; reading a pipe or a device might never end."""
    return "is no regular file" if path.exists() else "does not exist"


def check_output_dir(path: str | pathlib.Path) -> None:
    """Refuses a directory that could not be written to, and leaves the disk as it was.

    A directory that does not exist yet is judged by the nearest parent that does.

    Raises:
      UserInputError: something in the way is not a directory, or it is not writable, or its disk is full.
    """
    existing = pathlib.Path(path)
    try:
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        with _temporary_file(existing, _PROBE):
            pass
    except OSError as error:
        raise _not_writable(path, error) from None


def ensure_output_dir(path: str | pathlib.Path) -> pathlib.Path:
    """Creates a directory with its parents and proves that files can be written there.

    Raises:
      UserInputError: as :func:`check_output_dir`.
    """
    check_output_dir(path)
    directory = pathlib.Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from None
    return directory


def _not_writable(path: str | pathlib.Path, error: OSError) -> UserInputError:
    reason = (error.strerror or str(error)).lower()
    return UserInputError(
        f"output directory {path}",
        f"must be a directory that can be written to ({reason})",
        "choose another with --out",
    )


@contextlib.contextmanager
def _temporary_file(directory: pathlib.Path, content: bytes | memoryview) -> Iterator[pathlib.Path]:
    """A complete, synchronised file next to its destination; it is gone afterwards whatever happens."""
    path = directory / f".toprovar-{secrets.token_hex(8)}.tmp"
    # Not tempfile: its files are readable by their owner alone, and pictures should follow the user's umask.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            remaining = memoryview(content)
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
            os.fsync(descriptor)
        except OSError as error:
            error.filename = str(directory)
            raise
        finally:
            os.close(descriptor)
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(temporary: pathlib.Path, target: pathlib.Path) -> bool:
    """Gives a finished file of the same file system its name too; False if the name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _publish_without_links(temporary, target)
    return True


def _publish_without_links(temporary: pathlib.Path, target: pathlib.Path) -> bool:
    """As :func:`publish`, for file systems without hard links: reserves the name, then moves the file over it."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return True
