"""What prompt files are made of: lines of text or JSON, tables as CSV or Parquet; each a stream of raw records.

A record's place is where the next one begins, so that reading can start again anywhere. Imports neither jax nor numpy.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from toprovar_jax.distributed.batch.source import MAX_LINE, Readable, Source, lines_of_bytes
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.prompts import json_object
from toprovar_jax.settings import SETTINGS, parse_setting

COLUMNS = ("prompt", "id", *(name for name in SETTINGS if name != "prompt"))
"""What a record may say."""

_INTEGERS = ("seed", "num_images", "top_k", "stop_after_scale")
_PARQUET_ROWS = 1024


class Broken(Exception):
    """A record that cannot be read; the message says why."""


@runtime_checkable
class Format(Protocol):
    """How one kind of file is read."""

    def start(self, file: Readable) -> int:
        """The place of the first record; refuses a file that as a whole is not what it should be."""
        ...

    def records(self, file: Readable, place: int) -> Iterator[tuple[int, Any]]:
        """From a place on: the place behind each record, and the record as it was found, which may be an exception."""
        ...

    def fields(self, record: Any, origin: str) -> dict[str, Any]:
        """What the record says, by name; UserInputError or :class:`Broken` if it is not what it should be."""
        ...


class TextLines:
    """A prompt a line; blank lines and lines that start with ``#`` are no records."""

    def start(self, file: Readable) -> int:
        """The first byte."""
        return 0

    def records(self, file: Readable, place: int) -> Iterator[tuple[int, str | Broken]]:
        """The lines that say something."""
        for end, line in lines_of_bytes(file, place):
            if line is None:
                yield end, Broken(f"must be a line of at most {MAX_LINE} bytes")
                continue
            text = line.decode("utf-8", "surrogateescape").strip().lstrip("\ufeff").strip()
            if text and not text.startswith("#"):
                yield end, text

    def fields(self, record: str, origin: str) -> dict[str, Any]:
        """The line as a prompt."""
        return {"prompt": _decoded(record)}


class JsonLines(TextLines):
    """A JSON object a line."""

    def fields(self, record: str, origin: str) -> dict[str, Any]:
        """The object."""
        return json_object(_decoded(record), origin)


class Csv:
    """A table with a header; empty cells say nothing, cells in quotes may hold line ends.

    Args:
      source: for messages about the file.
    """

    def __init__(self, source: Source):
        self._source = source
        self._columns: list[str] = []

    def start(self, file: Readable) -> int:
        """The place behind the header."""
        for place, record in self.records(file, 0):
            if isinstance(record, Broken):
                break
            self._columns = [cell.strip().lstrip("\ufeff").strip() for cell in record]
            check_columns(self._columns, self._source)
            return place
        raise UserInputError(f"prompts file {self._source.url}", "must begin with a header", "such as id,prompt,seed")

    def records(self, file: Readable, place: int) -> Iterator[tuple[int, list[str] | Broken]]:
        """The cells of each row. Of one that cannot be read, as with a quote that nobody closes, a line is lost."""
        lines = _CsvLines(file, place)
        reader = csv.reader(lines, strict=True)
        while True:
            lines.second = None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                behind = lines.place if lines.second is None else lines.second
                yield behind, Broken(f"must be a row of comma-separated values ({error})")
                lines = _CsvLines(file, behind)
                reader = csv.reader(lines, strict=True)
            else:
                if cells:
                    yield lines.place, cells

    def fields(self, record: list[str], origin: str) -> dict[str, Any]:
        """The cells that say something, by column."""
        if len(record) > len(self._columns):
            raise Broken(f"has {len(record)} cells, the header {len(self._columns)}")
        found: dict[str, Any] = {}
        for name, cell in zip(self._columns, record, strict=False):
            if cell:
                found[name] = _from_text(name, _decoded(cell), origin)
        return found


class Parquet:
    """A table in Parquet, read row group by row group; a place is the number of a row.

    Args:
      source: for messages about the file.
    """

    def __init__(self, source: Source):
        self._source = source
        try:
            import pyarrow.parquet as pq
        except ImportError:
            rule = "needs pyarrow, which is not installed"
            raise UserInputError(f"prompts file {source.url}", rule, "pip install 'toprovar-jax[batch]'") from None
        self._open: Callable[[Readable], Any] = pq.ParquetFile

    def start(self, file: Readable) -> int:
        """Row 0."""
        try:
            names = self._open(file).schema_arrow.names
        except (ValueError, OSError) as error:  # pyarrow's errors are of these kinds
            rule = f"must be a Parquet file ({error})"
            raise UserInputError(f"prompts file {self._source.url}", rule, "write it again") from None
        check_columns(names, self._source)
        return 0

    def records(self, file: Readable, place: int) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
        """Rows by column."""
        table = self._open(file)
        counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        first = 0
        for group, count in enumerate(counts):
            if first + count > place:
                number = first
                for batch in self._batches(table, group):
                    for row in range(max(0, place - number), batch.num_rows):
                        yield number + row + 1, _row(batch, row)
                    number += batch.num_rows
            first += count

    def _batches(self, table: Any, group: int) -> Iterator[Any]:
        try:
            yield from table.iter_batches(_PARQUET_ROWS, row_groups=[group], use_threads=False)
        except (ValueError, OSError) as error:  # as above
            reason = " ".join(str(error).split())
            rule = f"must be a Parquet file whose rows can be read ({reason})"
            raise UserInputError(f"prompts file {self._source.url}", rule, "write it again") from None

    def fields(self, record: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """The values that are not null; where a table holds integers as floating-point numbers, integers."""
        found = {}
        for name, value in record.items():
            if isinstance(value, float) and name in _INTEGERS and (math.isnan(value) or value.is_integer()):
                value = None if math.isnan(value) else int(value)
            if value is not None:
                found[name] = value
        return found


def format_of(source: Source) -> Format:
    """How a file is read, by the ending of its name.

    Raises:
      UserInputError: an ending that is none of these, or a package that is missing.
    """
    makers: dict[str, Callable[[], Format]] = {
        ".txt": TextLines,
        ".jsonl": JsonLines,
        ".csv": lambda: Csv(source),
        ".parquet": lambda: Parquet(source),
    }
    for ending, make in makers.items():
        if source.name.lower().endswith(ending):
            return make()
    raise UserInputError(f"prompts file {source.url}", f"must end in {', '.join(makers)}", "rename or convert it")


def check_columns(names: Iterable[str], source: Source) -> None:
    """Refuses a table without prompts, or with a column that nobody would read.

    Raises:
      UserInputError: a column is unknown, there twice or missing.
    """
    names = list(names)
    for name in names:
        if name not in COLUMNS:
            error = unknown_name(f"prompts file {source.url}: column", name, COLUMNS)
            raise UserInputError(error.value, error.rule, f"{error.remedy}, or leave it out")
        if names.count(name) > 1:
            raise UserInputError(f"prompts file {source.url}: column {name!r}", "is there twice", "leave one out")
    if "prompt" not in names:
        raise UserInputError(f"prompts file {source.url}", "must have the column prompt", "name it so in the header")


class _CsvLines:
    """Lines as :mod:`csv` wants them.

    Attributes:
      place: where the next one begins.
      second: where the second line begins of those read since this was last None.
    """

    def __init__(self, file: Readable, place: int):
        self._lines = lines_of_bytes(file, place)
        self.place = place
        self.second: int | None = None

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.place, line = next(self._lines)
        self.second = self.place if self.second is None else self.second
        if line is None:
            raise csv.Error(f"a line of more than {MAX_LINE} bytes")
        return line.decode("utf-8", "surrogateescape")


def _row(batch: Any, row: int) -> dict[str, Any] | Broken:
    try:
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return Broken("must be UTF-8 text")


def _decoded(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Broken("must be UTF-8 text") from None
    return text


def _from_text(name: str, text: str, origin: str) -> Any:
    if name in ("prompt", "id"):
        return text
    if name == "positive_prompt":
        return {"true": True, "false": False}.get(text.lower(), text)
    return parse_setting(name, text, label=f"{origin}: {name}")
