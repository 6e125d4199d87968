"""Original files are converted once, by whoever comes first, and draw what the same weights of our own format draw."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest

from convert import target
from convert.orbax_writer import open_array
from convert.recognise import IMAGE_TOKENIZER, TEXT_ENCODER, TRANSFORMER, parameter_shapes
from toprovar_jax import InfinityPipeline
from toprovar_jax.errors import UserInputError
from toprovar_jax.hub import find_model
from toprovar_jax.originals import cache, selection
from toprovar_jax.presets import PRESETS

from .conftest import FILES_2B, FILES_8B, T5
from .released_files import BFLOAT16, FLOAT32, SMALL, write_ours


@pytest.fixture
def untouched(monkeypatch):
    """From now on opening an original file is a failure."""

    def forbid():
        monkeypatch.setattr(selection, "open_source", lambda *_, **__: pytest.fail("an original file was opened"))

    return forbid


@pytest.fixture
def quick(monkeypatch):
    """Conversion without the weights, which are not looked at here; returns the plans that were carried out."""
    carried_out = []

    def convert(plan, out, *, force, **_):
        with target.building(out, plan.kinds, force=force) as (place, _record):
            for kind in plan.kinds:
                (place / kind).mkdir()
            record = {"models": plan.models, "parts": dict.fromkeys(plan.kinds)}
            (place / "model.json").write_text(json.dumps({"dtype": plan.dtype, target.RECORD: record}))
        carried_out.append(plan)

    monkeypatch.setattr(cache, "convert", convert)
    return carried_out


def picture(model, **options):
    output = InfinityPipeline.from_pretrained(model, **options)("a red cube", seed=3, output_type="np")
    return np.asarray(output.images[0])


def test_pictures_of_original_files_are_those_of_the_same_weights_bit_for_bit(folder_of, machine):
    """Also where a transformer is bfloat16 and the rest float32: nothing is rounded for exact precision."""
    theirs = picture(folder_of(*FILES_2B), precision="exact")
    ours = picture(write_ours(machine / "ours"), precision="exact")
    assert np.ptp(ours) > 0.05
    np.testing.assert_array_equal(theirs, ours)
    kept = find_model(machine / "my files", precision="exact")
    for kind, dtype in ((TRANSFORMER, BFLOAT16), (IMAGE_TOKENIZER, FLOAT32), (TEXT_ENCODER, FLOAT32)):
        names = parameter_shapes(kind, kind.config(SMALL))
        assert {open_array(kept / kind.name, name).dtype.numpy_dtype for name in names} == {dtype}


def test_shards_and_another_model_of_the_same_shapes_draw_as_well(released):
    pipeline = InfinityPipeline.from_pretrained(released, variant="infinity-8b-512", precision="fast")
    assert pipeline.model_name == "infinity-8b-512"
    assert pipeline.resolve("a red cube").size == (8, 8)


@pytest.mark.usefixtures("quick")
def test_a_second_call_opens_no_original_file(folder_of, machine, untouched, capsys):
    folder = folder_of(*FILES_2B)
    first = find_model(folder, precision="fast")
    assert first.parent == machine / "models" / "converted"
    assert first.name.startswith("infinity-2b-")
    said = capsys.readouterr()
    assert said.out == ""
    assert f"converting infinity-2b (once): 0.00 GB into {first}" in said.err
    untouched()
    assert find_model(folder, precision="fast") == first
    assert find_model(str(folder), precision="fast") == first
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quick")
def test_nothing_is_said_if_so_wished(folder_of, capfd):
    find_model(folder_of(*FILES_2B), progress=False)
    assert capfd.readouterr().err == ""


def test_a_file_beside_them_that_is_not_used_converts_nothing_again(folder_of, quick):
    folder = folder_of(*FILES_2B)
    first = find_model(folder)
    folder_of("infinity_vae_d32.pth")
    assert find_model(folder) == first
    assert len(quick) == 1


@pytest.mark.usefixtures("quick")
def test_a_changed_file_is_converted_again(folder_of):
    folder = folder_of(*FILES_2B)
    first = find_model(folder)
    os.utime(folder / "infinity_2b_reg.pth", (1, 1))
    second = find_model(folder)
    assert second != first
    os.utime(folder / T5 / "tokenizer.json", (1, 1))
    assert find_model(folder) not in (first, second)


@pytest.mark.parametrize("kind", ["transformer", "image_tokenizer", "text_encoder"])
def test_a_conversion_that_has_lost_a_network_is_made_again(folder_of, quick, kind):
    folder = folder_of(*FILES_2B)
    first = find_model(folder)
    (first / kind).rmdir()
    assert find_model(folder) == first
    assert (first / kind).is_dir()
    assert len(quick) == 2


def test_damaged_numbers_are_told_with_the_folder_to_remove(folder_of):
    kept = find_model(folder_of(*FILES_2B), precision="fast")
    for path in (kept / "transformer").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserInputError, match="remove that folder and convert it again") as refused:
        InfinityPipeline.from_pretrained(kept, precision="fast")
    assert f"checkpoint {kept / 'transformer'}" in str(refused.value)


def test_a_bad_tokenizer_is_told_before_anything_is_converted(folder_of, quick):
    folder = folder_of(*FILES_2B)
    (folder / T5 / "tokenizer.json").write_text("{}")
    with pytest.raises(UserInputError, match="must hold a tokenizer in JSON form") as refused:
        find_model(folder)
    assert str(folder / T5 / "tokenizer.json") in str(refused.value)
    assert quick == []


@pytest.mark.usefixtures("quick")
def test_each_precision_and_variant_has_its_own_folder(released):
    found = {
        find_model(released, variant=variant, precision=precision)
        for variant in ("infinity-2b", "infinity-8b")
        for precision in ("exact", "fast")
    }
    assert len(found) == 4
    for folder in found:
        dtype = json.loads((folder / "model.json").read_text())["dtype"]
        assert dtype == ("exact" if "-exact-" in folder.name else "bfloat16")


@pytest.mark.usefixtures("quick")
def test_a_named_folder_of_original_files_is_that_model(released, machine):
    shutil.copytree(released, machine / "models" / "infinity-8b")
    assert find_model("infinity-8b").name.startswith("infinity-8b-exact-")
    shutil.copytree(released, machine / "models" / "infinity-8b-512")
    assert find_model("infinity-8b-512").name.startswith("infinity-8b-512-exact-")


def test_a_choice_for_a_whole_model_is_refused(machine):
    ours = write_ours(machine / "ours")
    choices: list[dict[str, Any]] = [{"variant": "infinity-2b"}, {"vae": "v.pth"}, {"text_encoder": "t"}]
    for options in choices:
        with pytest.raises(UserInputError, match="is for folders of original files"):
            find_model(ours, **options)
    with pytest.raises(UserInputError, match="is for folders of original files"):
        InfinityPipeline.from_pretrained(variant="infinity-2b")


@pytest.mark.parametrize("options", [{"variant": " "}, {"vae": ""}, {"text_encoder": ""}])
def test_a_choice_must_be_a_name(folder_of, options: dict[str, Any]):
    with pytest.raises(UserInputError, match="must be a name or a path"):
        find_model(folder_of(*FILES_2B), **options)


@pytest.mark.usefixtures("quick")
def test_too_little_room_is_told_with_numbers_before_anything_is_written(folder_of, machine, monkeypatch):
    usage = shutil.disk_usage(machine)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserInputError, match=r"with 0\.00 GB free: must have room for 0\.07 GB .*TOPROVAR_MODELS"):
        find_model(folder_of(*FILES_2B))
    assert not (machine / "models" / "converted").exists()


@pytest.mark.usefixtures("quick")
def test_what_a_dead_conversion_left_counts_as_room(folder_of, machine, monkeypatch):
    folder = folder_of(*FILES_2B)
    goal = find_model(folder)
    shutil.rmtree(goal)
    left = goal.parent / f".{goal.name}.unfinished"
    left.mkdir()
    (left / "part").write_bytes(bytes(2 << 20))
    usage = shutil.disk_usage(machine)._replace(free=cache._SPARE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert find_model(folder) == goal
    assert not left.exists()


@pytest.mark.usefixtures("quick")
def test_a_place_that_cannot_be_written_names_the_variable(folder_of, machine, monkeypatch):
    (machine / "file").write_text("")
    monkeypatch.setenv("TOPROVAR_MODELS", str(machine / "file"))
    with pytest.raises(UserInputError, match=r"folder of converted models .*set TOPROVAR_MODELS"):
        find_model(folder_of(*FILES_2B))


@pytest.mark.parametrize("finished", [True, False], ids=["which succeeds", "which dies"])
@pytest.mark.usefixtures("quick")
def test_a_second_process_waits_for_the_first(folder_of, finished, capsys):
    folder = folder_of(*FILES_2B)
    goal = find_model(folder, precision="fast")
    aside = goal.rename(goal.with_name("aside"))
    found = []
    with target._alone(goal):  # as the first process, which is at work
        second = threading.Thread(target=lambda: found.append(find_model(folder, precision="fast")))
        second.start()
        for _ in range(1200):
            if "waiting" in capsys.readouterr().err:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it does not wait")
        assert found == []
        if finished:
            aside.rename(goal)
    second.join(60)
    assert found == [goal]
    assert (goal / "model.json").is_file()


def test_a_preset_that_changes_converts_the_files_again(folder_of, quick, monkeypatch):
    folder = folder_of(*FILES_8B)
    first = find_model(folder)
    monkeypatch.setitem(PRESETS, "infinity-8b", dataclasses.replace(PRESETS["infinity-8b"], tau=0.7))
    assert find_model(folder) != first
    assert len(quick) == 2
