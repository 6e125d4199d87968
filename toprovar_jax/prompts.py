"""Prompt files: one prompt a line, or one JSON object a line with its own seed and settings."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.settings import SETTINGS, check_setting

_PEOPLE = (
    *("man", "woman", "men", "women", "boy", "girl", "child", "person", "human", "adult", "teenager", "employee"),
    *("employer", "worker", "mother", "father", "sister", "brother", "grandmother", "grandfather", "son", "daughter"),
)
_EXAMPLE = 'write one such as {"prompt": "a red sphere", "seed": 1}'
_FACES = ". very smooth faces, good looking faces, face to the camera, perfect facial features"


@dataclasses.dataclass(frozen=True)
class PromptRequest:
    """One line of a prompt file.

    Attributes:
      prompt: what to draw.
      seed: its own seed, or None for the command's.
      overrides: settings of this line alone, by their names in :data:`toprovar_jax.settings.SETTINGS`.
      origin: where it was written (``"prompts.txt line 3"``), for messages about it; empty if not from a file.
    """

    prompt: str
    seed: int | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = ""


def read_prompts(path: str | pathlib.Path) -> list[PromptRequest]:
    """The requests of a prompt file, in its order.

    Args:
      path: ``.txt``: a prompt a line; blank lines and lines that start with ``#`` are skipped. ``.jsonl``: an object
        a line with ``"prompt"`` and, as needed, ``"seed"`` and any other key of
        :data:`toprovar_jax.settings.SETTINGS`; blank lines are skipped. UTF-8; a line may end as on any system, and
        byte-order marks at its start are dropped (joining files leaves them in the middle).

    Raises:
      UserInputError: the file cannot be read, is not text or holds no prompt; or a line is not what it should be, in
        which case the message carries the line number.
    """
    path = pathlib.Path(path)
    readers = {".txt": _text_line, ".jsonl": _json_line}
    read_line = readers.get(path.suffix.lower())
    if read_line is None:
        raise UserInputError(
            f"prompts file {path}", "must end in .txt (a prompt a line) or .jsonl (an object a line)", "rename it"
        )
    requests = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        content = line.strip().lstrip("\ufeff").strip()
        if content:
            request = read_line(content, f"{path.name} line {number}")
            requests += [request] if request else []
    if not requests:
        raise UserInputError(f"prompts file {path}", "must hold at least one prompt", "write one prompt a line")
    return requests


def with_positive_prompt(prompt: str) -> str:
    """``prompt`` with the standard words for good faces appended once, if it speaks of people (MODEL_SPEC 2.5).

    The test is a case-sensitive substring search, as in the original, so "many" and "season" count as people too.
    """
    speaks_of_people = any(word in prompt for word in _PEOPLE)
    return prompt + _FACES if speaks_of_people and _FACES not in prompt else prompt


def lines_of(text: str) -> list[str]:
    """``text`` at its line ends alone: ``str.splitlines`` would also part it at separators that prompts may hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_text(path: pathlib.Path, what: str = "prompts file") -> str:
    """The text of a UTF-8 file, which messages call ``what``.

    Raises:
      UserInputError: the file cannot be read or is not text; in the second case the message carries the line number.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise UserInputError(f"{what} {path}", f"must be a readable file ({reason})", "check the path") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(lines_of(raw[: error.start].decode("utf-8")))
        raise UserInputError(f"{what} {path} line {line}", "must be UTF-8 text", "save the file as UTF-8") from None
    if "\0" in text:
        line = len(lines_of(text[: text.index("\0")]))
        raise UserInputError(
            f"{what} {path} line {line}", "must be text, but holds binary data", "save the file as UTF-8 text"
        )
    return text


def _text_line(line: str, origin: str) -> PromptRequest | None:
    return None if line.startswith("#") else PromptRequest(check_setting("prompt", line, label=origin), origin=origin)


def _json_line(line: str, origin: str) -> PromptRequest:
    return request_of(json_object(line, origin), origin)


def json_object(line: str, origin: str) -> dict[str, Any]:
    """The object that a line of JSON holds; messages call the line ``origin``.

    Raises:
      UserInputError: not JSON, not an object, or a key that is given twice.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key, value in pairs:
            if key in record:
                raise UserInputError(f"{origin}: key {key[:40]!r}", "must not be given twice", "keep one of them")
            record[key] = value
        return record

    try:
        record = json.loads(line, object_pairs_hook=distinct)
    except UserInputError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserInputError(origin, f"must be a JSON object ({error})", _EXAMPLE) from None
    if not isinstance(record, dict):
        raise UserInputError(origin, f"must be a JSON object, not {type(record).__name__}", _EXAMPLE)
    return record


def request_of(record: Mapping[str, Any], origin: str) -> PromptRequest:
    """The request that a record with a prompt and settings makes; messages call it ``origin``.

    Raises:
      UserInputError: a key that is no setting, no prompt, or a value that is not legal.
    """
    for key in record:
        if key not in SETTINGS:
            error = unknown_name("key", key, SETTINGS)
            raise UserInputError(f"{origin}: {error.value}", error.rule, error.remedy)
    if "prompt" not in record:
        raise UserInputError(origin, 'must have the key "prompt"', _EXAMPLE)
    values = {key: check_setting(key, value, label=f"{origin}: {key}") for key, value in record.items()}
    return PromptRequest(values.pop("prompt"), values.pop("seed", None), values, origin)
