"""The released files: which of them make up which model, and where they are; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import PurePath


@dataclasses.dataclass(frozen=True)
class Released:
    """A model's files in :data:`REPOSITORY`.

    Attributes:
      transformer: a file, or a folder of shards with their index.
      vae: the file of the VAE that it was trained with.
    """

    transformer: str
    vae: str


REPOSITORY = "FoundationVision/Infinity"
TEXT_ENCODER_REPOSITORY = "google/flan-t5-xl"

RELEASED: Mapping[str, Released] = {
    "infinity-2b": Released("infinity_2b_reg.pth", "infinity_vae_d32reg.pth"),
    "infinity-8b": Released("infinity_8b_weights", "infinity_vae_d56_f8_14_patchify.pth"),
    "infinity-8b-512": Released("infinity_8b_512x512_weights", "infinity_vae_d56_f8_14_patchify.pth"),
}
"""By preset; the scaling study's transformers were never released."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the user says about original files; None leaves it to their names and shapes.

    Attributes:
      variant: the transformer, by preset or by the name of its file or folder.
      vae: a file in the model's folder, or anywhere.
      text_encoder: a file or folder of a T5 encoder, or its repository.
    """

    variant: str | None = None
    vae: str | None = None
    text_encoder: str | None = None

    def named(self) -> dict[str, str]:
        """What is not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def released_model(name: str) -> str | None:
    """The preset whose released transformer has this name, with whatever ending."""
    return next((model for model, files in RELEASED.items() if same_name(name, files.transformer)), None)


def same_name(name: str, other: str) -> bool:
    """Whether names are one but for ending, case, underscores and hyphens, which published scripts spell variously."""
    return _plain(name) == _plain(other)


def preset_spelled(name: str, presets: Iterable[str]) -> str:
    """The one of ``presets`` that ``name`` is in another spelling; else ``name`` as it is."""
    return next((preset for preset in presets if same_name(name, preset)), name)


def variants() -> str:
    """The released models with their transformers, in words."""
    return ", ".join(f"{model} ({files.transformer})" for model, files in RELEASED.items())


def _plain(name: str) -> str:
    return PurePath(name).stem.replace("_", "").replace("-", "").lower()
