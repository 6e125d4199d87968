"""A run: the same bytes whoever makes them and however often it was disturbed, and never more than is missing."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import threading

import pyarrow.parquet as pq
import pytest

from toprovar_jax.distributed.batch.batches import Planner
from toprovar_jax.distributed.batch.ledger import Ledger
from toprovar_jax.distributed.batch.progress import Progress
from toprovar_jax.distributed.batch.rows import PromptRows
from toprovar_jax.distributed.batch.run import BatchRun, TooManyFailures, follow
from toprovar_jax.distributed.batch.storage import open_storage
from toprovar_jax.distributed.batch.work import Work
from toprovar_jax.errors import UserInputError

from .painting import SETTINGS, PaintingPipeline

ROWS = [
    *({"prompt": f"picture {k}"} for k in range(9)),
    {"prompt": ""},
    {"prompt": "of many", "num_images": 5},
    {"prompt": "wide", "aspect_ratio": "2:1"},
    {"prompt": "nan"},
    {"prompt": "w " * 300},
    {"prompt": "foggy", "negative_prompt": "fog", "seed": 3},
    *({"prompt": f"guided {k}", "guidance": 1 + k % 2} for k in range(8)),
]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS)
CHUNK, BATCH = 4, 3
NAMES = (f"w{k}" for k in itertools.count())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(CONTENT)
    return str(path)


def worker(prompts, out, *, pipeline=None, layout="files", lease=30.0, **options):
    """A run that is ready to begin, and what it counts."""
    pipeline = pipeline or PaintingPipeline()
    rows = PromptRows(prompts)
    planner = Planner(pipeline, SETTINGS, batch_size=BATCH, copies=pipeline.copies)
    work = Work(rows, planner, pipeline, CHUNK)
    ledger = Ledger(open_storage(str(out)), layout=layout, worker=next(NAMES), lease_seconds=lease)
    ledger.open({"rows": rows.count, "sha256": rows.sha256})
    progress = Progress()
    return BatchRun(work, ledger, progress, poll_seconds=0.02, **options), progress


def content(out):
    """Every picture's bytes by the manifest, and the manifest without times."""
    storage = open_storage(str(out))
    table = pq.read_table(io.BytesIO(storage.read("manifest.parquet"))).drop_columns(["time"]).to_pylist()
    names = {row["file"].partition(":")[0] for row in table if row["file"]}
    assert [entry.name for entry in storage.list(".work") if "/workers/" not in entry.name] == []
    return table, {name: storage.read(name) for name in sorted(names)}


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run by one worker leaves behind, and the calls it took."""

    content: tuple
    progress: Progress
    calls: list


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By layout."""

    @functools.cache
    def run(layout="files"):
        folder = tmp_path_factory.mktemp("undisturbed")
        path, pipeline = folder / "p.jsonl", PaintingPipeline()
        path.write_text(CONTENT)
        run, progress = worker(str(path), folder / "out", pipeline=pipeline, layout=layout)
        assert run.run() == "finished"
        return Undisturbed(content(folder / "out"), progress, pipeline.calls)

    return run


def test_every_picture_is_made_and_every_failure_has_its_reason(undisturbed):
    (table, files), progress = undisturbed().content, undisturbed().progress
    failed = {row["row"]: row["reason"] for row in table if row["status"] == "failed"}
    assert sorted(failed) == [9, 12, 13]
    assert failed[9].startswith("row 9: prompt '': must be text")
    assert failed[12] == "row 12: 1 of 192 values of the picture are not finite"
    assert failed[13].startswith("row 13: prompt of 301 tokens: must have at most 300")
    made = [(row["row"], row["image"]) for row in table if row["status"] == "made"]
    wanted = [(k, image) for k, row in enumerate(ROWS) for image in range(row.get("num_images", 1)) if k not in failed]
    assert (made, len(files)) == (wanted, len(wanted))
    assert (progress.made, progress.failures, progress.rows) == (len(wanted), 3, len(ROWS))
    assert {row["seed"] for row in table if row["row"] == 14} == {3}
    assert [row["seed"] for row in table if row["row"] == 10] == [10000, 10001, 10002, 10003, 10004]


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_bytes_are_the_same_from_any_number_of_workers_and_any_place(prompts, tmp_path, undisturbed, layout):
    alone = undisturbed(layout).content
    elsewhere = f"memory://elsewhere/{layout}"
    assert worker(prompts, elsewhere, layout=layout, first_chunk=3)[0].run() == "finished"
    assert content(elsewhere) == alone
    workers = [worker(prompts, tmp_path / "three", layout=layout, first_chunk=k) for k in (0, 2, 5)]
    outcomes = []
    threads = [threading.Thread(target=lambda run=run: outcomes.append(run.run())) for run, _ in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["finished"] * 3
    assert content(tmp_path / "three") == alone
    assert sum(progress.made for _, progress in workers) == sum(row["status"] == "made" for row in alone[0])


class Broken(Exception):
    pass


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_bytes_are_the_same_however_often_the_device_fails(prompts, tmp_path, undisturbed, layout):
    whole = undisturbed(layout)
    calls, made = 0, 0

    def fails(number):
        if number == 2:
            raise Broken("the device went away")

    while True:
        pipeline = PaintingPipeline(before=fails)
        run, progress = worker(prompts, tmp_path / "out", pipeline=pipeline, layout=layout, first_chunk=calls % 6)
        try:
            outcome = run.run()
        except Broken:
            assert len(pipeline.calls) == 2
        else:
            assert outcome == "finished"
            break
        finally:
            calls, made = calls + len(pipeline.calls), made + progress.made
    assert content(tmp_path / "out") == whole.content
    assert (made, calls) == (whole.progress.made, len(whole.calls))


def test_a_stop_commits_the_batch_in_flight_and_gives_the_chunk_back(prompts, tmp_path, undisturbed):
    pipeline = PaintingPipeline()
    run, progress = worker(prompts, tmp_path / "out", pipeline=pipeline, stopping=lambda: len(pipeline.calls) >= 3)
    assert run.run() == "stopped"
    assert progress.made == sum(len(set(seeds)) for _, seeds, _ in pipeline.calls)
    run, rest = worker(prompts, tmp_path / "out", lease=1e6)  # a claim that was kept would hold forever
    assert run.run() == "finished"
    assert content(tmp_path / "out") == undisturbed().content
    assert progress.made + rest.made == undisturbed().progress.made


def test_a_finished_job_is_left_as_it_is(prompts, tmp_path):
    assert worker(prompts, tmp_path / "out")[0].run() == "finished"
    pipeline = PaintingPipeline()
    run, progress = worker(prompts, tmp_path / "out", pipeline=pipeline)
    assert run.run() == "finished"
    assert (pipeline.calls, progress.made) == ([], 0)


def test_without_waiting_a_worker_leaves_what_others_have_claimed(prompts, tmp_path):
    other = Ledger(open_storage(str(tmp_path / "out")), layout="files", worker="other", lease_seconds=1e6)
    run, progress = worker(prompts, tmp_path / "out", wait=False)
    claim = other.claim(1)
    assert claim is not None
    assert run.run() == "left to others"
    assert progress.rows == len(ROWS) - CHUNK
    claim.release()
    assert worker(prompts, tmp_path / "out", wait=False)[0].run() == "finished"


def test_a_worker_waits_for_others_and_takes_over_what_they_abandon(prompts, tmp_path, undisturbed):
    other = Ledger(open_storage(str(tmp_path / "out")), layout="files", worker="other", lease_seconds=1e6)
    run, _ = worker(prompts, tmp_path / "out")
    claim = other.claim(1)
    assert claim is not None
    timer = threading.Timer(0.3, claim.release)
    timer.start()
    assert run.run() == "finished"
    timer.join()
    assert content(tmp_path / "out") == undisturbed().content


@pytest.mark.parametrize(("allowed", "stops"), [(2, True), (3, False)])
def test_more_failures_than_allowed_stop_the_run_now_and_later(prompts, tmp_path, undisturbed, allowed, stops):
    run, _ = worker(prompts, tmp_path / "out", max_failures=allowed)
    if not stops:
        assert run.run() == "finished"
        return
    with pytest.raises(TooManyFailures, match="3 rows have failed, more than --max-failures 2"):
        run.run()
    pipeline = PaintingPipeline()
    with pytest.raises(TooManyFailures):
        worker(prompts, tmp_path / "out", max_failures=allowed, pipeline=pipeline)[0].run()
    assert pipeline.calls == []
    assert worker(prompts, tmp_path / "out")[0].run() == "finished"
    assert content(tmp_path / "out") == undisturbed().content


def test_what_the_device_cannot_hold_fails_if_rows_ask_for_it_and_stops_a_job_that_does(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "refused", "aspect_ratio": "2:1"}\n{"prompt": "good"}\n')
    run, progress = worker(str(path), tmp_path / "own")
    assert run.run() == "finished"
    assert (progress.made, progress.failures) == (1, 1)
    assert content(tmp_path / "own")[0][0]["reason"] == "row 0: 1M: needs more memory than there is; choose less"
    path.write_text('{"prompt": "refused"}\n{"prompt": "good", "aspect_ratio": "2:1"}\n')
    with pytest.raises(UserInputError, match="needs more memory"):
        worker(str(path), tmp_path / "job")[0].run()


def test_a_prompt_file_that_vanishes_ends_the_run_and_loses_nothing(prompts, tmp_path, undisturbed):
    def vanish(number):
        if number == 1:
            (tmp_path / "p.jsonl").rename(tmp_path / "aside")

    run, progress = worker(prompts, tmp_path / "out", pipeline=PaintingPipeline(before=vanish))
    with pytest.raises(UserInputError, match="has vanished during the run"):
        run.run()
    (tmp_path / "aside").rename(tmp_path / "p.jsonl")
    again, rest = worker(prompts, tmp_path / "out")
    assert again.run() == "finished"
    assert content(tmp_path / "out") == undisturbed().content
    assert progress.made > 0
    assert progress.made + rest.made == undisturbed().progress.made


def test_storage_that_fails_ends_the_run_with_its_error(prompts, tmp_path, monkeypatch):
    run, _ = worker(prompts, tmp_path / "out")
    monkeypatch.setattr("toprovar_jax.distributed.batch.ledger.Claim.commit", lambda *_: full())
    with pytest.raises(OSError, match="No space left"):
        run.run()
    monkeypatch.undo()
    assert worker(prompts, tmp_path / "out", lease=1e6)[0].run() == "finished"


def full():
    raise OSError(28, "No space left on device")


def test_members_of_a_group_draw_what_their_leader_draws(prompts, tmp_path, undisturbed):
    group = Pair()
    leader, progress = worker(prompts, tmp_path / "out", group=group)
    pipeline = PaintingPipeline()
    work = Work(PromptRows(prompts), Planner(pipeline, SETTINGS, batch_size=BATCH), pipeline, CHUNK)
    thread = threading.Thread(target=follow, args=(work, Member(group)))
    thread.start()
    assert leader.run() == "finished"
    thread.join(30)
    assert pipeline.calls == undisturbed().calls
    assert progress.rows == len(ROWS)


class Pair:
    """A group of two threads: the leader's half."""

    leader = True

    def __init__(self):
        self.said, self.heard, self.message = threading.Semaphore(0), threading.Semaphore(0), b""

    def agree(self, message):
        self.message = message
        self.said.release()
        self.heard.acquire()
        return message


class Member:
    """The other half."""

    leader = False

    def __init__(self, pair):
        self.pair = pair

    def agree(self, message):
        assert message is None
        self.pair.said.acquire()
        message = self.pair.message
        self.pair.heard.release()
        return message


def test_copies_that_work_side_by_side_change_no_byte(prompts, tmp_path, undisturbed):
    run, _ = worker(prompts, tmp_path / "out", pipeline=PaintingPipeline(copies=3))
    assert run.run() == "finished"
    assert content(tmp_path / "out") == undisturbed().content
