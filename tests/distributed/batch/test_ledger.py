"""What is committed stays, in whatever order and by whomever."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile

import pyarrow.parquet as pq
import pytest

from toprovar_jax.distributed.batch.ledger import Failure, Picture

from .toy import BATCHES, CHUNKS, content, ledger, memory, output, results, undisturbed, work

LAYOUTS = pytest.mark.parametrize("layout", ["files", "tar"])


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


def test_the_manifest_is_assembled_in_groups_of_rows(monkeypatch):
    monkeypatch.setattr("toprovar_jax.distributed.batch.manifest._ROW_GROUP", 5)
    storage = memory()
    work(ledger(storage))
    assert pq.ParquetFile(io.BytesIO(storage.read("manifest.parquet"))).metadata.num_row_groups == 2
    assert output(storage) == undisturbed("files")
