"""Reports as JSON files, and command lines that refuse in one line before any work."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def file_path(text: str) -> pathlib.Path:
    """Type of an option that names a file to write."""
    return _checked(pathlib.Path(text), folder=False)


def folder_path(text: str) -> pathlib.Path:
    """Type of an option that names a folder to write files in."""
    return _checked(pathlib.Path(text), folder=True)


def leave(code: int) -> NoReturn:
    """End the process with what its ``main`` returned.

    An interrupted one (130) ends at once: threads may be compiling or running, which crashes if the interpreter is
    taken down beneath them.
    """
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _checked(path: pathlib.Path, *, folder: bool) -> pathlib.Path:
    reason = unwritable(path, folder=folder)
    if reason is not None:
        raise argparse.ArgumentTypeError(reason)
    return path


def unwritable(path: pathlib.Path, *, folder: bool = False) -> str | None:
    """Why a file (or a folder of files) cannot be written at ``path``, in one line, or None; missing folders are fine.

    Asked before the work, because a report that has nowhere to go is noticed too late after it.
    """
    try:
        if not folder and path.is_dir():
            return f"{path}: is a directory; name a file"
        place = path
        while not place.exists() and place != place.parent:
            place = place.parent
        if (folder or place != path) and not place.is_dir():
            return f"{path}: {place} is not a directory; choose another place"
        return None if _accepts_files(place) else f"{path}: {place} is not writable; choose another place"
    except OSError as error:
        return f"{path}: {error.strerror}; choose another place"


def _accepts_files(place: pathlib.Path) -> bool:
    """Whether a folder, or that of a file to be replaced, takes a new file; permissions do not tell (``/proc``)."""
    if not os.access(place, os.W_OK):
        return False
    if place.is_dir() or place.is_file():  # A pipe or a terminal is written in place.
        try:
            tempfile.TemporaryFile(dir=place if place.is_dir() else place.parent).close()
        except OSError:
            return False
    return True


def write_report(path: pathlib.Path | None, report: Any) -> None:
    """Write JSON in one go, or nothing without a path: whoever is killed while writing leaves the earlier file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1) + "\n"
    if path.exists() and not path.is_file():  # A pipe or a terminal cannot be replaced.
        path.write_text(text)
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
