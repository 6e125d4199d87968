"""The released files in tiny, presets to match, and places of their own for models and for what the hub gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from toprovar_jax.presets import PRESETS

from .released_files import CARDS, write_all

T5 = "flan-t5-xl"
FILES_2B = ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", T5)
FILES_8B = ("infinity_8b_weights", "infinity_vae_d56_f8_14_patchify.pth", T5)


@pytest.fixture(scope="session")
def released(tmp_path_factory) -> Path:
    """All files that were released."""
    return write_all(tmp_path_factory.mktemp("released") / "files")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with nothing on it, whose presets are tiny, and for which the hub is out of reach."""
    for name in list(PRESETS):
        monkeypatch.delitem(PRESETS, name)
    for name, card in CARDS.items():
        monkeypatch.setitem(PRESETS, name, card)
    monkeypatch.setenv("TOPROVAR_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.fixture
def folder_of(released, machine) -> Callable[..., Path]:
    """Makes a folder of some of the released files: ``folder_of("infinity_2b_reg.pth", my="infinity_8b_weights")``."""

    def make(*names: str, **renamed: str) -> Path:
        folder = machine / "my files"
        folder.mkdir(exist_ok=True)
        for name, origin in [(name, name) for name in names] + list(renamed.items()):
            place = folder / (name + Path(origin).suffix if name in renamed else name)
            copy = shutil.copytree if (released / origin).is_dir() else shutil.copyfile
            copy(released / origin, place)
        return folder

    return make
