"""Pictures and failures, and what is recorded of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from toprovar_jax.distributed.batch import manifest, names

Layout = Literal["files", "tar"]
"""Pictures as files of their own, or those of each chunk in an archive."""

Record = dict[str, Any]
"""A row of the manifest."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to commit.

    Attributes:
      row, image: the row of the input, from 0, and the number of the picture among those of the row.
      id: what the user calls the row.
      prompt, seed: what it was made from.
      recipe: how, as JSON values.
      content: the PNG file.
    """

    row: int
    image: int
    id: str
    prompt: str
    seed: int
    recipe: Mapping[str, Any]
    content: bytes


@dataclasses.dataclass(frozen=True)
class Failure:
    """A picture that cannot be made.

    Attributes:
      row, image, id, prompt: as those of a :class:`Picture`.
      reason: why, in one line.
    """

    row: int
    image: int
    id: str
    prompt: str
    reason: str


def record_of(result: Picture | Failure, chunk: int, layout: Layout, time: str) -> Record:
    """The row of the manifest.

    Args:
      result: what was made, or not.
      chunk: the chunk it belongs to.
      layout: where its file is.
      time: when it was committed, ISO 8601 UTC.
    """
    key = names.key(result.row, result.image)
    record: Record = dict.fromkeys(manifest.COLUMNS)
    record |= {"row": result.row, "image": result.image, "key": key, "time": time}
    record |= {"id": writable(result.id), "prompt": writable(result.prompt)}
    if isinstance(result, Failure):
        return record | {"status": "failed", "reason": writable(" ".join(result.reason.split()))}
    return record | {
        "file": f"{names.shard(chunk)}:{key}.png" if layout == "tar" else names.picture(chunk, key),
        "seed": result.seed,
        "recipe": writable(json.dumps(dict(result.recipe), ensure_ascii=False, sort_keys=True)),
        "sha256": sha256(result.content),
        "bytes": len(result.content),
        "status": "made",
    }


def encode(records: Sequence[Record]) -> bytes:
    """The file that commits a batch."""
    return json.dumps(list(records), ensure_ascii=False).encode()


def decode(content: bytes | None) -> list[Record] | None:
    """The records of a committed batch; None if the file is gone, or not one."""
    try:
        records = json.loads(content or b"")
    except ValueError:
        return None
    good = isinstance(records, list) and all(
        isinstance(record, dict) and record.keys() == manifest.COLUMNS.keys() for record in records
    )
    return records if good else None


def writable(text: str) -> str:
    """``text`` as UTF-8 can hold it: JSON can name halves of characters, which become question marks."""
    return text.encode(errors="replace").decode()


def sha256(content: bytes) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
