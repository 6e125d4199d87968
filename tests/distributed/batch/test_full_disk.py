"""A disk that is full at any moment costs what was being written, and nothing else."""

from __future__ import annotations

import errno
import os

import pytest

from toprovar_jax.distributed.batch.storage import open_storage

from .toy import ledger, output, undisturbed, work


class FullDisk:
    """Calls of the operating system that need room, of which one finds none; a write first takes half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.at = 0, -1
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for there is no power cut
        for name in ("open", "write", "fsync", "replace", "link", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, call):
        def counted(*arguments, **options):
            if name == "open" and not arguments[1] & os.O_CREAT:
                return call(*arguments, **options)
            self.calls += 1
            if self.calls == self.at:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return counted


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_a_disk_that_is_full_at_any_moment_tears_nothing(layout, tmp_path, monkeypatch):
    expected = undisturbed(layout, 1)
    disk = FullDisk(monkeypatch)
    storage = open_storage(str(tmp_path / "run"))
    disk.calls = 0
    assert work(ledger(storage, layout), 1)
    for at in range(1, disk.calls + 1):
        storage = open_storage(str(tmp_path / f"run{at}"))
        disk.calls, disk.at = 0, at
        with pytest.raises(OSError, match="No space left on device"):
            work(ledger(storage, layout), 1)
        disk.at = -1
        there = {name: found for name, found in output(storage).items() if not name.startswith(".work")}
        assert there.items() <= expected.items(), at
        assert not list((tmp_path / f"run{at}").glob(".work/tmp/*")), at
        assert work(ledger(storage, layout, worker="w1", lease_seconds=0.0), 1), at
        assert output(storage) == expected, at
