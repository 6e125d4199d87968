"""What is committed stays, in whatever order and by whomever; a folder belongs to one job."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import pyarrow.parquet as pq
import pytest

from toprovar_jax.distributed.batch.ledger import Failure, Ledger, Picture
from toprovar_jax.distributed.batch.remote_storage import RemoteStorage
from toprovar_jax.distributed.batch.storage import open_storage
from toprovar_jax.errors import UserInputError

from .toy import BATCHES, CHUNKS, JOB, content, ledger, memory, output, results, undisturbed, work

LAYOUTS = pytest.mark.parametrize("layout", ["files", "tar"])


@pytest.fixture(params=["local", "objects", "folders"])
def storage(request, tmp_path):
    """A disk, an object store, and a file system with folders behind fsspec."""
    if request.param == "folders":
        return RemoteStorage(f"file://{tmp_path}/a/run")
    return open_storage(str(tmp_path / "a" / "run")) if request.param == "local" else memory()


@LAYOUTS
def test_a_run_leaves_pictures_job_and_manifest_and_nothing_else(storage, layout):
    assert work(ledger(storage, layout))
    made = {
        "files": {f"images/{row // 5:06d}/{row:08d}-000.png" for row in range(10) if row != 4}
        | {"images/000000/00000000-001.png"},
        "tar": {"shards/000000.tar", "shards/000001.tar"},
    }[layout]
    manifests = {"manifest.parquet", "manifest/000000.parquet", "manifest/000001.parquet"}
    assert {entry.name for entry in storage.list("")} == {"job.json", ".work/workers/w0.json"} | manifests | made


@LAYOUTS
def test_the_manifest_tells_of_every_picture_and_failure_in_order(storage, layout):
    work(ledger(storage, layout))
    rows = pq.read_table(io.BytesIO(storage.read("manifest.parquet"))).to_pylist()
    assert [(row["row"], row["image"]) for row in rows] == [(0, 0), (0, 1)] + [(row, 0) for row in range(1, 10)]
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["time"])
        assert row["prompt"] == f"prompt “{row['row']}”"
        if row["row"] == 4:
            assert (row["status"], row["reason"]) == ("failed", "prompt: is too long; cut it")
            assert [row[name] for name in ("file", "seed", "recipe", "sha256", "bytes")] == [None] * 5
        else:
            picture = content(row["row"], row["image"])
            assert (row["sha256"], row["bytes"]) == (hashlib.sha256(picture).hexdigest(), len(picture))
            assert (row["status"], row["reason"], row["seed"]) == ("made", None, 7 + row["row"] + row["image"])
            assert (row["id"], json.loads(row["recipe"])["steps"]) == (f"id-{row['row']}", 13)
            name, _, member = row["file"].partition(":")
            read = storage.read(name)
            if member:
                with tarfile.open(fileobj=io.BytesIO(read)) as shard:
                    read = shard.extractfile(member).read()
            assert read == picture


def test_a_shard_is_what_webdataset_readers_expect():
    storage = memory()
    work(ledger(storage, "tar"))
    with tarfile.open(fileobj=io.BytesIO(storage.read("shards/000000.tar"))) as shard:
        names = shard.getnames()
        assert names == sorted(names)
        samples = {}
        for name in names:
            key, _, kind = name.partition(".")
            samples.setdefault(key, {})[kind] = shard.extractfile(name).read()
    assert list(samples) == ["00000000-000", "00000000-001", "00000001-000", "00000002-000", "00000003-000"]
    assert samples["00000000-001"]["png"] == content(0, 1)
    assert samples["00000002-000"]["txt"].decode() == "prompt “2”"
    about = json.loads(samples["00000002-000"]["json"])
    assert about["id"] == "id-2"
    assert about["seed"] == 9
    assert about["recipe"]["guidance"] == 3.5


@LAYOUTS
def test_the_bytes_do_not_depend_on_the_order_of_batches_or_on_who_made_them(layout):
    storage = memory()
    for batch in reversed(range(BATCHES)):
        worker = ledger(storage, layout, worker=f"w{batch}")
        for chunk in reversed(range(CHUNKS)):
            claim = worker.claim(chunk)
            claim.commit(f"b{batch}", results(chunk)[f"b{batch}"])
            claim.release()
    assert work(ledger(storage, layout, worker="last"))
    assert output(storage) == undisturbed(layout)


@LAYOUTS
def test_what_was_committed_is_known_to_whoever_goes_on(storage, layout):
    first = ledger(storage, layout).claim(0)
    first.commit("b1", results(0)["b1"])
    first.release()
    second = ledger(storage, layout, worker="w1").claim(0)
    assert second.committed() == {"b1": [(1, 0), (4, 0)]}


@LAYOUTS
def test_a_batch_committed_twice_counts_once(layout):
    storage = memory()
    claim = ledger(storage, layout).claim(0)
    for _ in range(2):
        claim.commit("b0", results(0)["b0"])
    claim.release()
    work(ledger(storage, layout, worker="w1"))
    assert output(storage) == undisturbed(layout)


@LAYOUTS
def test_a_worker_taken_for_dead_does_no_harm(layout):
    storage = memory()
    slow = ledger(storage, layout, worker="slow", lease_seconds=0.0).claim(0)
    slow.commit("b0", results(0)["b0"])
    assert not slow.lost()
    fast = ledger(storage, layout, worker="fast", lease_seconds=0.0)
    takeover = fast.claim(0)
    assert slow.lost()
    slow.release()
    assert not takeover.lost()
    slow.commit("b1", results(0)["b1"])
    takeover.commit("b2", results(0)["b2"])
    takeover.commit("b1", results(0)["b1"])
    takeover.complete()
    assert takeover.lost()
    slow.commit("b2", results(0)["b2"])
    slow.complete()
    assert not storage.list(".work/batches")
    assert not storage.list(".work/claims")
    assert work(fast)
    assert output(storage) == undisturbed(layout)


@LAYOUTS
def test_a_chunk_completed_by_others_in_the_midst_of_completing_it_stays_as_it_is(layout, monkeypatch):
    storage = memory()
    slow = ledger(storage, layout, worker="slow", lease_seconds=0.0).claim(0)
    for batch, made in results(0).items():
        slow.commit(batch, made)
    listing = storage.list

    def completed_meanwhile(folder):
        """The listing shows the first of the batches, as if the others had just been removed."""
        entries = listing(folder)
        if folder == ".work/batches/000000":
            monkeypatch.setattr(storage, "list", listing)
            ledger(storage, layout, worker="fast", lease_seconds=0.0).claim(0).complete()
            return entries[:1]
        return entries

    monkeypatch.setattr(storage, "list", completed_meanwhile)
    slow.complete()
    assert work(ledger(storage, layout, worker="last"))
    assert output(storage) == undisturbed(layout)


def test_a_chunk_completed_between_the_look_and_the_claim_is_not_claimed(monkeypatch):
    storage = memory()
    late = ledger(storage, worker="late")
    listing = storage.list

    def completed_meanwhile(folder):
        monkeypatch.setattr(storage, "list", listing)
        entries = listing(folder)
        work(ledger(storage, worker="fast"))
        return entries

    monkeypatch.setattr(storage, "list", completed_meanwhile)
    assert late.claim(0) is None
    assert not storage.list(".work/claims")


@LAYOUTS
def test_a_committed_picture_that_was_removed_is_made_again(storage, layout):
    claim = ledger(storage, layout, worker="w0").claim(0)
    for batch, made in results(0).items():
        claim.commit(batch, made)
    removed = {"files": "images/000000/00000003-000.png", "tar": ".work/batches/000000/b0.tar"}[layout]
    storage.remove(removed)
    with pytest.raises(OSError, match="committed in b0 are missing or damaged; start again, and they are made again"):
        claim.complete()
    claim.release()
    again = ledger(storage, layout, worker="w1").claim(0)
    assert again.committed().keys() == {"b1", "b2"}
    again.release()
    assert work(ledger(storage, layout, worker="w2"))
    assert output(storage) == undisturbed(layout)


def test_a_commit_that_was_removed_is_not_left_out_silently():
    storage = memory()
    claim = ledger(storage).claim(0)
    for batch, made in results(0).items():
        claim.commit(batch, made)
    storage.remove(".work/batches/000000/b1.json")
    with pytest.raises(OSError, match="committed in b1 are missing"):
        claim.complete()
    assert not storage.exists("manifest/000000.parquet")


def test_failed_rows_are_counted_once_wherever_their_records_are():
    storage = memory()
    worker = ledger(storage)
    claim = worker.claim(0)
    assert worker.failures() == 0
    claim.commit("b1", results(0)["b1"])
    assert worker.failures() == 1
    claim.commit("b0", results(0)["b0"])
    claim.commit("b2", results(0)["b2"])
    claim.complete()
    assert worker.failures() == 1
    assert ledger(storage, worker="w1").failures() == 1


def test_a_run_is_finished_when_every_chunk_is_complete():
    storage = memory()
    worker = ledger(storage)
    claim = worker.claim(1)
    for batch, made in results(1).items():
        claim.commit(batch, made)
    claim.complete()
    assert worker.complete_chunks() == {1}
    assert worker.claim(1) is None
    assert not worker.finish(CHUNKS)
    assert not storage.exists("manifest.parquet")
    assert work(worker)
    assert worker.finish(CHUNKS)


@LAYOUTS
def test_text_that_no_file_can_hold_is_recorded_all_the_same(storage, layout):
    claim, half = ledger(storage, layout).claim(0), "half \ud83d\0"
    picture = Picture(0, 0, half, half, 7, {"prompt": half}, b"x")
    claim.commit("b0", [picture, Failure(1, 0, half, half, f"prompt {half}: is not text")])
    claim.complete()
    rows = pq.read_table(io.BytesIO(storage.read("manifest/000000.parquet"))).to_pylist()
    assert [(row["id"], row["prompt"]) for row in rows] == [("half ?\0", "half ?\0")] * 2
    assert rows[1]["reason"] == "prompt half ?\0: is not text"


def test_a_chunk_of_failures_alone_has_no_shard():
    storage = memory()
    worker = ledger(storage, "tar")
    claim = worker.claim(0)
    claim.commit("b0", [results(0)["b1"][1]])
    claim.complete()
    assert not storage.list("shards")
    assert worker.failures() == 1


def test_the_same_job_is_joined_and_another_one_refused_naming_what_differs(storage):
    ledger(storage)
    before = output(storage)
    ledger(storage, worker="w1")
    other = {**JOB, "seed": 8, "settings": {"guidance": 4.0, "sizes": [1, 2]}, "rows": 3}
    with pytest.raises(UserInputError) as caught:
        Ledger(storage, layout="tar", worker="w2", lease_seconds=60.0).open(other)
    differences = (
        'layout is "files" there, "tar" here, rows is not set there, 3 here, seed is 7 there, 8 here and 1 more'
    )
    assert f"holds another job: {differences};" in str(caught.value)
    assert output(storage) == before


def test_of_two_jobs_that_begin_at_the_same_time_one_is_refused(storage, monkeypatch):
    nothing = storage.top()
    ledger(storage)
    monkeypatch.setattr(storage, "top", lambda: nothing)
    with pytest.raises(UserInputError, match="holds another job: seed is 7 there, 8 here"):
        Ledger(storage, layout="files", worker="w1", lease_seconds=60.0).open({**JOB, "seed": 8})


@pytest.mark.parametrize("content", [b"", b'{"model": "to', b"[1]", b"\xff"])
def test_a_damaged_job_is_an_error_in_one_line(storage, content):
    storage.write("job.json", content)
    with pytest.raises(UserInputError, match=r"job\.json: is damaged \(.*\); choose another place with --out"):
        ledger(storage)
    assert storage.read("job.json") == content


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(storage):
    storage.write("photos/me.png", b"x")
    with pytest.raises(UserInputError, match=r"must be empty or hold a job .* \(there is 'photos' and no job.json\)"):
        ledger(storage)
    assert [entry.name for entry in storage.list("")] == ["photos/me.png"]


def test_foreign_files_among_those_of_a_job_disturb_nothing(storage):
    foreign = ["images/notes.txt", "manifest/notes.parquet", "manifest/000001.parquet.bak", "readme"]
    foreign += [".work/workers/x.json", ".work/claims/000000.x", ".work/claims/000001.0.bak"]
    ledger(storage)
    for name in [*foreign, ".work/batches/000000/x", ".work/batches/000000/x.json"]:
        storage.write(name, b"[]x")
    worker = ledger(storage)
    assert worker.failures() == 0
    assert [state.worker for state in worker.workers()] == []
    assert work(worker)
    assert output(storage, foreign) == undisturbed("files")


def test_a_damaged_part_of_the_manifest_is_named_and_its_chunk_made_again_when_it_is_removed(storage):
    worker = ledger(storage)
    work(worker)
    storage.remove("manifest.parquet")
    storage.write("manifest/000001.parquet", storage.read("manifest/000001.parquet")[:-9])
    for use in (lambda: worker.finish(CHUNKS), ledger(storage, worker="w1").failures):
        with pytest.raises(UserInputError, match=r"manifest part manifest/000001.parquet: is damaged .*; remove it"):
            use()
    assert not storage.exists("manifest.parquet")
    storage.remove("manifest/000001.parquet")
    assert work(ledger(storage, worker="w2"))
    assert output(storage) == undisturbed("files")


def test_the_manifest_is_assembled_in_groups_of_rows(monkeypatch):
    monkeypatch.setattr("toprovar_jax.distributed.batch.manifest._ROW_GROUP", 5)
    storage = memory()
    work(ledger(storage))
    assert pq.ParquetFile(io.BytesIO(storage.read("manifest.parquet"))).metadata.num_row_groups == 2
    assert output(storage) == undisturbed("files")


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 101])
def test_a_worker_needs_a_name_that_a_file_can_have(name):
    with pytest.raises(UserInputError, match="choose another name"):
        ledger(memory(), worker=name)


def test_a_ledger_is_there_before_any_heavy_package(tmp_path):
    code = """
import sys
import toprovar_jax.distributed.batch.ledger
from toprovar_jax.distributed.batch.storage import open_storage
open_storage(sys.argv[1])
print([name for name in ("jax", "numpy", "pyarrow", "fsspec") if name in sys.modules])
"""
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout == "[]\n"


def test_the_package_for_manifests_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserInputError, match=r"needs pyarrow; pip install 'toprovar-jax\[batch\]'"):
        ledger(memory())
