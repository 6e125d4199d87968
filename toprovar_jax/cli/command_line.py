"""Reading any command's line: options are a dataclass of texts and flags, mistakes are one line that names the word."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from toprovar_jax.errors import UserInputError

Options = TypeVar("Options")


def option(metavar: str, help: str) -> Any:
    """The annotation of one option: how its value is called, and what it is for."""
    return arg(metavar=metavar, help=help, help_behavior_hint="")


def flag_of(name: str) -> str:
    """How a field is typed."""
    return "--" + name.replace("_", "-")


def read_command_line(options: type[Options], argv: Sequence[str], *, prog: str, description: str) -> Options:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      options: a dataclass whose fields are the options. Booleans are flags; all other values stay as they were typed.
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.
      description: what the command does, for ``--help``.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    fields = {flag_of(field.name): field for field in dataclasses.fields(options)}  # pyright: ignore[reportArgumentType]
    _refuse_missing_values(argv, fields)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read, unknown = tyro.cli(
                options,
                args=list(argv),
                prog=prog,
                description=description,
                config=(FlagCreatePairsOff,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        words = "".join(character for character in said.getvalue() if character not in "╭╮╰╯│─")
        raise UserInputError("options", f"could not be read ({' '.join(words.split())})", "see --help") from None
    if unknown:
        raise _unexpected(unknown[0], fields)
    return read


def _refuse_missing_values(argv: Sequence[str], fields: Mapping[str, dataclasses.Field[Any]]) -> None:
    for word, following in itertools.zip_longest(argv, argv[1:]):
        field = fields.get(word.replace("_", "-"))
        if field is None or isinstance(field.default, bool):
            continue
        if following is None or following.startswith("--") or (following.startswith("-") and not _is_number(following)):
            hint = f" (a value that starts with a dash is written {word}=VALUE)" if following else ""
            raise UserInputError(word, "needs a value", f"write one after it{hint}")


def _is_number(text: str) -> bool:
    try:
        float(text.split(",")[0])
    except ValueError:
        return False
    return True


def _unexpected(word: str, fields: Mapping[str, dataclasses.Field[Any]]) -> UserInputError:
    if word.startswith("-"):
        name = word.partition("=")[0]
        close = difflib.get_close_matches(name, fields, n=1)
        return UserInputError(f"option {name}", "is not known", f"did you mean {close[0]}?" if close else "see --help")
    return UserInputError(f"{word!r}", "belongs to no option", "put a prompt of several words in quotes")
