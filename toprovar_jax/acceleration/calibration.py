"""Calibration files: the constants that were chosen for one model, and the measurements they were chosen from.

``toprovar calibrate`` writes them, ``ToProVAR.from_calibration`` reads them. This file needs neither jax nor numpy.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from toprovar_jax.errors import UserInputError

FORMAT = 1

_SAID_ONCE = ("model", "num_scales")
"""Fields of the policy that the file states for all profiles."""

_REMEDY = "delete it and make it again with toprovar calibrate"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured of a model, and what follows from it.

    Attributes:
      model: the model's name.
      num_scales, num_layers: of the schedule and of the transformer that were measured.
      images: how many pictures were made.
      prompts_sha256: of the prompts, one a line, in UTF-8.
      date: when, as year-month-day.
      versions: of the packages that took part, by name.
      curves: the measurements, by name; nothing but a reader's understanding depends on them.
      profiles: by name, the fields of :class:`~toprovar_jax.acceleration.ToProVAR` that differ from its defaults.
    """

    model: str
    num_scales: int
    num_layers: int
    images: int
    prompts_sha256: str
    date: str
    versions: Mapping[str, str]
    curves: Mapping[str, Any]
    profiles: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> str:
        """The file's text.

        Raises:
          ValueError: a number that is not finite, which JSON does not have.
        """
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: str | pathlib.Path) -> Calibration:
        """The calibration in a file.

        Lists inside profiles become tuples, so that a profile's values can be given to the policy as they are.

        Raises:
          UserInputError: the file cannot be read, is not JSON or of another format; a field is missing, unknown or has
            a value that cannot be; or a profile does so.
        """
        fields = _json_object(path)
        if fields.get("format") != FORMAT:
            shown = json.dumps(fields.get("format"))[:40]
            raise UserInputError(
                f"calibration {path}, format {shown}", f"must be {FORMAT}", "upgrade toprovar_jax, or " + _REMEDY
            )
        fields = {name: value for name, value in fields.items() if name != "format"}
        _check_fields(str(path), fields, typing.get_type_hints(cls), required=True)
        for name in ("num_scales", "num_layers", "images"):
            if fields[name] < 1:
                raise UserInputError(f"calibration {path}: {name} {fields[name]}", "must be at least 1", _REMEDY)
        if not fields["profiles"]:
            raise UserInputError(f"calibration {path}: no profiles", "must hold at least one", _REMEDY)
        profiles = {
            name: _profile(f"{path}: profile {name!r}", values, fields["num_layers"])
            for name, values in fields["profiles"].items()
        }
        return cls(**{**fields, "profiles": profiles})


def _json_object(path: str | pathlib.Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        fields = json.loads(pathlib.Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise UserInputError(f"calibration {path}", f"must be a readable file ({reason})", "check the path") from None
    except (ValueError, RecursionError):
        raise UserInputError(f"calibration {path}", "must be JSON", _REMEDY) from None
    if not isinstance(fields, dict):
        raise UserInputError(f"calibration {path}", f"must hold one object, not {type(fields).__name__}", _REMEDY)
    return fields


def _profile(where: str, values: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The profile's values in the form the policy takes them, after it has accepted them."""
    from toprovar_jax.acceleration.toprovar import ToProVAR  # which imports this file

    hints = {name: hint for name, hint in typing.get_type_hints(ToProVAR).items() if name not in _SAID_ONCE}
    _check_fields(where, values, hints, required=False)
    converted = {name: _converted(value, hints[name]) for name, value in values.items()}
    for scores in (converted.get("layer_scores", ()), *converted.get("patterns", ())):
        if scores and len(scores) != num_layers:
            raise UserInputError(
                f"calibration {where} with scores of {len(scores)} layers", f"must have {num_layers}", _REMEDY
            )
    try:
        ToProVAR(**converted)
    except OverflowError:
        raise UserInputError(f"calibration {where}", "must hold numbers that a float can be", _REMEDY) from None
    except UserInputError as error:
        raise UserInputError(f"calibration {where}: {error.value}", error.rule, error.remedy) from None
    return converted


def _check_fields(where: str, values: Mapping[str, Any], hints: Mapping[str, Any], *, required: bool) -> None:
    known = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}
    for name, value in values.items():
        if name not in known:
            raise UserInputError(
                f"calibration {where}: field {name[:40]!r}", "is not known", "upgrade toprovar_jax, or " + _REMEDY
            )
        if not _matches(value, known[name]):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 40 else shown[:37] + "..."
            raise UserInputError(f"calibration {where}: {name} {shown}", f"must be {_named(known[name])}", _REMEDY)
    missing = [name for name in known if name not in values] if required else []
    if missing:
        raise UserInputError(f"calibration {where}", f"must have {', '.join(missing)}", _REMEDY)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value as JSON holds it can stand where ``hint`` is declared."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is tuple:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_matches(item, arguments[1]) for item in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _named(hint: Any) -> str:
    """A declared type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(option) for option in arguments)
    if origin is tuple:
        return "a list"
    plain = {str: "text", int: "an integer", float: "a number", bool: "true or false", types.NoneType: "null"}
    return plain.get(hint, "an object")


def _converted(value: Any, hint: Any) -> Any:
    """A value that matches ``hint`` in the type that is declared: JSON writes 1.0 as it likes, and knows no tuples."""
    if isinstance(value, list):
        return tuple(_converted(item, typing.get_args(hint)[0]) for item in value)
    return float(value) if hint is float else value
