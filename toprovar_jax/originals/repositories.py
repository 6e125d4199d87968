"""Which files of a repository on the hub make up the wanted model."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.originals.released import (
    RELEASED,
    REPOSITORY,
    TEXT_ENCODER_REPOSITORY,
    Choice,
    preset_spelled,
    released_model,
    same_name,
    variants,
)
from toprovar_jax.originals.remote import (
    SUFFIXES,
    Need,
    cached_snapshot,
    fetch,
    files_of,
    is_repository_name,
    list_cached,
    list_files,
)

_CARD = "model.json"
_PARTS = ("transformer", "image_tokenizer", "text_encoder")
_BESIDE = ("tokenizer.json", "calibration.json")
"""What a converted model consists of beside its card; the last file need not be there."""


def fetch_model(repository: str, choice: Choice, *, progress: bool = True) -> tuple[Path, Choice]:
    """Brings the files of one model to this machine, and no others.

    Args:
      repository: ``"owner/name"``, of original files or of a converted model.
      choice: which; a variant is needed where the repository holds several.
      progress: show the hub's progress bars.

    Returns:
      A folder that holds the files, others of earlier calls perhaps among them; and the choice among them.

    Raises:
      UserInputError: no such repository or variant, or files that cannot be fetched.
    """
    listing: list[str] = []
    if repository != REPOSITORY:
        converted = _converted(list_cached(repository))
        listing = converted or list_files(repository)
        if _CARD in listing:
            return _fetch_converted(repository, listing, progress), choice
    entry, model = _transformer(repository, choice.variant, listing)
    entries = [entry, *_vaes(choice.vae, model, listing)]
    beside = [folder for folder in _folders(listing) if "t5" in folder.lower()][:1]
    text_encoder = choice.text_encoder
    if text_encoder is None:
        entries += [*beside, *(name for folder in beside if (name := f"{folder}/tokenizer.json") in listing)]
        text_encoder = None if beside else TEXT_ENCODER_REPOSITORY
    elif Path(text_encoder).expanduser().exists():
        text_encoder = None
    wanted = [Need(repository, tuple(dict.fromkeys(entries)))]
    if text_encoder is not None:
        wanted.append(_text_encoder(text_encoder))
    folders = fetch(wanted, progress=progress)
    variant = model or choice.variant or PurePosixPath(entry).name or None
    found = dataclasses.replace(choice, variant=variant)
    return folders[0], dataclasses.replace(found, text_encoder=str(folders[1])) if folders[1:] else found


def fetch_text_encoder(choice: Choice, *, progress: bool = True) -> Choice:
    """The choice with a path in place of a text encoder's repository, which is fetched.

    Raises:
      UserInputError: it cannot be.
    """
    named = choice.text_encoder
    if named is None or Path(named).expanduser().exists() or not is_repository_name(named):
        return choice
    return dataclasses.replace(choice, text_encoder=str(fetch([_text_encoder(named)], progress=progress)[0]))


def cached_text_encoder() -> Path | None:
    """The text encoder of the released models if the hub's cache holds it whole, with its tokenizer."""
    folder = cached_snapshot(TEXT_ENCODER_REPOSITORY)
    need = _text_encoder(TEXT_ENCODER_REPOSITORY)
    return folder if folder is not None and need.is_met_by(folder) else None


def _text_encoder(repository: str) -> Need:
    return Need(repository, ("tokenizer.json", ""))


def _transformer(repository: str, variant: str | None, listing: list[str]) -> tuple[str, str | None]:
    """The entry of the transformer, and its preset where its name tells."""
    if repository == REPOSITORY:
        entries = [files.transformer for files in RELEASED.values()]
    else:
        outermost = [name for name in listing if "/" not in name and name.endswith(SUFFIXES)]
        shards = any("-of-" in name for name in outermost)
        entries = [name for name in [*outermost, *_folders(listing)] if not _is_other(name) and "-of-" not in name]
        entries += [""] * shards
    if variant is None:
        if len(entries) == 1:
            return entries[0], released_model(entries[0])
        listed = variants() if repository == REPOSITORY else ", ".join(entries)
        rule = f"holds several models: {listed}" if entries else "holds no weights"
        raise UserInputError(f"hub repository {repository}", rule, "choose one with --variant or variant=")
    if not any(variant in (entry, PurePosixPath(entry).stem) for entry in entries):
        variant = preset_spelled(variant, RELEASED)
    for entry in entries:
        if released_model(entry) == variant or variant in (entry, PurePosixPath(entry).stem):
            return entry, released_model(entry)
    if len(entries) == 1 and variant in RELEASED and released_model(entries[0]) is None:
        return entries[0], variant
    raise unknown_name(f"variant of hub repository {repository}:", variant, _names(entries))


def _names(entries: list[str]) -> list[str]:
    return [released_model(entry) or entry for entry in entries]


def _is_other(name: str) -> bool:
    """Whether a name says that it is a VAE or a text encoder."""
    return "vae" in name.lower() or "t5" in name.lower()


def _vaes(named: str | None, model: str | None, listing: list[str]) -> list[str]:
    """The VAE to fetch; several where their names do not tell which one it is."""
    if named is not None:
        return [] if Path(named).expanduser().exists() else [named]
    there = [name for name in listing if "vae" in name.lower() and name.endswith(SUFFIXES)]
    if model is None or model not in RELEASED:
        return there
    official = RELEASED[model].vae
    return [name for name in there if same_name(name, official)] or there if listing else [official]


def _folders(listing: list[str]) -> list[str]:
    """Outermost folders of weights."""
    folders = dict.fromkeys(PurePosixPath(name).parts[0] for name in listing if name.count("/") == 1)
    return [folder for folder in folders if files_of(listing, folder)]


def _converted(listing: list[str]) -> list[str]:
    """The listing if it is of a whole converted model."""
    parts = [any(name.startswith((f"{part}/", f"{part}.safetensors")) for name in listing) for part in _PARTS]
    return listing if all(parts) and {_CARD, _BESIDE[0]} <= set(listing) else []


def _fetch_converted(repository: str, listing: list[str], progress: bool) -> Path:
    starts = (*(f"{part}/" for part in _PARTS), *(f"{part}.safetensors" for part in _PARTS), *_BESIDE)
    files = tuple(name for name in listing if name.startswith(starts))
    # The card comes last: where it is in the cache, everything is.
    fetch([Need(repository, files)], progress=progress)
    return fetch([Need(repository, (_CARD,))], progress=progress)[0]
