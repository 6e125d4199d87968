"""Files of repositories on the Hugging Face hub: from its cache without a look at the network, else fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from toprovar_jax.errors import UserInputError

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SECONDS = 10.0


class UnreachableError(UserInputError):
    """The hub cannot be asked."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Files of a repository.

    Attributes:
      repository: ``"owner/name"``.
      entries: files; folders of weights, of which one format is taken; ``""`` for the weights that lie outermost.
    """

    repository: str
    entries: tuple[str, ...]

    def is_met_by(self, folder: Path) -> bool:
        """Whether a folder holds all of it."""
        return all(_is_whole(folder, entry) for entry in self.entries)

    def __str__(self) -> str:
        words = {"": "model.safetensors.index.json with the shards it names"}
        listed = [words.get(entry, entry if PurePosixPath(entry).suffix else f"{entry}/*") for entry in self.entries]
        return f"{', '.join(listed)} of {self.repository}"


def is_repository_name(text: str) -> bool:
    """Whether ``text`` has the form ``owner/name``."""
    return _IDENTIFIER.fullmatch(text) is not None


def fetch(needs: Sequence[Need], *, progress: bool = True) -> list[Path]:
    """Local folders with all files, one per need; what the cache holds is not asked for again.

    Raises:
      UserInputError: a repository or file that does not exist or may not be read; an :class:`UnreachableError` that
        names all files that are missing here where the hub cannot be reached.
    """
    found = [_cached(need) for need in needs]
    missing = [need for need, folder in zip(needs, found, strict=True) if folder is None]
    try:
        return [
            _download(need, progress) if folder is None else folder for need, folder in zip(needs, found, strict=True)
        ]
    except UnreachableError as error:
        rule = f"{error.rule}, and what is needed is not in its cache: {'; '.join(map(str, missing))}"
        raise UnreachableError(error.value, rule, error.remedy) from None


def list_files(repository: str) -> list[str]:
    """All files of a repository; those in the cache where the hub cannot be reached.

    Raises:
      UserInputError: no such repository, or none that may be read; an :class:`UnreachableError` where nothing is here.
    """
    try:
        return _list_online(repository)
    except UnreachableError:
        listing = list_cached(repository)
        if not listing:
            raise
        return listing


def list_cached(repository: str) -> list[str]:
    """The files of a repository that are in the cache; none if it is not there."""
    folder = cached_snapshot(repository)
    if folder is None:
        return []
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def cached_snapshot(repository: str) -> Path | None:
    """Where the cache has the newest known state of a repository, or parts of it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    try:
        folder = storage / "snapshots" / (storage / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder if folder.is_dir() else None


def files_of(listing: Sequence[str], entry: str) -> list[str]:
    """The files of an entry (see :class:`Need`) among those of its repository; none if it is not there."""
    if entry in listing:
        return [entry]
    inside = [name for name in listing if str(PurePosixPath(name).parent) == (entry or ".")]
    for suffixes in (SUFFIXES[:1], SUFFIXES[1:]):
        weights = [name for name in inside if name.endswith(suffixes)]
        if weights:
            indices = [name for name in inside if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
            return indices + weights
    return []


def _cached(need: Need) -> Path | None:
    """The cache's folder if it holds everything."""
    folder = cached_snapshot(need.repository)
    return folder if folder is not None and need.is_met_by(folder) else None


def _is_whole(folder: Path, entry: str) -> bool:
    """Whether a file is there, or for a folder of shards all of them."""
    place = folder / entry
    if not place.is_dir():
        return place.is_file()
    for index in sorted(place.glob("*.index.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if shards and all((place / str(shard)).is_file() for shard in shards):
                return True
    return any(path.suffix in SUFFIXES and "-of-" not in path.name for path in place.iterdir())


def _list_online(repository: str) -> list[str]:
    from huggingface_hub import HfApi

    with _explaining(repository):
        # Asking for a listing alone would be tried for half a minute where there is no network.
        siblings = HfApi().model_info(repository, timeout=_SECONDS).siblings
    return [sibling.rfilename for sibling in siblings or ()]


def _download(need: Need, progress: bool) -> Path:
    from huggingface_hub import snapshot_download

    listing = _list_online(need.repository)
    files = []
    for entry in need.entries:
        inside = files_of(listing, entry)
        if not inside:
            raise UserInputError(
                f"hub repository {need.repository}", f"has no {entry or 'weights'}", f"it has {_some(listing)}"
            )
        files += inside
    with _explaining(need.repository), _bars(progress):
        folder = Path(snapshot_download(need.repository, allow_patterns=files))
    lost = [name for name in files if not (folder / name).is_file()]
    if lost:
        raise _unreachable(need.repository, f"{_some(lost)} did not arrive")
    return folder


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20) if names else "no files"


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The hub's own progress bars, or none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = not shown and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


@contextlib.contextmanager
def _explaining(repository: str) -> Iterator[None]:
    """Turns what the hub's library raises, which is of many kinds, into one line."""
    from huggingface_hub import errors

    value = f"hub repository {repository}"
    try:
        yield
    except UserInputError:
        raise
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repository}"
        remedy = f"accept its terms on {page}, then log in with: hf auth login"
        raise UserInputError(value, "is open only to those who have agreed to its terms", remedy) from None
    except errors.RepositoryNotFoundError:
        remedy = "check the path or the name; if it is private, log in with: hf auth login"
        raise UserInputError(value, "does not exist on the hub, and there is no such folder here", remedy) from None
    except errors.HFValidationError:
        raise UserInputError(value, "is no folder and no valid repository name", "write owner/name") from None
    except errors.OfflineModeIsEnabled:
        raise _unreachable(repository, "HF_HUB_OFFLINE is set") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        cause = error.__cause__ or error
        words = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
        raise _unreachable(repository, words) from None


def _unreachable(repository: str, reason: str) -> UnreachableError:
    return UnreachableError(
        f"hub repository {repository}",
        f"is no folder here and cannot be reached ({reason})",
        "fetch the files elsewhere, put them into one folder and pass that folder",
    )
