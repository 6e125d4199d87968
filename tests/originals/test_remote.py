"""What is fetched from the hub, what is taken from its cache, and what is said where neither can be done."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from toprovar_jax.errors import UserInputError
from toprovar_jax.hub import find_model
from toprovar_jax.originals import cache
from toprovar_jax.originals.released import REPOSITORY, TEXT_ENCODER_REPOSITORY

from .conftest import FILES_2B, T5
from .released_files import write_ours

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as folders, and the hub's calls on them, which fill a cache laid out as the real one."""

    def __init__(self, place: Path):
        self.cache, self.repositories = place, {}
        self.asked, self.fetched = [], []
        self.down: Exception | None = None

    def put(self, repository: str, *names: str) -> Path:
        """As an earlier download has left these files in the cache."""
        storage = self.cache / f"models--{repository.replace('/', '--')}"
        snapshot = storage / "snapshots" / COMMIT
        for name in names:
            blob, link = storage / "blobs" / name.replace("/", "-"), snapshot / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                shutil.copyfile(self.repositories[repository] / name, blob)
                link.symlink_to(os.path.relpath(blob, link.parent))
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / "main").write_text(COMMIT)
        return snapshot

    def files(self, repository: str) -> list[str]:
        folder = self.repositories[repository]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def model_info(self, _api, repository, **_):
        self.asked.append(repository)
        if self.down:
            raise self.down
        if repository not in self.repositories:
            raise errors.RepositoryNotFoundError("404", response=response(404))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files(repository)])

    def snapshot_download(self, repository, *, allow_patterns):
        names = [n for n in self.files(repository) if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        self.fetched += [f"{repository}/{name}" for name in names]
        return str(self.put(repository, *names))


def response(status: int) -> Any:
    """As little of an answer as errors of the hub ask for."""
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.fixture
def hub(machine, released, monkeypatch) -> Hub:
    """The official repositories; conversion is left out."""
    hub = Hub(machine / "hub")
    infinity = machine / "remote" / "Infinity"
    shutil.copytree(released, infinity, ignore=shutil.ignore_patterns(T5))
    (infinity / "infinity_vae_d16.pth").write_bytes(b"")
    hub.repositories = {REPOSITORY: infinity, TEXT_ENCODER_REPOSITORY: released / T5}
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: hub.model_info(*args, **options))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)

    def convert(plan, out, **_):
        for kind in plan.kinds:
            (out / kind).mkdir(parents=True)
        (out / "model.json").write_text(" ".join(str(f.name) for n in plan.networks for f in n.source.files))

    monkeypatch.setattr(cache, "convert", convert)
    return hub


def refusal(model, **choice) -> str:
    with pytest.raises(UserInputError) as refused:
        find_model(model, **choice)
    assert "\n" not in str(refused.value)
    return str(refused.value)


T5_FILES = [
    f"{TEXT_ENCODER_REPOSITORY}/{name}"
    for name in (
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.json",
    )
]


def test_only_the_files_of_the_variant_are_fetched(hub):
    assert find_model(REPOSITORY, variant="Infinity_2B").name.startswith("infinity-2b-")
    assert hub.fetched == [
        f"{REPOSITORY}/infinity_2b_reg.pth",
        f"{REPOSITORY}/infinity_vae_d32reg.pth",
        *T5_FILES,
    ]


def test_shards_come_with_their_index_and_what_is_here_is_not_fetched_again(hub):
    find_model(REPOSITORY, variant="infinity-2b")
    hub.fetched.clear()
    found = find_model(REPOSITORY, variant="infinity_8b_512x512_weights")
    assert found.name.startswith("infinity-8b-512-")
    assert hub.fetched == [
        *(f"{REPOSITORY}/infinity_8b_512x512_weights/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        f"{REPOSITORY}/infinity_8b_512x512_weights/model.safetensors.index.json",
        f"{REPOSITORY}/infinity_vae_d56_f8_14_patchify.pth",
    ]


def test_what_was_fetched_once_needs_no_network(hub):
    first = find_model(REPOSITORY, variant="infinity-2b")
    hub.down = AssertionError("asked")
    hub.asked.clear()
    assert find_model(REPOSITORY, variant="infinity-2b") == first
    shutil.rmtree(first)
    assert find_model(REPOSITORY, variant="infinity-2b") == first
    assert hub.asked == []


def test_one_of_several_models_must_be_chosen_before_the_hub_is_asked(hub):
    message = refusal(REPOSITORY)
    assert "infinity-2b (infinity_2b_reg.pth), infinity-8b (infinity_8b_weights), infinity-8b-512" in message
    assert "--variant" in message
    assert "must be one of infinity-2b, infinity-8b, infinity-8b-512" in refusal(REPOSITORY, variant="infinity-20b")
    assert hub.asked == []


def test_another_vae_and_text_encoder_are_fetched_or_taken_from_this_machine(hub, released):
    local = str(released / "infinity_vae_d32.pth")
    find_model(REPOSITORY, variant="infinity-2b", vae=local, text_encoder=released / T5)
    assert hub.fetched == [f"{REPOSITORY}/infinity_2b_reg.pth"]
    found = find_model(REPOSITORY, variant="infinity-2b", vae="infinity_vae_d32.pth")
    assert "infinity_vae_d32.pth" in (found / "model.json").read_text()
    assert f"{REPOSITORY}/infinity_vae_d32.pth" in hub.fetched
    message = refusal(REPOSITORY, variant="infinity-2b", vae="infinity_vae_d99.pth")
    assert "has no infinity_vae_d99.pth; it has infinity_2b_reg.pth" in message


def test_a_folder_takes_its_text_encoder_from_the_cache_or_from_a_repository(hub, folder_of):
    folder = folder_of(*FILES_2B[:2])
    assert "holds no text encoder" in refusal(folder)
    found = find_model(folder, text_encoder=TEXT_ENCODER_REPOSITORY)
    assert hub.fetched == T5_FILES
    assert find_model(folder) == found


def test_a_half_fetched_text_encoder_is_not_taken(hub, folder_of):
    hub.put(TEXT_ENCODER_REPOSITORY, "tokenizer.json", "pytorch_model.bin.index.json")
    assert "holds no text encoder" in refusal(folder_of(*FILES_2B[:2]))


def test_a_converted_model_is_fetched_whole_with_its_card_last(hub, machine):
    folder = write_ours(machine / "ours")
    (folder / "README.md").write_text("about")
    hub.repositories["someone/mine"] = folder
    found = find_model("someone/mine")
    assert {path.name for path in found.iterdir()} == {path.name for path in folder.iterdir()} - {"README.md"}
    assert hub.fetched[-1] == "someone/mine/model.json"
    hub.down = AssertionError("asked")
    assert find_model("someone/mine") == found


def test_other_repositories_of_original_files_are_read_by_their_names(hub, released, machine):
    folder = machine / "remote" / "tuned"
    folder.mkdir()
    shutil.copyfile(released / "infinity_2b_reg.pth", folder / "tuned.pth")
    shutil.copyfile(released / "infinity_vae_d32.pth", folder / "vae.pth")
    shutil.copytree(released / T5, folder / T5)
    hub.repositories["someone/tuned"] = folder
    assert find_model("someone/tuned").name.startswith("infinity-2b-")
    assert {name.split("/")[2] for name in hub.fetched} == {"tuned.pth", "vae.pth", T5}
    shutil.copyfile(released / "infinity_2b_reg.pth", folder / "again.pth")
    assert "holds several models: again.pth, tuned.pth" in refusal("someone/tuned")
    assert find_model("someone/tuned", variant="again").name.startswith("infinity-2b-")
    assert "must be one of again.pth, tuned.pth" in refusal("someone/tuned", variant="infinity-8b")


def test_an_unknown_repository_is_told_from_a_mistyped_folder_as_well_as_can_be(hub):
    message = refusal("someone/infinity")
    assert message.startswith("hub repository someone/infinity: does not exist on the hub, and there is no such folder")


def test_a_gated_repository_says_where_to_agree(hub):
    hub.down = errors.GatedRepoError("403", response=response(403))
    message = refusal(REPOSITORY, variant="infinity-2b")
    assert f"https://huggingface.co/{REPOSITORY}" in message
    assert "hf auth login" in message


def test_a_network_that_fails_on_the_way_is_one_line(hub, monkeypatch):
    def fail(*_, **__):
        raise errors.LocalEntryNotFoundError("An error happened\non the way") from ConnectionError("reset by peer\nx")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "cannot be reached (reset by peer)" in refusal(REPOSITORY, variant="infinity-2b")


def test_a_full_disk_is_not_called_a_network_failure(hub, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left"):
        find_model(REPOSITORY, variant="infinity-2b")


def test_without_network_the_missing_files_are_named_within_seconds():
    """By the library's own calls, against a port where nothing listens."""
    start = time.monotonic()
    message = refusal(REPOSITORY, variant="infinity-8b")
    assert time.monotonic() - start < 8
    assert f"hub repository {REPOSITORY}: is no folder here and cannot be reached (" in message
    assert f"infinity_8b_weights/*, infinity_vae_d56_f8_14_patchify.pth of {REPOSITORY}" in message
    assert (
        f"tokenizer.json, model.safetensors.index.json with the shards it names of {TEXT_ENCODER_REPOSITORY}" in message
    )
    assert "put them into one folder and pass that folder" in message
    assert "cannot be reached" in refusal("some/folder")


def test_offline_mode_takes_what_is_cached_and_names_what_is_not(machine, released, monkeypatch):
    """By the library's own calls, on its own layout."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub = Hub(machine / "hub")
    hub.repositories = {REPOSITORY: released, TEXT_ENCODER_REPOSITORY: released / T5}
    hub.put(REPOSITORY, *FILES_2B[:2])
    message = refusal(REPOSITORY, variant="infinity-2b")
    assert "(HF_HUB_OFFLINE is set)" in message
    assert "infinity_2b_reg.pth" not in message.split("not in its cache")[1]
    hub.put(TEXT_ENCODER_REPOSITORY, *(name.rsplit("/", 1)[1] for name in T5_FILES))
    assert find_model(REPOSITORY, variant="infinity-2b", precision="fast").name.startswith("infinity-2b-")


def test_the_command_says_so_in_one_line(tmp_path):
    """With the caches and the mode that the environment asks for."""
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "TOPROVAR_MODELS": str(tmp_path / "models"),
    }
    command = [sys.executable, "-m", "toprovar_jax.cli.generate", "--prompt", "a cat", "--out", str(tmp_path / "out")]
    words = ["--model", REPOSITORY, "--variant", "infinity-2b"]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: hub repository {REPOSITORY}: ")
    assert "infinity_vae_d32reg.pth" in done.stderr
    assert not (tmp_path / "out").exists()
