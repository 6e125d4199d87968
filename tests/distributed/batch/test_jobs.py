"""A folder belongs to one job; what is damaged, foreign or missing is named in one line."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from toprovar_jax.distributed.batch.ledger import Ledger
from toprovar_jax.errors import UserInputError

from .toy import CHUNKS, JOB, ledger, memory, output, undisturbed, work


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
