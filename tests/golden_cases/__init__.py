"""Runs the library on a folder of reference outputs and measures how far apart they are (tests/golden/README.md).

What a folder holds is read off its config.json: a transformer with runs, an image tokenizer, a text encoder, building
blocks, or all three networks end to end. Sizes, schedules, batch, guidance and file names are the folder's own.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .blocks import run_blocks
from .findings import EXACT, Reference
from .inputs import runs_of
from .tokenizer import run_tokenizer
from .transformer import run_end_to_end, run_t5, run_transformer


@dataclasses.dataclass(frozen=True)
class Unit:
    """One file of one case: the smallest thing that can be run on its own."""

    folder: Path
    kind: str
    file: str

    def __str__(self) -> str:
        return f"{self.folder.name}/{self.file}"


def find_units(directory: Path) -> list[Unit]:
    """Every file of every case at or below ``directory``; files that a config.json names but that are not there too."""
    units = []
    folders = {path.parent for pattern in ("config.json", "*.npz") for path in directory.rglob(pattern)}
    for folder in sorted(folders):
        config = _read_config(folder)
        named = [run["file"] for run in runs_of(config) if "file" in run]
        present = [path.name for path in sorted(folder.glob("*.npz"))]
        for file in dict.fromkeys([*named, *present] or ["io.npz"]):
            units.append(Unit(folder, _kind(folder, config), file))
    return units


def run_unit(unit: Unit) -> Reference:
    """Everything measured on one file. A file that cannot be read or used gives one finding that says so."""
    try:
        with (unit.folder / unit.file).open("rb") as file, np.load(file) as archive:
            reference = Reference({name: archive[name] for name in archive.files})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reference = Reference({})
        reference.state("file", float("inf"), EXACT, f"unreadable: {_one_line(error)}")
        return reference
    if unit.kind not in _RUNNERS:
        reference.state("config.json", float("inf"), EXACT, "missing, unreadable, or describes no known kind of case")
        return reference
    try:
        _RUNNERS[unit.kind](_read_config(unit.folder), unit.folder, unit.file, reference)
    except Exception as error:  # whatever is wrong with one case, the others still run
        reference.state("case", float("inf"), EXACT, f"cannot be run: {_one_line(error)}")
        reference.unused.clear()
    return reference


_RUNNERS = {
    "transformer": run_transformer,
    "tokenizer": run_tokenizer,
    "t5": run_t5,
    "blocks": run_blocks,
    "end_to_end": run_end_to_end,
}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}"


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    if {"t5", "model", "vae"} <= config.keys():
        return "end_to_end"
    if "model" in config:
        return "transformer" if runs_of(config) else "blocks"
    return "tokenizer" if "vae" in config else "t5" if "t5" in config else "unknown"


__all__ = ["EXACT", "Reference", "Unit", "find_units", "run_unit"]
