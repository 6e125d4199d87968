"""The generate command end to end, with a fake pipeline in place of a model."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest
from PIL import Image

from toprovar_jax.cli.generate import main
from toprovar_jax.images import read_recipe
from toprovar_jax.memory_options import MemoryOptions

from .conftest import FakePipeline


def test_one_prompt_makes_one_png_and_prints_its_path(command):
    ran = command("--prompt", "a red sphere")
    assert ran.status == 0
    assert ran.stdout == "outputs/0000-a-red-sphere-s0.png\n"
    assert ran.files == ["outputs/0000-a-red-sphere-s0.png"]
    with Image.open(ran.folder / ran.files[0]) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (8, 8))


def test_closing_line_keeps_compile_apart_from_steady_time(command):
    ran = command("--prompt", "a", "--num-images", "2")
    assert "compile 10.0 s" in ran.stderr
    assert "steady: 1.00 s per picture" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_pictures_of_a_prompt_have_consecutive_seeds_that_wrap_around(command):
    ran = command("--prompt", "a", "--num-images", "3", "--seed", str(2**32 - 2))
    assert [call["seeds"] for call in ran.pipeline.calls] == [[2**32 - 2], [2**32 - 1], [0]]


def test_several_prompts_are_numbered_through_and_batched_in_order(command):
    ran = command("--prompt", "a", "--prompt", "b", "--num-images", "2", "--batch-size", "3")
    assert [call["prompts"] for call in ran.pipeline.calls] == [["a", "a", "b"], ["b"]]
    assert [name.split("/")[1][:6] for name in ran.stdout.split()] == ["0000-a", "0001-a", "0002-b", "0003-b"]


def test_options_reach_the_pipeline_under_its_names(command):
    ran = command(
        *("--prompt", "a", "--guidance", "3,3,1", "--tau", "0.5", "--top-k", "2", "--top-p", "0.9", "--strict"),
        *("--negative-prompt", "fog", "--aspect-ratio", "8:6", "--pixels", "1M", "--policy", "thin"),
        *("--stop-after-scale", "2"),
    )
    call = ran.pipeline.calls[0]
    assert call["guidance_scale"] == [3.0, 3.0, 1.0]
    assert (call["tau"], call["top_k"], call["top_p"], call["stop_after_scale"]) == (0.5, 2, 0.9, 2)
    assert (call["negative_prompt"], call["aspect_ratio"], call["pixels"]) == ("fog", "4:3", "1M")
    assert (call["policy"], call["strict"], call["output_type"]) == ("thin", True, "pil")


def test_what_is_not_given_is_left_to_the_pipeline(command):
    call = command("--prompt", "a").pipeline.calls[0]
    left = ("guidance_scale", "tau", "top_k", "top_p", "pixels", "negative_prompt", "stop_after_scale")
    assert [call[name] for name in left] == [None] * len(left)


def test_lines_of_a_prompts_file_override_options_and_split_batches(command, tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b", "seed": 7, "guidance": [1, 2, 3]}, {"prompt": "c", "num_images": 2}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ran = command("--prompts-file", "list.jsonl", "--batch-size", "8", "--guidance", "2", "--seed", "4")
    made = [(call["prompts"], call["seeds"], call["guidance_scale"]) for call in ran.pipeline.calls]
    assert made == [(["a"], [4], 2.0), (["b"], [7], [1.0, 2.0, 3.0]), (["c", "c"], [4, 5], 2.0)]


def test_prompts_of_the_command_line_come_before_those_of_the_file(command, tmp_path):
    (tmp_path / "list.txt").write_text("second\n")
    ran = command("--prompts-file", "list.txt", "--prompt", "first")
    assert [call["prompts"] for call in ran.pipeline.calls] == [["first"], ["second"]]


def test_positive_prompt_extends_prompts_about_people_only(command):
    ran = command("--prompt", "a woman", "--prompt", "a cube", "--positive-prompt")
    prompts = [call["prompts"][0] for call in ran.pipeline.calls]
    assert prompts[0].startswith("a woman. very smooth faces")
    assert prompts[1] == "a cube"


def test_the_png_carries_its_recipe_with_the_models_defaults_filled_in(command):
    ran = command("--prompt", "ein Würfel 球", "--seed", "5", "--top-p", "0.5")
    recipe = read_recipe(ran.folder / ran.files[0])
    assert recipe["prompt"] == "ein Würfel 球"
    expected = {"seed": 5, "model": "fake", "height": 8, "width": 8, "guidance": 3.0, "tau": 1.0, "top_p": 0.5}
    assert {key: recipe[key] for key in expected} == expected
    assert recipe["policy"] == "dense"
    assert recipe["jax_version"].count(".") == 2


def test_no_metadata_writes_no_text_chunk(command):
    ran = command("--prompt", "a", "--no-metadata")
    with Image.open(ran.folder / ran.files[0]) as image:
        image.load()
        assert image.info == {}


def test_running_twice_keeps_the_first_picture(command):
    first = command("--prompt", "a")
    before = (first.folder / first.files[0]).read_bytes()
    second = command("--prompt", "a", "--no-metadata")
    assert second.stdout == "outputs/0000-a-s0-2.png\n"
    assert (first.folder / "outputs/0000-a-s0.png").read_bytes() == before


def test_grid_adds_one_sheet_of_all_pictures(command):
    ran = command("--prompt", "a", "--num-images", "3", "--grid")
    assert ran.stdout.split()[-1] == "outputs/grid.png"
    with Image.open(ran.folder / "outputs/grid.png") as sheet:
        assert sheet.size == (18, 18)


def test_json_prints_exactly_one_object(command):
    ran = command("--prompt", "a cat", "--json", "--num-images", "2")
    record = json.loads(ran.stdout)
    assert record["images"] == [
        {"path": f"outputs/000{i}-a-cat-s{i}.png", "prompt": "a cat", "seed": i} for i in range(2)
    ]
    assert record["plan"] == {"policy": "dense", "scales": 3}
    assert (record["timings"]["compile"], record["timings"]["load"]) == (10.0, 2.0)
    assert record["timings"]["steady"] == pytest.approx(2.0)
    assert record["timings"]["total"] > 0
    assert record["warnings"] == ["the fake model knows no cats"]
    assert set(record) == {"images", "timings", "plan", "warnings"}


def test_json_lists_all_plans_only_when_they_differ(command, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "policy": "thin"}\n')
    record = json.loads(command("--prompts-file", "list.jsonl", "--json", "--grid").stdout)
    assert [plan["policy"] for plan in record["plans"]] == ["dense", "thin"]
    assert record["plan"]["policy"] == "dense"
    assert record["grid"] == "outputs/grid.png"


def test_warnings_come_once_on_stderr_and_not_when_quiet(command):
    argv = ("--prompt", "a cat", "--prompt", "another cat")
    assert command(*argv).stderr.count("warning: the fake model knows no cats\n") == 1
    quiet = command(*argv, "--quiet")
    assert quiet.stderr == ""
    assert len(quiet.stdout.split()) == 2


def test_dry_run_shows_plan_and_sizes_and_writes_nothing(command):
    ran = command("--prompt", "a", "--prompt", "b", "--dry-run")
    assert ran.status == 0
    assert ran.stdout == "2 pictures, 8 x 8 pixels (height x width)\nplan dense: 3 scales\n"
    assert ran.pipeline.calls == []
    assert list(ran.folder.iterdir()) == []


def test_dry_run_as_json_has_no_paths(command):
    record = json.loads(command("--prompt", "a", "--dry-run", "--json").stdout)
    assert record["images"] == [{"path": None, "prompt": "a", "seed": 0}]
    assert record["plan"]["policy"] == "dense"


def test_progress_bar_runs_over_scales_on_a_terminal_only(command, monkeypatch):
    assert command("--prompt", "a").pipeline.calls[0]["callback_on_scale_end"] is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ran = command("--prompt", "a", "--prompt", "b")
    assert "picture 2 of 2" in ran.stderr
    assert "3/3" in ran.stderr
    assert command("--prompt", "a", "--quiet").stderr == ""


def test_ctrl_c_keeps_finished_pictures(command):
    ran = command("--prompt", "a", "--num-images", "5", fail_at=2)
    assert ran.status == 130
    assert ran.files == ["outputs/0000-a-s0.png", "outputs/0001-a-s1.png"]
    assert ran.stderr == "error: interrupted; 2 finished pictures kept in outputs\n"


def test_ctrl_c_before_the_first_picture_says_so(command):
    ran = command("--prompt", "a", fail_at=0)
    assert (ran.status, ran.stderr) == (130, "error: interrupted; no picture was saved\n")


def test_ctrl_c_still_gives_the_json_object_and_the_sheet_of_what_was_kept(command):
    ran = command("--prompt", "a", "--num-images", "5", "--json", "--grid", fail_at=2)
    record = json.loads(ran.stdout)
    assert ran.status == 130
    assert [image["path"] for image in record["images"]] == ["outputs/0000-a-s0.png", "outputs/0001-a-s1.png"]
    assert (record["interrupted"], record["grid"]) == (True, "outputs/grid.png")
    assert record["timings"]["steady"] == pytest.approx(2.0)
    with Image.open(ran.folder / "outputs/grid.png") as sheet:
        assert sheet.size[0] < 18 or sheet.size[1] < 18


def test_ctrl_c_with_nothing_kept_prints_no_object(command):
    ran = command("--prompt", "a", "--json", "--grid", fail_at=0)
    assert (ran.status, ran.stdout, ran.files) == (130, "", [])


class Disguised(RuntimeError):
    """A failure of a library in whose midst Ctrl-C was pressed."""

    def __init__(self, text: str):
        super().__init__(text)
        self.__cause__ = ImportError("numpy")
        self.__cause__.__context__ = KeyboardInterrupt()


def test_a_failure_that_came_of_ctrl_c_is_a_ctrl_c(command):
    ran = command("--prompt", "a", "--num-images", "2", "--debug", fail_at=1, failure=Disguised)
    assert (ran.status, ran.stderr) == (130, "error: interrupted; 1 finished picture kept in outputs\n")


def test_a_failure_is_one_line_and_debug_raises_it(command):
    ran = command("--prompt", "a", "--num-images", "2", fail_at=1, failure=RuntimeError)
    assert ran.status == 1
    assert ran.stderr == (
        "error: RuntimeError: the device went away; run again with --debug to see where; "
        "1 finished picture kept in outputs\n"
    )
    with pytest.raises(RuntimeError, match="the device went away"):
        command("--prompt", "a", "--debug", fail_at=0, failure=RuntimeError)


def test_disk_full_while_running_keeps_finished_pictures_and_nothing_half_written(command, monkeypatch):
    write, limit = os.write, 3  # two probes of the output directory, then one picture

    def write_until_full(descriptor, data):
        nonlocal limit
        limit -= 1
        if limit < 0:
            write(descriptor, bytes(data)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_until_full)
    ran = command("--prompt", "a", "--num-images", "3")
    assert ran.status == 1
    assert ran.files == ["outputs/0000-a-s0.png"]
    assert ran.stderr == "error: No space left on device: outputs; 1 finished picture kept in outputs\n"


def test_output_directory_is_created_with_its_parents(command):
    ran = command("--prompt", "a", "--out", "new/folder")
    assert ran.files == ["new/folder/0000-a-s0.png"]


PLACES = {
    "nothing": ([], MemoryOptions()),
    "low memory": (["--low-memory"], MemoryOptions("on_demand", stream_blocks=True, decoder_strips=8)),
    "integers": (["--int8"], MemoryOptions(quantization="int8")),
    "places": (["--text-encoder-on", "on-demand"], MemoryOptions("on_demand")),
    "the particular goes first": (
        ["--low-memory", "--int8", "--text-encoder-on", "host", "--decoder-strips", "3"],
        MemoryOptions("host", stream_blocks=True, quantization="int8", decoder_strips=3),
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_options_of_memory_reach_the_model_that_is_loaded(case, command, monkeypatch, tmp_path):
    argv, expected = PLACES[case]
    asked = {}
    pipeline = FakePipeline()

    def from_pretrained(model, *, memory, **files):
        assert files == {"variant": None, "vae": None, "text_encoder": None, "progress": True}
        asked[model] = memory
        return pipeline

    monkeypatch.setattr("toprovar_jax.pipeline.InfinityPipeline.from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    assert main(["--prompt", "a", "--backend", "cpu", *argv]) == 0
    assert asked == {None: expected}


def test_streaming_on_a_cpu_is_said_to_be_in_vain(command):
    ran = command("--prompt", "a", "--low-memory")
    assert ran.status == 0
    assert "warning: --low-memory: the memory of a CPU is the host's" in ran.stderr
    assert "low-memory" not in command("--prompt", "a", "--decoder-strips", "2").stderr


def test_the_recipe_says_that_integers_made_the_picture_and_only_then(command):
    for memory, expected in ((MemoryOptions(quantization="int8"), "int8"), (MemoryOptions(decoder_strips=4), None)):
        ran = command("--prompt", "a", memory=memory)
        assert read_recipe(ran.folder / ran.stdout.strip()).get("quantization") == expected
