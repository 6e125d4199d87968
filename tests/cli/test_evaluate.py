"""The eval command on a model that paints: its two files and its table, going on after a stop, and bad input."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import pytest
from PIL import Image

from toprovar_jax.acceleration import POLICIES
from toprovar_jax.cli.evaluate import main
from toprovar_jax.cli.main import main as toprovar

from ..judged_pictures import Half, PaintingPipeline, PixelJudge


class Ran(NamedTuple):
    status: int
    stdout: str
    stderr: str
    folder: pathlib.Path
    pipeline: PaintingPipeline

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())

    @property
    def numbers(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command into an empty folder on a model of one object: ``command("--images", "2", stop_after=3)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(POLICIES, "half", Half)

    def run(*argv: str, **fake: Any) -> Ran:
        pipeline = PaintingPipeline(**{"world": "scenes-single", **fake})
        words = ["--out", str(tmp_path / "out"), "--per-task", "3", "--batch-size", "2"]
        words = words[:2] + words[4:] if "--prompts" in argv else words
        status = main([*words, *argv], load=lambda model, *, precision: pipeline, judge=PixelJudge())
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err, tmp_path / "out", pipeline)

    return run


def test_one_table_one_sheet_and_one_file_of_numbers(command):
    ran = command("--policy", "half", "--images", "2", "--seed", "4", "--guidance", "1,3,3", "--tau", "0.5")
    assert (ran.status, ran.stderr, ran.files) == (0, "", ["contact_sheet.png", "results.json"])
    assert {name: ran.numbers[name] for name in ("seed", "images_per_prompt", "options")} == {
        "seed": 4,
        "images_per_prompt": 2,
        "options": {"guidance_scale": [1.0, 3.0, 3.0], "tau": 0.5},
    }
    assert ran.numbers["scores"]["half"]["total"]["value"] == 0.5
    assert ran.numbers["comparison"]["against"] == "dense"
    assert len(ran.numbers["weights"]) == 32
    with Image.open(ran.folder / "contact_sheet.png") as image:
        image.load()
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("| task ")
    assert lines[2].startswith("| single object ")
    assert lines[-2:] == [str(ran.folder / "results.json"), str(ran.folder / "contact_sheet.png")]


def test_json_is_one_object_instead_of_the_table(command):
    ran = command("--json", "--tasks", "Colours", "--against", "half")
    told = json.loads(ran.stdout)
    assert list(told["scores"]["dense"]["tasks"]) == ["colours"]
    assert told["comparison"]["against"] == "half"
    assert told["files"] == [str(ran.folder / name) for name in ("results.json", "contact_sheet.png")]
    assert "pictures" not in told


def test_prompts_may_come_from_a_file(command, tmp_path):
    line = {"tag": "colors", "include": [{"class": "cube", "count": 1, "color": "red"}], "prompt": "a red cube"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    ran = command("--prompts", "own.jsonl", "--images", "3", "--quiet")
    assert ran.stdout.splitlines() == [str(ran.folder / name) for name in ("results.json", "contact_sheet.png")]
    assert [picture["prompt"] for picture in ran.numbers["pictures"]] == ["a red cube"] * 3


def test_existing_files_are_replaced_on_demand_only(command):
    first = command()
    content = (first.folder / "results.json").read_bytes()
    refused = command("--policy", "half")
    assert (refused.status, refused.stdout, refused.pipeline.calls) == (2, "", [])
    assert "results.json: is there already; choose another folder with --out" in refused.stderr
    assert (first.folder / "results.json").read_bytes() == content
    assert command("--force", "--policy", "half").numbers["policy"]["name"] == "half"


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(command):
    stopped = command(stop_after=5)
    assert (stopped.status, len(stopped.files)) == (130, 2)
    kept = stopped.folder / "unfinished"
    assert (
        stopped.stderr
        == f"error: interrupted; 4 finished pictures kept in {kept}; the same command goes on from there\n"
    )
    rest = command()
    assert (rest.status, rest.files) == (0, ["contact_sheet.png", "results.json"])
    assert sum(len(call["prompts"]) for call in rest.pipeline.calls) == 2


def test_ctrl_c_before_anything_is_finished_leaves_nothing(command):
    ran = command(stop_after=1)
    assert (ran.status, ran.files) == (130, [])
    assert ran.stderr == "error: interrupted; nothing was written\n"


def test_a_failure_of_the_last_step_keeps_the_pictures(command, monkeypatch):
    def fail(_: Any) -> bytes:
        raise RuntimeError("out of paint")

    monkeypatch.setattr("toprovar_jax.evaluation_report.as_dict", fail)
    ran = command()
    assert (ran.status, len(ran.files)) == (1, 3)
    assert "RuntimeError: out of paint; run again with --debug to see where; 6 finished pictures kept" in ran.stderr


BAD_INPUT = {
    "no images": (["--images", "0"], "--images '0': must be an integer from 1"),
    "images not a number": (["--images", "many"], "--images 'many'"),
    "no prompts per task": (["--per-task=-3"], "--per-task '-3'"),
    "no batch": (["--batch-size", "0"], "--batch-size '0'"),
    "seed not a number": (["--seed", "x"], "--seed 'x'"),
    "unknown policy": (["--policy", "topovar"], "did you mean toprovar"),
    "unknown other policy": (["--against", "topovar"], "--against"),
    "guidance not a number": (["--guidance", "1,x"], "--guidance '1,x'"),
    "unknown backend": (["--backend", "gpuu"], "did you mean gpu?"),
    "unknown precision": (["--precision", "fsat"], "did you mean fast?"),
    "prompts and tasks": (["--prompts", "a.jsonl", "--tasks", "colours"], "cannot be used together with --tasks"),
    "unknown model": (["--model", "scenes-smal"], "did you mean scenes-small"),
    "unknown option": (["--imges", "1"], "did you mean --images?"),
    "blank output": (["--out", " "], "--out ' '"),
    "output below a file": (["--out", "/dev/null/a"], "not a directory"),
    "absent prompts file": (["--prompts", "nowhere.jsonl"], "file nowhere.jsonl: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_anything_is_loaded(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD_INPUT[case]
    status = main(argv, load=lambda *_, **__: pytest.fail("loaded"))
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "counting"], "task 'counting': is more than model fake knows"),
        (["--tasks", "countin"], "task 'countin': must be one of"),
        (["--ceiling"], "a ceiling for model fake: needs a model whose world the renderer draws"),
    ],
)
def test_what_the_model_cannot_do_is_one_line_before_any_picture(command, monkeypatch, argv, message):
    monkeypatch.setattr("toprovar_jax.evaluation.load_coder", lambda *_: lambda pictures, grids: pictures)
    ran = command(*argv)
    assert (ran.status, ran.stdout, ran.pipeline.calls, ran.files) == (2, "", [], [])
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_the_command_is_one_of_the_programs(capsys):
    assert toprovar(["eval", "--help"]) == 0
    assert "--per-task N" in capsys.readouterr().out
