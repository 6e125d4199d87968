"""The rows of a prompt file: numbered, streamed in constant memory, each checked by itself.

A broken row is a value like any other, so that one of a million stops nobody. Imports neither jax nor numpy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from toprovar_jax.distributed.batch.formats import Broken, format_of
from toprovar_jax.distributed.batch.source import Source
from toprovar_jax.errors import UserInputError
from toprovar_jax.prompts import request_of

MAX_NUM_IMAGES = 1000
"""Pictures of one row."""

_MARKS = 2**16
_MAX_ID = 200
_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class Row:
    """A record that can be drawn, as far as can be told without a model.

    Attributes:
      number: its place among the file's records, from 0.
      id: its own, or its number.
      prompt: what to draw.
      seed: its own, or None.
      settings: its own, by their names in :data:`toprovar_jax.settings.SETTINGS`.
    """

    number: int
    id: str
    prompt: str
    seed: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BrokenRow:
    """A record that cannot be drawn, what could be read of its prompt, and why, in one line."""

    number: int
    id: str
    prompt: str
    reason: str


class PromptRows:
    """The rows of a prompt file, read again and again, from anywhere; one thread at a time. A context, which closes it.

    The constructor reads the whole file once: later, every reading proves that it is still the same.

    Attributes:
      url: where it is.
      count: how many rows it has.
      bytes: its size.
      sha256: of its content.

    Args:
      url: ``.txt``: a prompt a line. ``.jsonl``: an object a line with ``"prompt"`` and, as needed, ``"id"`` and any
        key of :data:`toprovar_jax.settings.SETTINGS`. ``.csv``, ``.parquet``: tables with these columns. In the first
        two, blank lines and lines that start with ``#`` are no rows. A local path or a URL that fsspec knows.

    Raises:
      UserInputError: no such file, a kind that is not known, a table with an unknown column, or no row at all.
    """

    def __init__(self, url: str):
        self.url = url
        self._source = Source(url)
        self._format = format_of(self._source)
        self.bytes, self.sha256 = self._source.digest()
        self._stream: Iterator[tuple[int, Any]] = iter(())
        self._file: Any = None
        self._next = -1
        self._marks: list[int] = []
        self._stride = 256
        self.count = self._count()
        if not self.count:
            raise UserInputError(f"prompts file {url}", "must hold at least one prompt", "write one prompt a line")

    def read(self, first: int, count: int) -> list[Row | BrokenRow]:
        """Rows from ``first`` on: ``count`` of them, or as many as there are.

        Raises:
          UserInputError: the file has vanished or changed since.
        """
        count = min(count, self.count - first)
        try:
            self._source.check()
            if self._next != first:
                self._go_to(first)
            records = [record for _, record in itertools.islice(self._stream, count)]
        except OSError as error:
            self._next = -1
            raise self._source.changed(f"become unreadable ({(error.strerror or str(error)).lower()})") from None
        self._next = first + len(records)
        if len(records) != count:
            raise self._source.changed("changed")
        return [self._row(first + place, record) for place, record in enumerate(records)]

    def __enter__(self) -> PromptRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file, self._next = None, -1

    def _count(self) -> int:
        number = 0
        with self._source.open() as file:
            place = self._format.start(file)
            for behind, _ in self._format.records(file, place):
                if number % self._stride == 0:
                    self._marks.append(place)
                    if len(self._marks) > _MARKS:
                        self._marks, self._stride = self._marks[::2], 2 * self._stride
                place, number = behind, number + 1
        return number

    def _go_to(self, row: int) -> None:
        self.close()
        self._file = self._source.open()
        self._stream = self._format.records(self._file, self._marks[row // self._stride])
        for _ in itertools.islice(self._stream, row % self._stride):
            pass

    def _row(self, number: int, record: Any) -> Row | BrokenRow:
        origin, name, prompt = f"row {number}", str(number), ""
        try:
            if isinstance(record, Broken):
                raise record
            prompt = record if isinstance(record, str) else ""
            fields = self._format.fields(record, origin)
            prompt = fields.get("prompt", "")
            name = _id_of(fields.pop("id", None), origin, name)
            request = request_of(fields, origin)
            check_num_images(request.overrides.get("num_images", 1), f"{origin}: num_images")
        except Broken as error:
            return BrokenRow(number, name, _shown(prompt), f"{origin}: {error}")
        except UserInputError as error:
            return BrokenRow(number, name, _shown(prompt), str(error))
        return Row(number, name, request.prompt, request.seed, request.overrides)


def check_num_images(count: int, label: str) -> None:
    """Refuses more pictures of one row than a chunk's batches should hold in memory.

    Raises:
      UserInputError: more than ``MAX_NUM_IMAGES``.
    """
    if count > MAX_NUM_IMAGES:
        raise UserInputError(
            f"{label} {count}", f"must be at most {MAX_NUM_IMAGES}", "write the prompt in several rows"
        )


def _id_of(given: Any, origin: str, default: str) -> str:
    if given is None:
        return default
    name = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else ""
    if not name.strip() or len(name) > _MAX_ID or not name.isprintable():
        shown = repr(given)
        rule = f"must be a number or a printable text of 1 to {_MAX_ID} characters"
        raise UserInputError(f"{origin}: id {shown[:60]}", rule, "leave it out for the row's number")
    return name


def _shown(prompt: Any) -> str:
    """What can be kept of a prompt that is not one."""
    text = prompt if isinstance(prompt, str) else repr(prompt)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:_SHOWN]
