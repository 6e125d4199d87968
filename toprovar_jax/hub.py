"""Where weights come from: the embedded model, a folder, or a named model that was put on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.presets import PRESETS

EMBEDDED = "scenes-small"
"""The model that is used where none is named."""

EMBEDDED_MODELS = (EMBEDDED, "scenes-medium")
"""Names of the models that travel with the package."""

CARD = "model.json"


def embedded_folder(name: str = EMBEDDED) -> Path:
    """The files of an embedded model."""
    return Path(__file__).parent / "embedded" / name


def models_folder() -> Path:
    """Where named models are looked for: ``$TOPROVAR_MODELS``, else ``~/.cache/toprovar_jax/models``.

    Raises:
      UserInputError: the place lies in a home directory that this machine does not know.
    """
    chosen = os.environ.get("TOPROVAR_MODELS")
    try:
        return Path(chosen or "~/.cache/toprovar_jax/models").expanduser()
    except RuntimeError:  # a user without a home, as in many containers, or ~nobody
        raise UserInputError(
            f"TOPROVAR_MODELS {chosen!r}" if chosen else "TOPROVAR_MODELS is not set and the home directory is unknown",
            "must name the folder where models are" + (" (this home directory is unknown)" if chosen else ""),
            "set TOPROVAR_MODELS to a full path",
        ) from None


def list_models() -> tuple[str, ...]:
    """Every model name that can be asked for; all but the embedded ones need their weights on this machine."""
    return (*EMBEDDED_MODELS, *PRESETS)


def find_model(name_or_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of a model.

    Args:
      name_or_dir: None or an embedded model's name; a folder with a ``model.json``; or a name of
        :func:`list_models` whose folder lies in :func:`models_folder`.

    Raises:
      UserInputError: an unknown name, a folder without ``model.json``, a known name without weights, or no home
        directory to look for them in.
    """
    if name_or_dir is None:
        return embedded_folder()
    if name_or_dir in EMBEDDED_MODELS:
        return embedded_folder(str(name_or_dir))
    if not isinstance(name_or_dir, (str, os.PathLike)) or not str(name_or_dir).strip():
        raise UserInputError(
            f"model {name_or_dir!r}", "must be a folder or a model name", "leave it out for the default"
        )
    try:
        path = Path(name_or_dir).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a folder that may not be read, ~nobody
        reason = getattr(error, "strerror", None) or str(error)
        raise UserInputError(
            f"model {str(name_or_dir)[:60]!r}", f"cannot be looked up ({reason})", "check the path"
        ) from None
    if is_folder:
        if not (path / CARD).is_file():
            raise UserInputError(
                f"model folder {path}", f"must hold a {CARD}", f'write {{"preset": "infinity-2b"}} into {path / CARD}'
            )
        return path
    name = str(name_or_dir)
    if name in PRESETS:
        folder = models_folder() / name
        if (folder / CARD).is_file():
            return folder
        raise UserInputError(
            f"model {name!r}",
            f"has no weights on this machine (looked in {folder})",
            f"put its safetensors files and a {CARD} there, or pass a folder; without --model the embedded "
            f"{EMBEDDED} is used",
        )
    if exists or os.sep in name:
        raise UserInputError(f"model {name!r}", "must be a folder or a model name", "check the path")
    raise unknown_name("model", name, list_models())
