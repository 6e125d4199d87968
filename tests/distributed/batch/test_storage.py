"""Files of a storage appear whole, once, or not at all, on a disk and on an object store alike."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import pathlib
import re
import sys
import threading
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from toprovar_jax.distributed.batch.storage import open_storage
from toprovar_jax.errors import UserInputError

from .toy import memory


def test_what_is_written_is_read_and_listed(storage):
    storage.write("a/b/one", b"first")
    storage.write("a/b/one", b"1")
    storage.write_all({"a/two": b"22", "c": b""})
    assert [(entry.name, entry.size) for entry in storage.list("")] == [("a/b/one", 1), ("a/two", 2), ("c", 0)]
    assert [entry.name for entry in storage.list("a/b")] == ["a/b/one"]
    assert storage.read("a/b/one") == b"1"
    assert list(storage.read_all(["c", "no", "a/two"])) == [b"", None, b"22"]
    assert storage.top() == {"a", "c"} | ({".work"} & storage.top())


def test_what_is_not_there_is_listed_empty_and_cannot_be_read(storage):
    assert storage.list("nowhere") == []
    assert not storage.exists("nowhere")
    with pytest.raises(FileNotFoundError):
        storage.read("nowhere")
    storage.remove("nowhere")


def test_a_folder_is_no_file(storage):
    storage.write("a/b", b"")
    assert not storage.exists("a")
    assert storage.exists("a/b")


def test_folders_of_similar_names_are_kept_apart(storage):
    storage.write("images/00001/a", b"")
    storage.write("images/000010/b", b"")
    assert [entry.name for entry in storage.list("images/00001")] == ["images/00001/a"]


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    storage = open_storage(str(tmp_path))
    storage.write("a/b", b"")
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        storage.list("a")


def test_only_one_of_many_creates_a_file(storage):
    assert storage.create("claims/1", b"mine")
    assert not storage.create("claims/1", b"yours")
    assert storage.read("claims/1") == b"mine"
    storage.remove("claims/1")
    assert storage.create("claims/1", b"yours")


def test_of_threads_at_the_same_time_one_creates_a_file(tmp_path):
    storage, created = open_storage(str(tmp_path)), []

    def create(number: int) -> None:
        if storage.create("a/claim", bytes([number])):
            created.append(number)
        storage.remove("a/other")  # which removes the folder, were it empty

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [storage.read("a/claim")] == [bytes([number]) for number in created]


def test_writers_and_removers_of_one_folder_do_not_disturb_each_other(tmp_path):
    storage, errors = open_storage(str(tmp_path)), []

    def come_and_go(number: int) -> None:
        try:
            for _ in range(30):
                storage.write(f"a/b/{number}", b"x")
                storage.remove(f"a/b/{number}")
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert storage.top() <= {".work"}


def test_content_in_pieces_appears_only_when_it_is_all_there(storage):
    storage.write("a", b"old")
    with contextlib.suppress(RuntimeError), storage.writing("a") as file:
        file.write(b"new")
        raise RuntimeError
    assert storage.read("a") == b"old"
    with storage.writing("a") as file:
        file.write(b"new ")
        file.write(memoryview(b"content"))
        assert storage.read("a") == b"old"
    assert storage.read("a") == b"new content"


def test_the_clock_is_that_of_the_files(storage, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    before = storage.clock()
    storage.write("a", b"")
    (entry,) = [entry for entry in storage.list("") if entry.name == "a"]
    assert before - 0.1 < entry.modified < storage.clock() + 0.1


def test_a_file_is_on_the_disk_before_it_has_a_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    storage, calls = open_storage(str(tmp_path)), []
    storage.clock()
    for name in ("fsync", "replace"):
        call = getattr(os, name)

        def noted(*arguments, name=name, call=call):
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[1]
            calls.append((name, pathlib.Path(place).name if pathlib.Path(place) != tmp_path else "root"))
            return call(*arguments)

        monkeypatch.setattr(os, name, noted)
    storage.write("folder/file", b"x")
    assert [(name, "temporary" if "," in place else place) for name, place in calls] == [
        ("fsync", "temporary"),
        ("fsync", "root"),  # which holds the new folder
        ("replace", "file"),
        ("fsync", "folder"),
    ]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(str(tmp_path))
    assert storage.create("a", b"1")
    assert not storage.create("a", b"2")
    assert storage.read("a") == b"1"


def test_an_output_folder_that_vanishes_is_an_error(tmp_path):
    storage = open_storage(str(tmp_path / "run"))
    (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError, match="the output folder has vanished"):
        storage.write("a", b"")
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_bytes(b"")
    for url in (str(tmp_path / "run"), str(tmp_path / "run" / "below"), f"file://{tmp_path}/run"):
        with pytest.raises(UserInputError, match="must be a directory that can be written to"):
            open_storage(url)


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    opened = os.open

    def read_only(path, flags, *mode, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserInputError, match=r"output directory .*read-only file system.*; choose another with --out"):
        open_storage(str(tmp_path))


def test_a_store_that_refuses_writes_is_refused(monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise OSError("403, no permission\nto write")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", forbidden)
    with pytest.raises(UserInputError, match=r"must be a place that can be written to \(403, no permission to write\)"):
        open_storage("memory://toy")


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, type("ClientConnectorError", (OSError,), {})])
def test_a_store_that_cannot_be_reached_is_a_failure_and_no_mistake(monkeypatch, error):
    def away(*_: object, **__: object) -> None:
        raise error("no route")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", away)
    with pytest.raises(error, match="no route"):
        open_storage("memory://toy")


def test_a_missing_package_or_an_unknown_kind_of_url_is_one_line_with_the_remedy(monkeypatch):
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(UserInputError, match="needs fsspec's package for gs://; pip install gcsfs"):
            open_storage("gs://bucket/run")
    with pytest.raises(UserInputError, match=r"must be a local path or a URL that fsspec can open .*; check the URL"):
        open_storage("nosuch://place")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserInputError, match=re.escape("needs fsspec; pip install 'toprovar-jax[batch]'")):
        open_storage("memory://toy")


@pytest.mark.parametrize("answer", ["overwrites", NotImplementedError, TypeError])
def test_a_store_that_cannot_create_exclusively_still_respects_what_is_there(monkeypatch, answer):
    pipe_file = MemoryFileSystem.pipe_file

    def careless(self, path, value, mode="overwrite", **options):
        if mode == "create" and answer != "overwrites":
            raise answer
        return pipe_file(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    storage = memory()
    assert storage.create("claim", b"mine")
    assert not storage.create("claim", b"yours")
    assert storage.read("claim") == b"mine"


def test_a_creation_that_was_repeated_after_a_lost_answer_is_ones_own(monkeypatch):
    pipe_file = MemoryFileSystem.pipe_file

    def repeated(self, path, value, mode="overwrite", **options):
        pipe_file(self, path, value, mode=mode)
        if mode == "create":
            raise FileExistsError(path)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", repeated)
    assert memory().create("claim", b"mine")


def test_a_lost_connection_is_not_a_missing_file(monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise ConnectionError

    storage = memory()
    monkeypatch.setattr(MemoryFileSystem, "info", lost)
    with pytest.raises(ConnectionError):
        storage.exists("a")


@pytest.mark.parametrize("listed", [{"updated": "2026-01-02T03:04:05Z"}, {"mtime": 1767323045}, {"created": None}])
def test_times_are_read_as_stores_write_them(monkeypatch, listed):
    info = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {**info(self, path), "created": None, **listed})
    if "created" in listed:
        with pytest.raises(UserInputError, match="tells when files were written is needed"):
            memory()
    else:
        assert memory().clock() == pytest.approx(1767323045, abs=1.0)
