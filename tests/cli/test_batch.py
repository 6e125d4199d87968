"""The batch command: what it says, what it refuses, and with which status it ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal

import pyarrow.parquet as pq
import pytest

from toprovar_jax.cli.batch import main
from toprovar_jax.images import read_recipe

from ..distributed.batch.painting import PaintingPipeline


@dataclasses.dataclass(frozen=True)
class Ran:
    status: int
    stdout: str
    stderr: str
    pipeline: PaintingPipeline


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder with twenty prompts: ``batch("--chunk", "4")``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("".join(f"picture {k}\n" for k in range(20)))

    def run(*argv, prompts="p.txt", out="out", pipeline=None):
        pipeline = pipeline or PaintingPipeline()
        loaded = {}

        def load(_model, **settings):
            loaded.update(settings)
            return pipeline

        given = [word for pair in (("--prompts", prompts), ("--out", out)) if pair[1] for word in pair]
        status = main([*given, "--lease-seconds", "30", *argv], load=load)
        said = capsys.readouterr()
        return Ran(status, said.out, said.err, pipeline)

    return run


def manifest(folder):
    return pq.read_table(io.BytesIO((folder / "manifest.parquet").read_bytes())).to_pylist()


def test_a_job_is_made_and_a_second_run_makes_nothing(batch, tmp_path):
    done = batch("--chunk", "6", "--batch-size", "4")
    assert (done.status, done.stdout) == (0, "out\n")
    assert done.stderr.splitlines()[-1].startswith("20 pictures made now, ")
    rows = manifest(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(20))
    recipe = read_recipe(tmp_path / "out" / rows[7]["file"])
    assert (recipe["prompt"], recipe["seed"], recipe["guidance"]) == ("picture 7", 7000, 3.0)
    assert json.loads(rows[7]["recipe"]) == recipe
    again = batch("--chunk", "6", "--batch-size", "4")
    assert (again.status, again.pipeline.calls) == (0, [])
    assert again.stderr.startswith("nothing to do: all 20 prompts are done in out\n")


def test_json_tells_what_was_made(batch):
    told = json.loads(batch("--json", "--quiet").stdout)
    assert told.pop("seconds") > 0
    assert told == {
        **{"out": "out", "finished": True, "rows": 20, "images": 20, "failures": 0, "failed_rows": 0},
        **{"programs": 1, "warnings": []},
    }


def test_webdataset_shards_go_where_a_url_says(batch):
    assert batch("--layout", "tar", out="memory://cli/run").status == 0
    assert batch("--layout", "tar", out="memory://cli/run").pipeline.calls == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--seed", "1"), "settings"),
        (("--chunk", "5"), "chunk"),
        (("--batch-size", "5"), "batch_size"),
        (("--layout", "tar"), "layout"),
        (("--cut-long-prompts",), "cut_long_prompts"),
    ],
)
def test_another_job_in_the_same_place_is_refused_by_name(batch, changed, named):
    assert batch("--chunk", "4").status == 0
    refused = batch(*(("--chunk", "4") if "--chunk" not in changed else ()), *changed)
    assert (refused.status, refused.stderr.count("\n"), refused.pipeline.calls) == (2, 1, [])
    assert f"holds another job: {named}" in refused.stderr


def test_changed_prompts_are_another_job(batch, tmp_path):
    assert batch().status == 0
    (tmp_path / "p.txt").write_text("other\n" * 20)
    assert "holds another job" in batch().stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--chunk", "0"), "--chunk '0': must be an integer >= 1"),
        (("--layout", "zip"), "--layout 'zip': must be one of files, tar"),
        (("--worker", "a/b"), "--worker 'a/b': must be letters"),
        (("--max-failures", "-1"), "--max-failures"),
        (("--lease-seconds", "soon"), "--lease-seconds 'soon': must be a number > 0"),
        (("--coordinator", "a:1"), "--coordinator a:1: needs --distributed"),
        (
            ("--distributed", "--coordinator", "host", "--num-processes", "2", "--process-id", "1"),
            "--coordinator 'host': must be HOST:PORT",
        ),
        (("--distributed", "--process-id", "1"), "--distributed: needs --coordinator, --num-processes too"),
        (("--num-images", "1001"), "--num-images 1001: must be at most 1000"),
        (("--pixels", "9M"), "pixels '9M': must be one of tiny, 1M"),
        (("--polcy", "dense"), "option --polcy: is not known; did you mean --policy?"),
    ],
)
def test_mistakes_are_one_line_and_status_2_before_anything_is_made(batch, argv, said):
    done = batch(*argv)
    assert (done.status, done.stderr.count("\n"), done.pipeline.calls) == (2, 1, [])
    assert done.stderr.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": None}, "no prompts: a file of them is needed"),
        ({"out": None}, "no output: a place for it is needed"),
        ({"prompts": "no.txt"}, "prompts file no.txt: does not exist"),
        ({"prompts": "empty.txt"}, "prompts file empty.txt: must hold at least one prompt"),
        ({"out": "p.txt"}, "output "),
        ({"out": "p.txt/below"}, "output "),
    ],
)
def test_files_that_cannot_be_used_are_one_line_and_status_2(batch, tmp_path, given, said):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    done = batch(**given)
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {said}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_refused_before_anything_is_made(batch, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    done = batch(out="locked/out")
    assert (done.status, done.stderr.count("\n"), done.pipeline.calls) == (2, 1, [])


def test_broken_rows_are_told_and_do_not_change_the_status(batch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\nno\n')
    done = batch(prompts="p.jsonl")
    assert done.status == 0
    assert done.stderr.splitlines()[-1].startswith("1 pictures made now, 2 failed, ")
    again = batch(prompts="p.jsonl")  # whoever ends last may not be the one that met them
    assert "2 of all 3 rows have failed; the manifest says why\n" in again.stderr
    assert json.loads(batch("--json", "--quiet", prompts="p.jsonl").stdout)["failed_rows"] == 2


def test_too_many_failures_are_one_line_and_status_1(batch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\nno\n')
    done = batch("--max-failures", "1", prompts="p.jsonl")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: 2 rows have failed, more than --max-failures 1; mend the rows")


def test_a_failing_device_is_one_line_and_what_is_made_stays(batch, tmp_path):
    def fail(number):
        if number == 2:
            raise RuntimeError("the device went away")

    done = batch("--batch-size", "4", pipeline=PaintingPipeline(before=fail))
    assert done.status == 1
    assert done.stderr == (
        "error: RuntimeError: the device went away; run again with --debug to see where; "
        "8 pictures committed now in out; the same command goes on from there\n"
    )
    assert batch("--batch-size", "4").status == 0
    assert len(manifest(tmp_path / "out")) == 20


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_the_run_after_the_batch_in_flight(batch, tmp_path, sent, status, said):
    def receive(number):
        if number == 1:
            os.kill(os.getpid(), sent)

    done = batch("--batch-size", "4", pipeline=PaintingPipeline(before=receive))
    assert (done.status, len(done.pipeline.calls)) == (status, 2)
    assert done.stderr == (f"error: {said}; 8 pictures committed now in out; the same command goes on from there\n")
    (heartbeat,) = (tmp_path / "out" / ".work" / "workers").iterdir()
    assert json.loads(heartbeat.read_text())["state"]["state"] == "stopped"
    rest = batch("--batch-size", "4", "--lease-seconds", "900000")
    assert (rest.status, len(rest.pipeline.calls)) == (0, 3)


def test_a_dry_run_reads_everything_and_makes_nothing(batch, tmp_path):
    rows = [{"prompt": f"p{k}"} for k in range(5)] + [{"prompt": ""}, {"prompt": "x", "aspect_ratio": "2:1"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = batch("--dry-run", "--batch-size", "4", prompts="p.jsonl")
    assert (done.status, done.pipeline.calls, (tmp_path / "out").exists()) == (0, [], False)
    lines = done.stdout.splitlines()
    assert lines[0] == "7 prompts in 1 chunks: 6 pictures, 1 rows that cannot be drawn"
    assert lines[1].startswith("  row 5: prompt '': must be text")
    assert lines[2] == "2 kinds of batches, each compiled once, 50 % of what is computed is padding"
    assert lines[3].startswith("5 pictures in 2 batches of 4, 8 x 8 pixels (height x width), texts of up to 64 tokens")
    told = json.loads(batch("--dry-run", "--json", "--batch-size", "4", prompts="p.jsonl").stdout)
    assert [(one["pictures"], one["padding"], one["width"]) for one in told["programs"]] == [(5, 3, 8), (1, 3, 16)]


def test_in_exact_precision_calls_are_not_padded(batch):
    done = batch("--batch-size", "8", pipeline=PaintingPipeline(precision="exact"))
    assert [len(seeds) for _, seeds, _ in done.pipeline.calls] == [8, 8, 4]


def test_many_warnings_are_counted(batch, tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"cat {k}\n" for k in range(20)))
    lines = batch().stderr.splitlines()
    assert sum("is about cats" in line for line in lines) == 5
    assert "warning: 15 more like these" in lines
