"""Files appear whole or not at all, over nothing; directories are judged before they are needed."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, ensure_output_dir, replace_file, write_new


def _fail_with(code: int):
    def fail(*_: object, **__: object):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_taken_name_is_numbered_and_the_first_file_kept(tmp_path):
    written = [write_new(tmp_path, "a", ".bin", bytes([value])).name for value in range(3)]
    assert written == ["a.bin", "a-2.bin", "a-3.bin"]
    assert [(tmp_path / name).read_bytes() for name in written] == [b"\0", b"\1", b"\2"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_dangling_link_is_a_taken_name(tmp_path):
    (tmp_path / "a.bin").symlink_to(tmp_path / "elsewhere")
    assert write_new(tmp_path, "a", ".bin", b"x").name == "a-2.bin"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("links", [True, False])
def test_writers_at_the_same_time_never_share_a_name(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", _fail_with(errno.EPERM))
    threads = [
        threading.Thread(target=write_new, args=(tmp_path, "a", ".bin", bytes([value]) * 10_000)) for value in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = sorted(path.read_bytes() for path in tmp_path.iterdir())
    assert contents == [bytes([value]) * 10_000 for value in range(16)]


def test_files_follow_the_users_umask(tmp_path):
    previous = os.umask(0o022)
    try:
        path = write_new(tmp_path, "a", ".bin", b"x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, _fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device"):
        write_new(tmp_path, "a", ".bin", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_move_without_links_gives_the_name_back(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _fail_with(errno.EPERM))
    monkeypatch.setattr(os, "replace", _fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_new(tmp_path, "a", ".bin", b"content")
    assert list(tmp_path.iterdir()) == []


def test_checking_a_directory_leaves_the_disk_as_it_was(tmp_path):
    check_output_dir(tmp_path / "new" / "folder")
    check_output_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ensuring_a_directory_creates_it_with_its_parents(tmp_path):
    assert ensure_output_dir(tmp_path / "new" / "folder").is_dir()
    assert ensure_output_dir(tmp_path / "new" / "folder").is_dir()


@pytest.mark.parametrize("check", [check_output_dir, ensure_output_dir])
def test_a_file_in_the_way_is_refused(tmp_path, check):
    (tmp_path / "taken").write_text("x")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(UserInputError, match=r"must be a directory that can be written to \(not a directory\)"):
            check(path)


def test_a_full_or_read_only_disk_is_refused_up_front(tmp_path, monkeypatch):
    for call, code, reason in [("write", errno.ENOSPC, "no space left"), ("open", errno.EROFS, "read-only")]:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _fail_with(code))
            with pytest.raises(UserInputError, match=reason):
                ensure_output_dir(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.bin"
    replace_file(path, b"first")
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"
    monkeypatch.setattr(os, "write", _fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"third")
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [("a.bin", b"second")]
