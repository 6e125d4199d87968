"""Where weights come from: the embedded model, a folder, a named model on this machine, or a repository on the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from toprovar_jax.config import Precision
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.originals.released import RELEASED, REPOSITORY, Choice
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


def converted_shelf() -> Path:
    """Where what original files were converted to is kept: ``converted`` in :func:`models_folder`."""
    return models_folder() / "converted"


def find_model(
    name_or_dir: str | os.PathLike[str] | None,
    *,
    variant: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    precision: Precision | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a model, with its ``model.json``.

    Original files are converted into a folder of :func:`converted_shelf`, once; what must be fetched from the hub goes
    to the hub's own cache and is then taken from there without asking again.

    Args:
      name_or_dir: None or an embedded model's name; a folder with a ``model.json``, or with the original files; a name
        of :func:`list_models` whose folder of either kind lies in :func:`models_folder`; or a repository on the
        Hugging Face hub, ``"owner/name"``, of original files or of a converted model.
      variant: which transformer of several original files, by preset or by the name of its file or folder.
      vae: which VAE, by its name in the folder or as a path; default: the one published with the transformer, or the
        only one that fits.
      text_encoder: file or folder of the T5 encoder, with its ``tokenizer.json`` beside it, or its repository; default:
        the one in the folder, or flan-t5-xl from the hub's cache.
      precision: what it will be computed in. Original files in float32 stay so for ``"exact"``; for ``"fast"``,
        matrices become bfloat16, as they are then computed with. None: exact on CPU, fast elsewhere.
      progress: tell on stderr what is fetched and converted.

    Raises:
      UserInputError: an unknown name, a folder without model, original files of which none, several or the wrong ones
        are there, no room for what they become, or files that are not on this machine and cannot be fetched.
    """
    choice = _choice(variant, vae, text_encoder)
    if name_or_dir is None or name_or_dir in EMBEDDED_MODELS:
        return _whole(embedded_folder(str(name_or_dir or EMBEDDED)), choice)
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
    name = str(name_or_dir)
    if is_folder:
        folder = _in_folder(path, choice, precision, progress)
        if folder is None:
            raise UserInputError(
                f"model folder {path}",
                f"must hold a {CARD} or original files, such as infinity_2b_reg.pth",
                "check the path, or what was fetched into it",
            )
        return folder
    if name in PRESETS:
        shelf = models_folder() / name
        folder = _in_folder(shelf, choice, precision, progress, variant=name) if shelf.is_dir() else None
        if folder is None:
            fetched = f", or fetch them as model {REPOSITORY} with variant {name}" * (name in RELEASED)
            raise UserInputError(
                f"model {name!r}",
                f"has no weights on this machine (looked in {shelf})" + ", and was never released" * (not fetched),
                f"put the original files there, or pass the folder that holds them{fetched}; "
                f"without --model the embedded {EMBEDDED} is used",
            )
        return folder
    if not exists and isinstance(name_or_dir, str):
        from toprovar_jax.originals.remote import is_repository_name
        from toprovar_jax.originals.repositories import fetch_model

        if is_repository_name(name):
            folder, choice = fetch_model(name, choice, progress=progress)
            return _found(folder, choice, precision, progress)
    if exists or os.sep in name:
        raise UserInputError(f"model {name!r}", "must be a folder or a model name", "check the path")
    raise unknown_name("model", name, list_models())


def _choice(variant: object, vae: object, text_encoder: object) -> Choice:
    given = {"variant": variant, "vae": vae, "text_encoder": text_encoder}
    for name, value in given.items():
        kinds = (str,) if name == "variant" else (str, os.PathLike)
        if value is not None and not (isinstance(value, kinds) and str(value).strip()):
            raise UserInputError(f"{name} {value!r}", "must be a name or a path", "leave it out for the default")
    return Choice(**{name: None if value is None else str(value) for name, value in given.items()})


def _whole(folder: Path, choice: Choice) -> Path:
    """A folder that needs no choice, and would ignore one."""
    for name, value in choice.named().items():
        rule = f"is for folders of original files, and {folder} holds one whole model"
        raise UserInputError(f"{name} {value}", rule, f"leave out {name}")
    return folder


def _in_folder(
    folder: Path, choice: Choice, precision: Precision | None, progress: bool, *, variant: str | None = None
) -> Path | None:
    """The model in a folder; None if it holds nothing that may be one. ``variant`` is for a choice without."""
    if not (folder / CARD).is_file():
        choice = dataclasses.replace(choice, variant=choice.variant or variant)
        from toprovar_jax.originals.selection import candidates

        if not candidates(folder):
            return None
    return _found(folder, choice, precision, progress)


def _found(folder: Path, choice: Choice, precision: Precision | None, progress: bool) -> Path:
    """The model of a folder, converted if need be."""
    if (folder / CARD).is_file():
        return _whole(folder, choice)
    from toprovar_jax.originals.cache import converted_folder
    from toprovar_jax.originals.repositories import cached_text_encoder, fetch_text_encoder

    if precision is None:
        import jax

        precision = "exact" if jax.default_backend() == "cpu" else "fast"
    return converted_folder(
        folder,
        fetch_text_encoder(choice, progress=progress),
        converted_shelf(),
        dtype="exact" if precision == "exact" else "bfloat16",
        find_text_encoder=cached_text_encoder,
        progress=progress,
    )
