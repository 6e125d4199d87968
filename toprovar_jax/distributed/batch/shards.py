"""Archives of pictures as webdataset readers know them; the bytes depend on what is in them and nothing else.

The files of a picture have its key as their name up to the first dot, and follow one another. No member carries a
time, a user or a host.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator, Mapping


def members(key: str, picture: bytes, prompt: str, about: str) -> dict[str, bytes]:
    """The files of one picture: ``.png``, ``.txt`` with its prompt and ``.json`` with what is known about it."""
    return {f"{key}.json": about.encode(), f"{key}.png": picture, f"{key}.txt": prompt.encode()}


def pieces(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """The bytes of an archive of ``files``, sorted by name, piece by piece."""
    length = 0
    for name, content in sorted(files.items()):
        header = tarfile.TarInfo(name)
        header.size = len(content)
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        for piece in (header.tobuf(tarfile.USTAR_FORMAT), content, padding):
            yield piece
            length += len(piece)
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(length + end) % tarfile.RECORDSIZE)


def unpack(archive: bytes) -> dict[str, bytes]:
    """The files of an archive by name; of a damaged one, those before the damage."""
    files = {}
    with (
        contextlib.suppress(tarfile.TarError, OSError),
        tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as file,
    ):
        for header in file:
            content = file.extractfile(header)
            if content is not None:
                files[header.name] = content.read()
    return files
