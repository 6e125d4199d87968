"""Processes that are gone are told from those that are not, and so is what they have left."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from toprovar_jax.distributed.batch import processes
from toprovar_jax.distributed.batch.storage import open_storage


def test_what_killed_writers_leave_is_removed_and_what_others_write_is_not(tmp_path):
    code = f"""
import os, signal
from toprovar_jax.distributed.batch.storage import open_storage
with open_storage({str(tmp_path)!r}).writing("a") as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, cwd=pathlib.Path(__file__).parents[3])
    folder = tmp_path / ".work" / "tmp"
    assert len(list(folder.iterdir())) == 1
    other_host = "elsewhere,boot,1,2,3,"
    old = folder / f"{other_host}old"
    old.write_bytes(b"")
    os.utime(old, (1.0, 1.0))
    (folder / f"{other_host}new").write_bytes(b"")
    (tmp_path / ".toprovar-x.tmp").write_bytes(b"")  # from a look whether the folder can be written to
    storage = open_storage(str(tmp_path))
    with storage.writing("b") as file:
        file.write(b"whole")
        storage.remove_leftovers(3600.0)
        assert len(list(folder.iterdir())) == 2
    assert storage.read("b") == b"whole"
    assert [path.name for path in folder.iterdir()] == [f"{other_host}new"]
    assert storage.top() == {"b", ".work"}
    storage.remove_leftovers(-1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".work"}


def test_a_process_is_dead_only_where_that_can_be_known():
    mine = processes.identity()
    host, boot, namespace, pid, started = mine.split(",")
    assert not processes.is_dead(mine)
    assert processes.is_dead(",".join([host, boot, namespace, pid, f"{started}1"]))
    assert processes.is_dead(",".join([host, boot, namespace, "4194305", started]))
    for elsewhere in (["x", boot, namespace], [host, "x", namespace], [host, boot, "1"]):
        assert not processes.is_dead(",".join([*elsewhere, "4194305", started]))
    assert not processes.is_dead("")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended_identity = ",".join([host, boot, namespace, str(ended.pid), processes._started(str(ended.pid)) or "gone"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked
    assert processes.is_dead(ended_identity)
    ended.wait()
