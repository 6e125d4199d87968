"""What an export's folder is of: a file beside the pictures that says how they were made, and refuses other ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import replace_file

MANIFEST = "export.json"
PICTURES = "images"
"""The folder that a scorer is given; nothing else than what it reads lies there."""

_BLOCKS, _BLOCK = 16, 2**16
_TEMPORARY = ".toprovar-*.tmp"


def fingerprint(folder: pathlib.Path) -> str:
    """Tells models apart; not by place or time.

    A converted folder says itself what its weights were; its files have names drawn by chance. Of others, the names and
    sizes of all files are taken, and 16 samples of each: a checkpoint has tens of gigabytes, and training changes every
    part of a tensor, so that samples find it.
    """
    told = hashlib.sha256()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        fields = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        for name, part in sorted(fields["conversion"]["parts"].items()):
            files = [(file["bytes"], file["sha256"]) for file in part["files"]]
            told.update(repr((name, files, part["wrapped_in"], part["dtype"])).encode())
        return told.hexdigest()[:32]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            told.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            with path.open("rb") as file:
                for part in range(_BLOCKS):
                    file.seek(max(0, size - _BLOCK) * part // (_BLOCKS - 1))
                    told.update(file.read(_BLOCK))
    return told.hexdigest()[:32]


def read_manifest(out: pathlib.Path) -> dict[str, Any] | None:
    """What an earlier run has written about this folder; None where there was none.

    Raises:
      UserInputError: the folder has other contents.
    """
    if not out.exists() or (out.is_dir() and all(path.match(_TEMPORARY) for path in out.iterdir())):
        return None
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if {"made", "prompts_exported", "runs"} <= found.keys() and isinstance(found["made"], dict):
            return found
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise UserInputError(f"--out {out}", "exists, and was not made by export-eval", "choose another folder")


def check_same(out: pathlib.Path, found: Mapping[str, Any] | None, made: Mapping[str, Any], prompts: int) -> None:
    """Refuses to mix pictures.

    Args:
      out: the folder.
      found: of :func:`read_manifest`.
      made: what the pictures to come depend on, by name.
      prompts: how many prompts are asked for.

    Raises:
      UserInputError: the folder's pictures were made in another way, or are of more prompts.
    """
    if found is None:
        return
    theirs = found["made"]
    ours = json.loads(json.dumps(made))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            rule = f"holds pictures of {name} {_shown(theirs.get(name))}, not {_shown(ours.get(name))}"
            raise UserInputError(f"--out {out}", rule, "choose another folder")
    if found["prompts_exported"] > prompts:
        rule = f"holds pictures of {found['prompts_exported']} prompts already, more than {prompts}"
        raise UserInputError(f"--out {out}", rule, "raise --limit, leave it out or choose another folder")


def write_manifest(
    out: pathlib.Path,
    found: Mapping[str, Any] | None,
    made: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    prompts: int,
    finished: bool,
) -> None:
    """Puts the manifest in place, whole.

    Args:
      out: the folder.
      found: of :func:`read_manifest`.
      made: what the pictures depend on.
      run: versions and device of this run; kept once per kind of run.
      prompts: how many prompts are asked for.
      finished: whether all their pictures are there.
    """
    runs = [] if found is None else list(found["runs"])
    if dict(run) not in runs:
        runs.append(dict(run))
    content = {"made": made, "runs": runs, "prompts_exported": prompts, "finished": finished}
    replace_file(out / MANIFEST, (json.dumps(content, indent=1) + "\n").encode("utf-8"))


def write_companions(out: pathlib.Path, companions: Mapping[str, str]) -> None:
    """Writes the text files that a scorer reads beside pictures, unless they are there as they should be."""
    for name, text in companions.items():
        content = text.encode("utf-8")
        try:
            same = (out / name).read_bytes() == content
        except OSError:
            same = False
        if not same:
            replace_file(out / name, content)


@contextlib.contextmanager
def alone(out: pathlib.Path) -> Iterator[None]:
    """Where no other process exports into the same folder, without what one that was killed has left half-written.

    Raises:
      UserInputError: another process does.
    """
    with _locked(out):
        for path in out.rglob(_TEMPORARY):
            path.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _locked(out: pathlib.Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; nor have some network file systems, see below
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "is being written to by another export"
            raise UserInputError(f"--out {out}", rule, "wait for it or choose another folder") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
