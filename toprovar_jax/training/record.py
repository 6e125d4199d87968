"""``recipe.json``: what a folder of checkpoints was made with, so that nobody continues it with something else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import replace_file

RECIPE_FILE = "recipe.json"


def as_record(recipe: Any) -> dict[str, Any]:
    """A dataclass or mapping, of such things, as JSON would give it back."""
    return json.loads(json.dumps(recipe, default=dataclasses.asdict))


def read_record(directory: Path) -> dict[str, Any] | None:
    """What was written into ``directory``, None where nothing was.

    Raises:
      UserInputError: the file is damaged.
    """
    path = directory / RECIPE_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserInputError(f"file {path}", f"cannot be read ({error})", "restore it, or use another folder") from None


def keep_record(directory: Path, recipe: Any, *, resumed: bool) -> None:
    """Write ``recipe.json``, or check that the one that is there says the same.

    Args:
      directory: of the run.
      recipe: a dataclass or mapping of what JSON can hold.
      resumed: whether there are checkpoints. Without them a recipe that is there counts for nothing.

    Raises:
      UserInputError: the checkpoints were made with another recipe; names the fields that differ.
    """
    asked, path = as_record(recipe), directory / RECIPE_FILE
    stored = read_record(directory) if resumed else None
    if stored is not None:
        ours, theirs = flat(asked), flat(stored)
        names = [name for name in (*ours, *(theirs.keys() - ours.keys())) if ours.get(name) != theirs.get(name)]
        if names:
            shown = ", ".join(f"{name}={theirs.get(name)!r} (asked for: {ours.get(name)!r})" for name in names[:3])
            raise UserInputError(
                f"folder {directory} with checkpoints of {shown}",
                "must have been made with the recipe that is asked for",
                f"use another folder, or remove {path} to continue all the same",
            )
        return
    replace_file(path, (json.dumps(asked, indent=1) + "\n").encode())


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
