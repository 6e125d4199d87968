"""Stopping and going on: the same bytes as without a stop, nothing made twice, nothing mixed."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from toprovar_jax.evaluation_suites.manifest import alone, fingerprint

from .suite_files import TEXTS, write_geneval


@pytest.mark.parametrize("suite", ["geneval", "dpg", "hpsv2"])
@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_a_stopped_export_goes_on_to_the_same_bytes(export, suite, fail_at):
    whole = export(suite, "--batch-size", "3", out="whole", company=True)
    stopped = export(suite, "--batch-size", "3", fail_at=min(fail_at, len(whole.pipeline.calls) - 1), company=True)
    assert stopped.status == 1
    assert json.loads(stopped.files["export.json"])["finished"] is False
    resumed = export(suite, "--batch-size", "3", company=True)
    assert resumed.status == 0
    assert resumed.files == whole.files
    assert json.loads(resumed.files["export.json"])["finished"] is True


def test_a_failure_says_what_is_kept(export):
    ran = export("geneval", fail_at=6)
    assert ran.stderr.splitlines()[-1] == (
        "error: RuntimeError: the device went away; run again with --debug to see where; 6 finished files kept in "
        "out/images; the same command goes on from there"
    )


def test_a_finished_export_is_not_made_again(export):
    first = export("imagereward")
    again = export("imagereward")
    assert again.pipeline.calls == []
    assert again.files == first.files
    assert "0 of them made now" in again.stderr


def test_torn_and_foreign_pictures_are_made_again(export):
    first = export("geneval")
    samples = first.out / "images" / "00001" / "samples"
    whole = (samples / "0002.png").read_bytes()
    (samples / "0002.png").write_bytes(whole[:-3])
    Image.new("RGB", (4, 4)).save(samples / "0000.png")
    (samples / "0001.png").write_bytes(b"")
    (samples / "0003.png").write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
    again = export("geneval", "--batch-size", "2")
    assert "4 files were not whole pictures and are made again, the first being 00001/samples/0000.png" in again.stderr
    assert again.files == first.files
    assert again.pipeline.seeds == [1000, 1001, 1002, 1003]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--policy", "thin"], "holds pictures of policy dense, not thin"),
        (["--guidance", "4"], "holds pictures of guidance 3.0, not 4.0"),
        (["--tau", "1"], "holds pictures of tau [1.0, 0.5], not 1.0"),
        (["--seed", "1"], "holds pictures of seed 0, not 1"),
        (["--images-per-prompt", "3"], "holds pictures of images_per_prompt 4, not 3"),
        (["--limit", "4"], "holds pictures of 5 prompts already, more than 4"),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(export, argv, said):
    first = export("geneval")
    other = export("geneval", *argv)
    assert (other.status, other.pipeline.calls) == (2, [])
    assert other.stderr.startswith(f"error: --out out: {said};")
    assert other.stderr.count("\n") == 1
    assert other.files == first.files


def test_another_model_another_suite_and_other_prompts_are_refused_in_the_same_folder(export):
    first = export("geneval")
    assert "holds pictures of model colours, not greys" in export("geneval", model_name="greys").stderr
    assert "holds pictures of suite geneval, not mjhq" in export("mjhq").stderr
    first.prompts.write_text(first.prompts.read_text().replace("cone", "cube"))
    assert "holds pictures of prompts_sha256" in export("geneval").stderr


def test_a_limited_export_can_be_made_longer(export):
    whole = export("imagereward", out="whole")
    short = export("imagereward", "--limit", "2")
    assert len(json.loads(short.files["metadata.jsonl"])) == 2
    assert len(short.pipeline.seeds) == 20
    longer = export("imagereward")
    assert len(longer.pipeline.seeds) == 10 * (len(TEXTS) - 2)
    assert longer.files == whole.files


def test_another_device_is_told_and_kept_in_the_record(export):
    first = export("geneval", fail_at=2)
    record = json.loads(first.files["export.json"])
    record["runs"] = [{**record["runs"][0], "backend": "tpu"}]
    (first.out / "export.json").write_text(json.dumps(record))
    again = export("geneval")
    assert "made with other versions or on another device" in again.stderr
    assert [run["backend"] for run in json.loads(again.files["export.json"])["runs"]] == ["tpu", "cpu"]


def test_a_folder_of_something_else_is_left_alone(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    ran = export("mjhq")
    assert (ran.status, ran.pipeline.calls) == (2, [])
    assert "exists, and was not made by export-eval" in ran.stderr
    assert list(ran.files) == ["thesis.txt"]


def test_half_written_files_of_a_killed_export_are_taken_away(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".toprovar-0123456789abcdef.tmp").write_bytes(b"{")
    first = export("mjhq", fail_at=2)
    (first.out / "images" / "food" / ".toprovar-fedcba9876543210.tmp").write_bytes(b"half")
    again = export("mjhq")
    assert again.status == 0
    assert not [name for name in again.files if name.endswith(".tmp")]


def test_a_model_is_told_by_what_its_files_hold_and_not_by_where_or_when(tmp_path):
    def folder(name: str, content: bytes) -> pathlib.Path:
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "weights").write_bytes(content)
        return tmp_path / name

    content = os.urandom(2**21)
    told = fingerprint(folder("a", content))
    os.utime(tmp_path / "a" / "part" / "weights", (0, 0))
    assert fingerprint(folder("b", content)) == fingerprint(tmp_path / "a") == told
    assert fingerprint(folder("c", content[:-1] + bytes([content[-1] ^ 1]))) != told
    assert fingerprint(folder("d", content[:-1])) != told


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from tests.evaluation_suites.conftest import ColourPipeline
from toprovar_jax.cli.export_eval import main

class Slow(ColourPipeline):
    def __call__(self, *args, **options):
        time.sleep(0.03)
        return super().__call__(*args, **options)

sys.exit(main(sys.argv[1:], load=lambda _model: Slow(company=True)))
"""


def test_killed_exports_end_with_the_bytes_of_one_that_was_not(export, tmp_path):
    root = str(pathlib.Path(__file__).parents[2])
    prompts = write_geneval(tmp_path)
    words = ["--suite", "geneval", "--prompts", str(prompts), "--batch-size", "3"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    for finished in (1, 5, 11):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW.format(root=root), *words, "--out", "out"], cwd=tmp_path, env=environment
        )
        try:
            while len(list((tmp_path / "out").rglob("*.png"))) < finished and process.poll() is None:
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    resumed = export("geneval", "--batch-size", "3", company=True)
    whole = export("geneval", "--batch-size", "3", out="whole", company=True)
    assert len(resumed.pipeline.calls) < len(whole.pipeline.calls)
    assert resumed.files == whole.files


def test_a_torn_jpeg_is_made_again(export):
    first = export("hpsv2")
    path = first.out / "images" / "paintings" / "00000.jpg"
    path.write_bytes(path.read_bytes()[:-2])
    again = export("hpsv2")
    assert again.files == first.files
    assert again.pipeline.seeds == [3000]


def test_two_exports_into_one_folder_at_once_are_refused(export, tmp_path):
    first = export("mjhq", fail_at=1)
    with alone(tmp_path / "out"):
        other = export("mjhq")
    assert (other.status, other.pipeline.calls) == (2, [])
    assert "is being written to by another export" in other.stderr
    assert other.files == first.files
