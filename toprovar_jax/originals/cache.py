"""Original files converted once: folders of their own, found again without a look into the files."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from convert.conversion import Plan, convert, make_plan
from convert.recognise import KINDS
from convert.sources import SUFFIXES
from convert.target import CARD, TargetBusyError, leftover_bytes
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, replace_file
from toprovar_jax.originals.released import Choice
from toprovar_jax.originals.selection import TOKENIZER, Selected, select
from toprovar_jax.presets import PRESETS

Dtype = Literal["bfloat16", "exact"]

_FORMAT = 1
"""Changes when what is converted from the same files does; older folders are then left alone."""

_SPARE_BYTES = 64 << 20
_WAIT_SECONDS = 0.5


def converted_folder(
    folder: Path,
    choice: Choice,
    shelf: Path,
    *,
    dtype: Dtype,
    find_text_encoder: Callable[[], Path | None],
    progress: bool = True,
) -> Path:
    """The model folder of original files, which are converted if that has not been done yet or lacks a network.

    Args:
      folder: where they are.
      choice: see :func:`toprovar_jax.originals.selection.select`, as for ``find_text_encoder``.
      shelf: the folder of all conversions; each has its own below, named for the model and for the paths, sizes and
        times of its files. Processes that want the same one wait for each other.
      dtype: of the weights; see :func:`convert.streaming.stored_dtype`.
      progress: tell on stderr what is converted to where, and how far it is if that takes long.

    Raises:
      UserInputError: the files make up no model, are damaged, or what they become has no room.
    """
    remembered = shelf / ".chosen" / _digest(_request(folder, choice, dtype))
    name = _text(remembered)
    if name and _is_whole(shelf / name):
        return shelf / name
    selected = select(folder, choice, PRESETS, find_text_encoder)
    target = shelf / _name(selected, dtype)
    if not _is_whole(target):
        _check_place(shelf)
        plan = make_plan(selected.sources, PRESETS, model=selected.model, dtype=dtype)
        _convert(plan, selected.model, target, progress=progress)
    replace_file(remembered, target.name.encode())
    return target


def _convert(plan: Plan, model: str, target: Path, *, progress: bool) -> None:
    from tqdm import tqdm

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr, flush=True)

    waiting = False
    while not _is_whole(target):
        _check_space(plan.nbytes, target)
        if not waiting:
            say(f"converting {model} (once): {plan.nbytes / 1e9:.2f} GB into {target}")
        hidden = None if progress else True  # None: where stderr is no terminal
        with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc=model, delay=2, disable=hidden) as bar:
            try:
                damaged = (target / CARD).is_file()
                convert(plan, target, force=damaged, progress=lambda stage, nbytes: _advance(bar, nbytes))
            except TargetBusyError:
                if not waiting:
                    say("another process is converting it; waiting")
                waiting = True
            except UserInputError:
                if not _is_whole(target):  # else another process was faster between two of our steps
                    raise
        if waiting:
            time.sleep(_WAIT_SECONDS)


def _is_whole(folder: Path) -> bool:
    """Whether a conversion is there with all networks, none of which was removed since."""
    return (folder / CARD).is_file() and all((folder / kind.name).is_dir() for kind in KINDS)


def _advance(bar: Any, nbytes: int) -> None:
    bar.update(nbytes)


def _check_place(shelf: Path) -> None:
    try:
        check_output_dir(shelf)
    except UserInputError as error:
        remedy = "set TOPROVAR_MODELS to a folder with more room that can be written to"
        raise UserInputError(f"folder of converted models {shelf}", error.rule, remedy) from None


def _check_space(nbytes: int, target: Path) -> None:
    existing = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(existing).free + leftover_bytes(target)
    if free < nbytes + _SPARE_BYTES:
        raise UserInputError(
            f"folder {target.parent} with {free / 1e9:.2f} GB free",
            f"must have room for {(nbytes + _SPARE_BYTES) / 1e9:.2f} GB of converted weights",
            "free some, or set TOPROVAR_MODELS to a folder on another disk",
        )


def _request(folder: Path, choice: Choice, dtype: Dtype) -> tuple[Any, ...]:
    """All that the choice of files depends on."""
    places = [Path(value).expanduser() for key, value in choice.named().items() if key != "variant"]
    listed = [_listing(place) for place in (folder, *places)]
    return (_FORMAT, sorted(choice.named().items()), dtype, listed, [card.to_json() for card in PRESETS.values()])


def _listing(place: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of every file of weights in a folder and below it; or of the one at that path."""
    if not place.is_dir():
        return _stamps([place]) if place.is_file() else []
    endings = (*SUFFIXES, ".index.json", TOKENIZER)
    files = [*place.glob("*"), *place.glob("*/*")]
    return _stamps(sorted(path for path in files if path.name.endswith(endings) and path.is_file()))


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(path.resolve()), (found := path.stat()).st_size, found.st_mtime_ns) for path in files]


def _name(selected: Selected, dtype: Dtype) -> str:
    key = (_FORMAT, PRESETS[selected.model].to_json(), dtype, _stamps(selected.files))
    return f"{selected.model}{'-exact' * (dtype == 'exact')}-{_digest(key)[:12]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
