"""Every command that loads a model takes original files, and refuses what makes up none in one line."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
from PIL import Image

from toprovar_jax.cli.finetune_run import _sha256
from toprovar_jax.cli.generate import main as generate

from .conftest import FILES_2B, T5

COMMANDS = {
    "generate": ["--prompt", "a cube", "--out", "out"],
    "explain": ["--prompt", "a cube", "--out", "out"],
    "compare": ["--prompt", "a cube", "--out", "out"],
    "evaluate": ["--out", "out"],
    "calibrate": ["--prompts", "prompts.txt"],
    "finetune": ["--dry-run"],
}


@pytest.fixture
def refused(machine, monkeypatch, capsys):
    """The one line with which a command refuses its options."""
    monkeypatch.chdir(machine)
    (machine / "prompts.txt").write_text("a cube\n")

    def run(command, *words) -> str:
        main = importlib.import_module(f"toprovar_jax.cli.{command}").main
        assert main([*COMMANDS[command], *map(str, words)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert not (machine / "out").exists()
        return said.err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_asks_which_of_several_models(command, refused, released):
    assert "holds several transformers: " in refused(command, "--model", released)
    words = ["--model", released, "--variant", "infinity-2b", "--vae", "infinity_vae_d56_f8_14_patchify.pth"]
    assert "use infinity_vae_d32reg.pth, which is in folder" in refused(command, *words)


def test_a_choice_without_original_files_is_refused(refused):
    assert "is for folders of original files" in refused("generate", "--variant", "infinity-2b")
    assert "must be a name or a path" in refused("generate", "--vae", "")


def test_pictures_come_from_files_in_three_places(machine, released, folder_of, monkeypatch, capsys):
    monkeypatch.chdir(machine)
    folder = folder_of(FILES_2B[0])
    shutil.copyfile(released / FILES_2B[1], machine / "vae.pth")
    words = ["--model", str(folder), "--vae", "vae.pth", "--text-encoder", str(released / T5)]
    assert generate([*COMMANDS["generate"], *words, "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    with Image.open(said.out.strip()) as image:
        assert image.size == (8, 8)


def test_finetuning_knows_a_converted_network_by_the_files_that_it_was_made_from(machine):
    def written(name, *digests):
        folder = machine / name
        (folder / "transformer").mkdir(parents=True)
        parts = {"transformer": {"files": [{"sha256": digest} for digest in digests]}}
        (folder / "model.json").write_text(json.dumps({"conversion": {"parts": parts}}))
        return _sha256(folder, "transformer.safetensors")

    assert written("one", "ab", "cd") == written("two", "ab", "cd") != written("three", "ab", "ce")
