"""What the command reads and says: rewritten prompts, settings, a dry run, mistakes in one line, the real model."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from toprovar_jax import InfinityPipeline
from toprovar_jax.cli.main import main as toprovar
from toprovar_jax.evaluation_suites import SUITES

from .conftest import SIDE, colour
from .suite_files import SCAN, TEXTS, write_geneval

REWRITTEN = {text: f"{text}, in great detail" for text in TEXTS}


def _lines(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cache.json", json.dumps({**REWRITTEN, "another": "of another suite"})),
        ("cache.jsonl", _lines([{"prompt": text, "rewritten": new} for text, new in REWRITTEN.items()])),
        ("new.txt", "\n".join(REWRITTEN.values()) + "\n"),
    ],
)
def test_rewritten_prompts_are_drawn_and_the_scorer_sees_the_original_ones(export, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    ran = export("geneval", "--rewritten", name)
    assert ran.status == 0
    assert {prompt for prompts, _, _ in ran.pipeline.calls for prompt in prompts} == set(REWRITTEN.values())
    seen = SCAN["geneval"](ran.out, ran.prompts, SIDE)
    assert seen.keys() == set(TEXTS)
    assert seen[TEXTS[1]][0].getpixel((0, 0))[0] == colour(REWRITTEN[TEXTS[1]], 0)[0]
    assert len(json.loads(ran.files["export.json"])["made"]["rewritten_sha256"]) == 64
    assert "holds pictures of rewritten_sha256" in export("geneval").stderr


@pytest.mark.parametrize("suite", SUITES)
def test_the_scorer_is_called_with_the_folder_whatever_its_name(export, tmp_path, suite):
    """The words are those that a shell reads; what python is told to run holds no path."""
    ran = export(suite, "--json", out='it\'s a "$HOME" {out}')
    words = shlex.split(json.loads(ran.stdout)["scorer"])
    naming = [word for word in words if "HOME" in word]
    assert naming
    assert all(word == str(ran.out) or word.startswith(f"{ran.out}/") for word in naming)
    for flag, code in itertools.pairwise(words):
        if flag == "-c":
            compile(code, "scorer", "exec")
            assert "sys.argv[1]" in code


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", json.dumps({TEXTS[0]: "x"}), f"lacks 4 of 5 prompts, the first being {TEXTS[1]!r}"),
        ("a.json", "[1]", "a.json: must be a JSON object, not list"),
        ("a.json", json.dumps({TEXTS[0]: 3}), f"a.json: {TEXTS[0]!r}: must be text, not int"),
        ("a.jsonl", '{"prompt": "a"}', 'a.jsonl line 1: must have the key "rewritten"'),
        ("a.txt", "one\ntwo", "must have a line for each of 5 prompts, not 2"),
        ("a.txt", "one\n\nthree\nfour\nfive", "a.txt line 2"),
        ("a.csv", "", "must end in .json"),
        ("b.json", None, "must be a readable file"),
    ],
)
def test_a_wrong_file_of_rewritten_prompts_is_one_line(export, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    ran = export("geneval", "--rewritten", name)
    assert (ran.status, ran.stderr.count("\n"), ran.files) == (2, 1, {})
    assert said in ran.stderr


@pytest.mark.parametrize(
    ("suite", "content", "said"),
    [
        ("geneval", '{"tag": "a", "include": [], "prompt": "x"}\n{"tag": 1}', "line 2: tag: must be text, not int"),
        ("geneval", '\n\n{"tag": "a", "include": []}', 'line 3: must have the key "prompt"'),
        ("geneval", '{"tag": "a", "include": [], "prompt": " "}', "line 1: prompt ' ': must be text that says"),
        ("geneval", "{", "evaluation_metadata.jsonl line 1: must be JSON (Expecting property name"),
        ("geneval", "", "must hold at least one prompt"),
        ("geneval", '{"tag": "a", "tag": "b"}', "line 1: key 'tag': must not be given twice"),
        ("imagereward", '[{"id": "../a", "prompt": "x"}]', "entry 0: id: '../a': must be a file name"),
        ("imagereward", '[{"id": "a", "prompt": "x"}, {"id": "A", "prompt": "y"}]', "'A': must not be there twice"),
        ("imagereward", '[\n1,\n"', "benchmark-prompts.json line 3: must be JSON"),
        ("mjhq", '{"f0": {"category": "..", "prompt": "x"}}', "entry 'f0': category: '..': must be a file name"),
        ("mjhq", '{"f0": {"category": "food"}}', "entry 'f0': must have the key \"prompt\""),
        ("mjhq", '{"f/0": {"category": "food", "prompt": "x"}}', "'f/0': must be a file name"),
    ],
)
def test_a_mistake_in_a_prompt_file_is_one_line_that_says_where(export, suite, content, said, tmp_path):
    path = export(suite, "--dry-run").prompts
    path.write_text(content)
    ran = export(suite)
    assert (ran.status, ran.stderr.count("\n"), ran.files) == (2, 1, {})
    assert said in ran.stderr


def test_prompt_folders_are_checked_file_by_file(export):
    dpg, hpsv2 = export("dpg", "--dry-run").prompts, export("hpsv2", "--dry-run").prompts
    (dpg / "3.5.txt").write_text("a cone")
    assert "file '3.5.txt': must have no dot in its name" in export("dpg").stderr
    (dpg / "3.5.txt").unlink()
    (dpg / "2.txt").write_bytes(b"\xff\xfe")
    assert "2.txt line 1: must be UTF-8 text" in export("dpg").stderr
    (hpsv2 / "photo.json").write_text('["a cone", ""]')
    assert "photo.json entry 1 '': must be text that says something" in export("hpsv2").stderr
    (hpsv2 / "photo.json").unlink()
    assert "photo.json: must be a readable file" in export("hpsv2").stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--suite", "geneva"], "--suite 'geneva': must be one of geneval, dpg, hpsv2, imagereward, mjhq"),
        (["--prompts", "p"], "no suite: one is needed"),
        (["--suite", "mjhq"], "no prompts: the suite's own are needed"),
        (["--suite", "mjhq", "--prompts", "gone.json"], "prompts file gone.json: must be a readable file"),
        (["--suite", "dpg", "--prompts", "gone"], "prompts gone: must be the folder dpg_bench/prompts"),
        (["--suite", "hpsv2", "--prompts", "x.json"], "prompts x.json: must be the folder with anime.json"),
        (["--suite", "mjhq", "--prompts", "p", "--images-per-prompt", "2"], "--images-per-prompt 2: must be 1"),
        (["--suite", "dpg", "--prompts", "p", "--images-per-prompt", "3"], "--images-per-prompt 3: must be 1 or 4"),
        (["--suite", "geneval", "--prompts", "p", "--images-per-prompt", "1001"], "must be from 1 to 1000"),
        (["--suite", "mjhq", "--prompts", "p", "--batch-size", "0"], "--batch-size '0': must be an integer"),
        (["--suite", "mjhq", "--prompts", "p", "--top-p", "2"], "--top-p '2': must be a number in (0, 1]"),
        (["--suite", "mjhq", "--prompts", "p", "--policy", "none"], "policy 'none': must be one of"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert toprovar(["export-eval", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_pictures_for_dpg_must_be_square(export):
    ran = export("dpg", "--aspect-ratio", "1:2")
    assert (ran.status, ran.files) == (2, {})
    assert "pictures of 16 x 32 pixels: must be square for dpg" in ran.stderr


def test_settings_reach_the_pipeline_and_the_record_with_defaults_filled_in(export):
    ran = export("mjhq", "--guidance", "4", "--tau", "1,0.5", "--top-k", "0", "--policy", "thin")
    _, _, options = ran.pipeline.calls[0]
    assert {name: options[name] for name in ("guidance_scale", "tau", "top_k", "top_p", "policy")} == {
        "guidance_scale": 4.0,
        "tau": [1.0, 0.5],
        "top_k": 0,
        "top_p": None,
        "policy": "thin",
    }
    record = json.loads(ran.files["export.json"])
    told = ("suite", "model", "policy", "guidance", "top_p", "pixels", "height", "prompts_sha256")
    assert [record["made"][name] for name in told[:-1]] == ["mjhq", "colours", "thin", 4.0, 0.97, "tiny", SIDE]
    assert record["runs"][0].keys() == {"toprovar-jax", "jax", "pillow", "backend"}


def test_a_dry_run_counts_what_is_missing_and_writes_nothing(export):
    ran = export("dpg", "--dry-run")
    assert (ran.status, ran.files, ran.pipeline.calls) == (0, {}, [])
    assert ran.stdout.startswith("5 files of 5 prompts in out/images, 5 of them to be made; 4 pictures per prompt")
    export("dpg", fail_at=9)
    told = json.loads(export("dpg", "--dry-run", "--json").stdout)
    assert (told["files"], told["missing"], told["plan"]) == (5, 3, {"policy": "dense"})


def test_json_is_one_object_with_the_command_that_scores(export):
    ran = export("dpg", "--json", "--quiet")
    told = json.loads(ran.stdout)
    assert (told["files"], told["made"], ran.stderr) == (5, 5, "")
    assert told["scorer"] == f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {ran.out}/images {SIDE}"


def test_of_many_warnings_the_first_are_said_and_the_others_counted(export):
    path = export("imagereward", "--dry-run").prompts
    path.write_text(json.dumps([{"id": str(n), "prompt": f"a long prompt {n}"} for n in range(8)]))
    ran = export("imagereward")
    assert ran.stderr.count("was cut") == 5
    assert "warning: 3 more like these\n" in ran.stderr


def test_the_embedded_model_exports_what_it_makes_when_called(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_geneval(tmp_path)
    words = ["export-eval", "--suite", "geneval", "--prompts", str(path), "--limit", "1", "--images-per-prompt", "2"]
    assert toprovar([*words, "--out", "out", "--seed", "3", "--quiet"]) == 0
    assert capsys.readouterr().out == "out/images\n"
    made = json.loads((tmp_path / "out" / "export.json").read_text())["made"]
    assert (made["model"], made["height"]) == ("scenes-small", 64)
    expected = InfinityPipeline.from_pretrained()(TEXTS[0], seed=4).images[0]
    with Image.open(tmp_path / "out" / "images" / "00000" / "samples" / "0001.png") as picture:
        assert picture.tobytes() == expected.tobytes()


def test_help_imports_neither_jax_nor_numpy(tmp_path):
    words = ["-X", "importtime", "-m", "toprovar_jax.cli.main", "export-eval", "--help"]
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--suite geneval|dpg|hpsv2|imagereward|mjhq" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "toprovar_jax.evaluation_suites.suite" in imported
    assert imported.isdisjoint({"jax", "jaxlib", "numpy", "flax", "PIL"})
