"""The manifest: one row per picture or failure, in Parquet; parts of one chunk each, and all of them in one file."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toprovar_jax.distributed.batch import names
from toprovar_jax.distributed.batch.storage import Storage
from toprovar_jax.errors import UserInputError

COLUMNS = {
    "row": "int64",
    "image": "int32",
    "id": "string",
    "key": "string",
    "file": "string",
    "prompt": "string",
    "seed": "int64",
    "recipe": "string",
    "sha256": "string",
    "bytes": "int64",
    "time": "string",
    "status": "string",
    "reason": "string",
}
"""Names and Arrow types. ``file``, ``seed``, ``recipe``, ``sha256`` and ``bytes`` are null for what has failed,
``reason`` for what has not."""

_ROW_GROUP = 50_000
"""How many rows are in memory together, at least, and in a group of the file."""


def check_available() -> None:
    """Refuses to go on without the package that writes Parquet, before anything is made."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserInputError(
            "the manifest", "is a Parquet file, which needs pyarrow", "pip install 'toprovar-jax[batch]'"
        )


def encode(records: Sequence[Mapping[str, Any]]) -> bytes:
    """A part: the rows in the order of their keys."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    rows = sorted(records, key=lambda record: (record["row"], record["image"]))
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=_schema()), content, compression="zstd")
    return content.getvalue()


def failed_rows(name: str, part: bytes) -> int:
    """How many rows of the input have failed, in full or in part, according to a part.

    Raises:
      UserInputError: the part, which is called ``name``, is damaged.
    """
    table = _decode(name, part, ["row", "status"]).to_pydict()
    return len({row for row, status in zip(table["row"], table["status"], strict=True) if status == "failed"})


def assemble(storage: Storage, chunks: Iterable[int]) -> None:
    """Writes the manifest of all ``chunks`` from their parts, of which few are in memory at a time.

    Raises:
      UserInputError: a part is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [names.part(chunk) for chunk in chunks]
    held, rows = [], 0
    with storage.writing(names.MANIFEST) as file, pq.ParquetWriter(file, _schema(), compression="zstd") as writer:
        for name, part in zip(parts, storage.read_all(parts), strict=True):
            held.append(_decode(name, part or b"", None))
            rows += len(held[-1])
            if rows >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held, rows = [], 0
        if held:
            writer.write_table(pa.concat_tables(held))


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])


def _decode(name: str, part: bytes, columns: list[str] | None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not pq.read_schema(io.BytesIO(part)).equals(_schema()):
            raise ValueError("other columns")
        return pq.read_table(io.BytesIO(part), columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserInputError(
            f"manifest part {name}",
            f"is damaged ({str(error).splitlines()[0]})",
            "remove it and start again: its chunk is made again",
        ) from None
