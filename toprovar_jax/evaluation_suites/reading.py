"""Reading prompt files of public benchmarks: a mistake is one line that names the file, the place and the rule."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from toprovar_jax.errors import UserInputError
from toprovar_jax.evaluation_suites.suite import SuitePrompt
from toprovar_jax.prompts import lines_of, read_text
from toprovar_jax.settings import check_setting

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def read_json(path: pathlib.Path, what: str = "prompts file") -> Any:
    """A JSON file in which no key is given twice.

    Raises:
      UserInputError: it cannot be read, or is not JSON.
    """
    return _parsed(read_text(path, what).lstrip("\ufeff"), path.name)


def read_json_lines(path: pathlib.Path, what: str = "prompts file") -> list[tuple[str, str, dict[str, Any]]]:
    """Of each line of a JSONL file that is not blank: where it is, its text and its object.

    Raises:
      UserInputError: the file cannot be read, or a line is no JSON object.
    """
    found = []
    for number, line in enumerate(lines_of(read_text(path, what)), start=1):
        text = line.strip().lstrip("\ufeff").strip()
        if text:
            origin = f"{path.name} line {number}"
            found.append((origin, text, checked(_parsed(text, origin, lines=False), dict, origin)))
    return found


def checked(value: Any, kind: type, origin: str) -> Any:
    """``value``, if it is of this JSON type.

    Raises:
      UserInputError: it is not.
    """
    if not isinstance(value, kind):
        names = {dict: "a JSON object", list: "a JSON list", str: "text"}
        refuse(origin, f"must be {names[kind]}, not {type(value).__name__}")
    return value


def field(record: dict[str, Any], key: str, kind: type, origin: str) -> Any:
    """``record[key]``, if it is there and of this JSON type.

    Raises:
      UserInputError: it is not.
    """
    if key not in record:
        refuse(origin, f'must have the key "{key}"')
    return checked(record[key], kind, f"{origin}: {key}")


def prompt_text(value: Any, origin: str) -> str:
    """``value``, if it is a prompt.

    Raises:
      UserInputError: it is not text, or blank.
    """
    return check_setting("prompt", checked(value, str, origin), label=origin)


def file_part(name: str, origin: str) -> str:
    """``name``, if it can be part of a file name everywhere and cannot lead out of a folder.

    Raises:
      UserInputError: it cannot be.
    """
    if not _NAME.fullmatch(name):
        refuse(f"{origin}: {name[:40]!r}", "must be a file name of ASCII letters, digits, dots, dashes and underscores")
    return name


def distinct(prompts: Sequence[SuitePrompt], path: pathlib.Path) -> list[SuitePrompt]:
    """``prompts``, if there are any and no two would have the same files, whatever the file system.

    Raises:
      UserInputError: otherwise.
    """
    if not prompts:
        refuse(f"prompts {path}", "must hold at least one prompt")
    seen: dict[str, int] = {}
    for prompt in prompts:
        if (first := seen.setdefault(prompt.name.casefold(), prompt.number)) != prompt.number:
            refuse(f"{path.name}: {prompt.name!r}", f"must not be there twice (prompts {first} and {prompt.number})")
    return list(prompts)


def digest(paths: Iterable[pathlib.Path]) -> str:
    """SHA-256 of a file; of several, of what ``sha256sum`` prints about them in this order."""
    sums = [(hashlib.sha256(path.read_bytes()).hexdigest(), path.name) for path in paths]
    if len(sums) == 1:
        return sums[0][0]
    return hashlib.sha256("".join(f"{told}  {name}\n" for told, name in sums).encode("utf-8")).hexdigest()


def refuse(value: str, rule: str, remedy: str = "give the suite's own file, as it was published") -> NoReturn:
    """Raises the error of a prompt file that is not what it should be."""
    raise UserInputError(value, rule, remedy) from None


def _parsed(text: str, origin: str, *, lines: bool = True) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key, value in found:
            if key in record:
                refuse(f"{origin}: key {key[:40]!r}", "must not be given twice")
            record[key] = value
        return record

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"{origin} line {error.lineno}" if lines else origin
        refuse(where, f"must be JSON ({error.msg}, column {error.colno})")
    except UserInputError:
        raise
    except (ValueError, RecursionError) as error:
        refuse(origin, f"must be JSON ({error})")
