"""Watching over a run: who is told what, and when a worker lets others take over."""

from __future__ import annotations

import json

import pytest

from toprovar_jax.distributed.batch.batches import Planner
from toprovar_jax.distributed.batch.health import Health
from toprovar_jax.distributed.batch.ledger import Ledger
from toprovar_jax.distributed.batch.progress import Progress
from toprovar_jax.distributed.batch.rows import Row
from toprovar_jax.distributed.batch.storage import open_storage

from .painting import SETTINGS, PaintingPipeline


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def batch(pictures=3, size=4, **settings):
    planner = Planner(PaintingPipeline(), SETTINGS, batch_size=size)
    return planner.chunk([Row(k, str(k), "a", None, settings) for k in range(pictures)]).batches[0]


def watched(tmp_path, progress, *, index=0, worker="w", lease=60.0, stall=100.0):
    said = []
    storage = open_storage(str(tmp_path / "out"))
    ledger = Ledger(storage, layout="files", worker=worker, lease_seconds=lease)
    ledger.open({"rows": 10})
    health = Health(
        storage,
        ledger,
        progress,
        index=index,
        rows=10,
        chunk=4,
        chunks=3,
        lease_seconds=lease,
        stall_seconds=stall,
        tell=lambda line, lasting: said.append(line),
    )
    return health, ledger, storage, said


def test_the_rate_is_of_the_last_minutes_and_the_padding_of_all(clock):
    progress = Progress(clock=clock)
    for _ in range(4):
        with progress.drawing((batch(),)):
            clock.now += 2
        progress.committed(3, 0)
    assert progress.images_per_second() == pytest.approx(1.5)
    assert progress.state()["padding"] == pytest.approx(0.25)
    clock.now += 1000
    assert progress.images_per_second() == 0


def test_a_worker_has_stalled_when_a_batch_takes_too_long_but_not_while_it_compiles_or_waits(clock):
    progress = Progress(clock=clock)
    with progress.drawing((batch(),)):
        clock.now += 1000
        assert not progress.stalled(100.0)
        assert progress.state()["state"] == "compiling"
    with progress.drawing((batch(),)):
        clock.now += 99
        assert not progress.stalled(100.0)
        clock.now += 2
        assert progress.stalled(100.0)
    assert not progress.stalled(100.0)
    with progress.drawing((batch(guidance=2.0),)):  # another program
        clock.now += 1000
        assert not progress.stalled(100.0)
    progress.waiting(2)
    clock.now += 1000
    assert not progress.stalled(100.0)


def test_a_stalled_worker_gives_no_sign_of_life_and_says_so_once(tmp_path, clock):
    progress = Progress(clock=clock)
    health, ledger, _, said = watched(tmp_path, progress)
    with progress.drawing((batch(),)):
        pass
    health.tick()
    (before,) = ledger.workers()
    with progress.drawing((batch(),)):
        clock.now += 101
        health.tick()
        health.tick()
        assert ledger.workers()[0].state == before.state
    assert [line for line in said if "lets others take over" in line] == [
        "no batch for 100 s: this worker lets others take over; look at its device"
    ]
    clock.now += 1
    health.tick()
    assert ledger.workers()[0].state != before.state


def test_the_first_worker_alone_reports_on_all(tmp_path):
    first, _, storage, said = watched(tmp_path, Progress(index=0, chips=4))
    second, _, _, nothing = watched(tmp_path, Progress(index=3, chips=4), index=3, worker="other")
    with first, second:
        second.tick()
        assert not storage.exists("status.json")
        first.tick()
        status = json.loads(storage.read("status.json"))
    assert nothing == []
    assert said == ["0 of 10 prompts (0.0 %); 0 images/s (0 per chip); 2 workers; 0 failed"]
    assert [one["worker"] for one in status["workers"]] == ["other", "w"]
    assert (status["rows"], status["chips"], status["seconds_left"]) == (10, 8, None)


def test_prometheus_reads_the_numbers(tmp_path):
    progress = Progress()
    progress.committed(5, 1)
    health, _, storage, _ = watched(tmp_path, progress)
    health.tick()
    lines = storage.read("status.prom").decode().splitlines()
    assert "toprovar_batch_images_total 5" in lines
    assert "toprovar_batch_failures_total 1" in lines
    names = [line.split()[0] for line in lines if not line.startswith("#")]
    assert [line.split()[2] for line in lines if line.startswith("# TYPE")] == names


def test_silent_hosts_are_named_and_time_left_is_told(tmp_path):
    progress = Progress()
    health, ledger, _, _ = watched(tmp_path, progress)
    with health:
        workers = ledger.workers()
        gone = [
            one.__class__(**vars(one) | {"worker": "x", "host": "h7", "age": 150.0, "alive": False}) for one in workers
        ]
        old = [one.__class__(**vars(one) | {"age": 1e5, "alive": False}) for one in workers]
        busy = [one.__class__(**vars(one) | {"state": {**one.state, "images_per_second": 2.0}}) for one in workers]
        line = health.status([*busy, *gone, *old]).line()
    assert line == (
        "0 of 10 prompts (0.0 %); 2 images/s (2 per chip), 5 s left; 1 worker; 0 failed; "
        "host h7 (worker x) has been silent for 2 min"
    )


def test_the_line_says_how_many_are_compiling(tmp_path):
    progress = Progress()
    health, ledger, _, _ = watched(tmp_path, progress)
    with health:
        assert health.status(ledger.workers()).line().endswith("; 1 worker; 0 failed")
        with progress.drawing((batch(),)):
            health.tick()
            assert health.status(ledger.workers()).line().endswith("; 1 worker, 1 compiling; 0 failed")


def test_storage_that_is_away_for_a_moment_does_not_end_the_run(tmp_path, monkeypatch):
    health, ledger, _, said = watched(tmp_path, Progress())

    def away(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ledger, "heartbeat", away)
    health.tick()
    health.tick()
    assert said[0] == "progress could not be written to the output (Input/output error); trying again"
    assert len([line for line in said if "could not" in line]) == 1


def test_warnings_are_said_once_and_not_without_end():
    said = []
    progress = Progress(warned=said.append)
    progress.warn(["a  b", "a b", "c"])
    progress.warn(str(k) for k in range(1000))
    assert said[:3] == ["a b", "c", "0"]
    assert len(said) == len(progress.warnings) == 100
