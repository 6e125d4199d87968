"""The folder that is converted into: complete or not there at all, whatever happens while it is made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import ensure_output_dir

CARD = "model.json"
RECORD = "conversion"
"""The entry of ``model.json`` that says what was converted from what."""


class TargetBusyError(UserInputError):
    """Another process is converting into the same folder."""


@contextlib.contextmanager
def building(out: Path, parts: Collection[str], *, force: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A place to build a model folder, which takes its name when the context ends, and vanishes if that fails.

    A folder of earlier conversions is kept: its other parts are in the new place too, without being copied. If the
    process dies, ``out`` is as it was, or absent with its former content set aside for the moment of the exchange; the
    next conversion into it puts that back, and removes what was left unfinished.

    Args:
      out: the folder.
      parts: what will be put into it.
      force: whether parts that are there already may be replaced.

    Yields:
      The place, without ``parts``; and the record of earlier conversions, empty for a new folder.

    Raises:
      UserInputError: ``out`` is something else than a folder of conversions or has a part already, or it cannot be
        written; a :class:`TargetBusyError` where another process is converting into it.
    """
    out = out.resolve()
    ensure_output_dir(out.parent)
    with _alone(out):
        place, aside = _sibling(out, "unfinished"), _sibling(out, "replaced")
        if not out.exists() and aside.exists():
            aside.rename(out)
        for stale in (place, aside):
            shutil.rmtree(stale, ignore_errors=True)
        record = check_target(out, parts, force=force)
        try:
            place.mkdir()
            if out.exists():
                _link_all(out, place, without=parts)
            yield place, record
            if out.exists():
                out.rename(aside)
            place.rename(out)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def check_target(out: Path, parts: Collection[str], *, force: bool) -> dict[str, Any]:
    """The record of earlier conversions into ``out``; empty where there is nothing yet.

    Raises:
      UserInputError: see :func:`building`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    try:
        fields = json.loads((out / CARD).read_text(encoding="utf-8"))
        record = fields[RECORD]
        there = sorted(record["parts"].keys() & set(parts))
        record["models"] = list(map(str, record["models"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserInputError(f"--out {out}", "exists, and was not made by convert", "choose another folder") from None
    if there and not force:
        raise UserInputError(f"--out {out}", f"has {', '.join(there)} already", "replace it with --force")
    return record


def _sibling(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Where no other process converts into the same folder; the lock of one that died is free."""
    path = _sibling(out, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            rule = "is being converted into by another process"
            raise TargetBusyError(f"--out {out}", rule, "wait for it or choose another folder") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its owner removed the file between our two steps
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _link_all(source: Path, target: Path, *, without: Collection[str]) -> None:
    """The same files under another folder: hard links, or copies where the disk has none."""

    def link(origin: str, copy: str) -> None:
        try:
            os.link(origin, copy)
        except OSError:
            shutil.copy2(origin, copy)

    def left_out(folder: str, names: list[str]) -> Collection[str]:
        return without if Path(folder) == source else ()

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True, ignore=left_out)


def leftover_bytes(out: Path) -> int:
    """Bytes that a conversion into ``out`` which died has left, and that the next one will free."""
    total = 0
    for path in _sibling(out.resolve(), "unfinished").rglob("*"):
        with contextlib.suppress(OSError):  # it may be at work after all
            total += path.stat().st_size if path.is_file() else 0
    return total
