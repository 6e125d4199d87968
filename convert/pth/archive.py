"""Where the entries of a zip archive lie, found without copying, unpacking or trusting anything.

Written for what ``torch.save`` makes: entries stored as they are, one after another, so that each can be used in place
in a memory map. Every offset and length is checked against the file before it is used. No name is ever used
as a path. Field layouts: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to
4.3.16 (ends of it) and 4.5.3 (the 64-bit extra field).
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import struct

from convert.pth.refusal import RESAVE, RefusalError, shown

_LOCAL, _CENTRAL = struct.Struct("<4s22xHH"), struct.Struct("<4s4xHHxxxx4xIIHHHxxxx4xI")
_END, _END64_LOCATOR, _END64 = struct.Struct("<4s6xHIIH"), struct.Struct("<4s4xQ4x"), struct.Struct("<4s28xQQQ")
_LONGEST_COMMENT = 65535
_SATURATED = 0xFFFFFFFF
_MOST_ENTRIES = 200_000
_LONGEST_NAME = 1_000
_STORED, _ENCRYPTED = 0, 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry: its bytes are those from ``start`` to ``stop`` of the file, as they are unless ``compressed``."""

    start: int
    stop: int
    compressed: bool


def entries_of(data: mmap.mmap) -> dict[str, Entry]:
    """The entries of the zip archive ``data`` by name.

    Raises:
      RefusalError: not a zip archive, or a damaged one; or one with an entry that is encrypted, given twice, cut off by
        the end of the file, or on top of another one.
    """
    count, start, stop = _directory(data)
    entries: dict[str, Entry] = {}
    extents = []
    at = start
    for _ in range(count):
        name, offset, size, compressed, at = _central_header(data, at, stop)
        if name in entries:
            raise RefusalError(f"gives the zip entry {shown(name)} twice")
        entries[name] = _entry(data, name, offset, size, compressed)
        extents.append((offset, entries[name].stop))
    extents.sort()
    # The directory itself comes last: what reaches into it overlaps too.
    extents.append((start, stop))
    if any(end > after for (_, end), (after, _) in itertools.pairwise(extents)):
        raise RefusalError("has zip entries that overlap")
    return entries


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """Number of entries in the central directory, where it starts and where it ends."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - _END.size - _LONGEST_COMMENT))
    if end < 0 or end + _END.size > len(data):
        raise RefusalError("is not a whole zip archive: it has no directory at its end")
    _, count, size, start, comment = _END.unpack_from(data, end)
    if end + _END.size + comment != len(data):
        raise RefusalError("is not a whole zip archive: its directory does not end where the file does")
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        (end,) = _END64_LOCATOR.unpack_from(data, locator)[1:]
        if end + _END64.size > locator or data[end : end + 4] != b"PK\6\6":
            raise RefusalError("has a damaged zip directory")
        _, count, size, start = _END64.unpack_from(data, end)
    if start + size != end or count * _CENTRAL.size > size:
        raise RefusalError("has a damaged zip directory")
    if count > _MOST_ENTRIES:
        raise RefusalError(f"has {count:,} zip entries where {_MOST_ENTRIES:,} is the most", RESAVE)
    return count, start, end


def _central_header(data: mmap.mmap, at: int, stop: int) -> tuple[str, int, int, bool, int]:
    """Of the directory entry ``at``: name, offset of the local header, bytes, whether compressed; where the next is."""
    if at + _CENTRAL.size > stop:
        raise RefusalError("has a damaged zip directory")
    signature, flags, method, packed, size, name_size, extra_size, comment_size, offset = _CENTRAL.unpack_from(data, at)
    name_start = at + _CENTRAL.size
    extra_start = name_start + name_size
    after = extra_start + extra_size + comment_size
    if signature != b"PK\1\2" or after > stop or name_size > _LONGEST_NAME:
        raise RefusalError("has a damaged zip directory")
    try:
        name = data[name_start:extra_start].decode("utf-8")
    except UnicodeDecodeError:
        raise RefusalError("has a zip entry whose name is not UTF-8") from None
    size, packed, offset = _widened(data[extra_start : extra_start + extra_size], size, packed, offset)
    if flags & _ENCRYPTED:
        raise RefusalError(f"has the encrypted zip entry {shown(name)}", RESAVE)
    if method == _STORED and packed != size:
        raise RefusalError(f"gives the zip entry {shown(name)} two lengths")
    return name, offset, packed, method != _STORED, after


def _widened(extra: bytes, *values: int) -> list[int]:
    """The values, those that do not fit into 32 bits replaced by what the 64-bit extra field says, in its order."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    missing = values.count(_SATURATED)
    if len(wide) < 8 * missing:
        raise RefusalError("has a damaged zip directory")
    numbers = iter(struct.unpack_from(f"<{missing}Q", wide))
    return [next(numbers) if value == _SATURATED else value for value in values]


def _entry(data: mmap.mmap, name: str, offset: int, size: int, compressed: bool) -> Entry:
    """Where the content of an entry lies whose local header is at ``offset``; it must agree with the directory."""
    if offset + _LOCAL.size > len(data):
        raise RefusalError(f"ends before its zip entry {shown(name)}")
    signature, name_size, extra_size = _LOCAL.unpack_from(data, offset)
    start = offset + _LOCAL.size
    if signature != b"PK\3\4" or data[start : start + name_size] != name.encode("utf-8"):
        raise RefusalError(f"has no zip entry {shown(name)} where its directory says")
    start += name_size + extra_size
    if start + size > len(data):
        raise RefusalError(f"ends before its zip entry {shown(name)} does")
    return Entry(start, start + size, compressed)
