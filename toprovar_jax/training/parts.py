"""A run's folder as files of limited size, to be carried from one machine to another, and joined again there."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import replace_file

_INDEX, _JOINED = "parts.json", "joined.json"


def split(directory: Path, names: Iterable[str], out: Path, megabytes: float) -> list[Path]:
    """Pack files of ``directory`` into ``out/part00.bin`` and so on, none larger than ``megabytes`` million bytes.

    Args:
      directory: where they are.
      names: files or folders in it; what does not exist is left out.
      out: made if need be.
      megabytes: of one part.

    Returns:
      What was written: the parts, then ``parts.json`` with their order and checksums.

    Raises:
      UserInputError: a size that is not positive.
    """
    size = int(megabytes * 1e6)
    if size < 1:
        raise UserInputError(f"parts of {megabytes} MB", "must be larger", "choose 15 or so")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in names:
            if (directory / name).exists():
                archive.add(directory / name, name)
    content = packed.getvalue()
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    sums = {f"part{number:02d}.bin": hashlib.sha256(chunk).hexdigest() for number, chunk in enumerate(chunks)}
    for name, chunk in zip(sums, chunks, strict=True):
        replace_file(out / name, chunk)
    replace_file(out / _INDEX, (json.dumps(sums, indent=1) + "\n").encode())
    return [*(out / name for name in sums), out / _INDEX]


def join(parts: Path, directory: Path) -> bool:
    """Unpack what :func:`split` packed; files that are in ``directory`` already are replaced.

    The same parts are unpacked into a folder only once: by the next time its own files are newer.

    Returns:
      Whether they were unpacked now.

    Raises:
      UserInputError: a part is missing or damaged, or the folder holds none.
    """
    try:
        index = (parts / _INDEX).read_text(encoding="utf-8")
        sums, mark = json.loads(index), directory / _JOINED
        if mark.is_file() and mark.read_text(encoding="utf-8") == index:
            return False
        chunks = {name: (parts / name).read_bytes() for name in sums}
    except (OSError, ValueError) as error:
        raise UserInputError(f"parts in {parts}", f"cannot be read ({error})", "bring all of them") from None
    for name, chunk in chunks.items():
        if hashlib.sha256(chunk).hexdigest() != sums[name]:
            raise UserInputError(f"file {parts / name}", "is not what was written", "bring it again")
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks.values()))) as archive:
        archive.extractall(directory, filter="data")
    replace_file(mark, index.encode())
    return True
