"""A claim holds while its owner lives; who is dead is known at once on the same host, and after a while elsewhere."""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from toprovar_jax.distributed.batch import processes
from toprovar_jax.distributed.batch.storage import open_storage

from .toy import ledger, memory, work

ROOT = pathlib.Path(__file__).parents[3]
CLAIM = """
import os, signal, sys
from tests.distributed.batch.toy import ledger
from toprovar_jax.distributed.batch.storage import open_storage
worker = ledger(open_storage(sys.argv[1]), worker="w0")
worker.heartbeat({})
assert worker.claim(0) is not None
os.kill(os.getpid(), signal.SIGKILL)
"""


CLAIM_FILE, SIGN = ".work/claims/000000.0", ".work/workers/w0.json"


def age(storage, name: str) -> None:
    """Makes a file a second older than claims hold."""
    stored = MemoryFileSystem.store[f"/{storage.url.partition('://')[2]}/{name}"]
    stored.created -= datetime.timedelta(seconds=61.0)


def test_a_chunk_is_one_workers():
    storage = memory()
    first, second = ledger(storage, worker="w0"), ledger(storage, worker="w1")
    assert first.claim(0) is not None
    assert first.claim(0) is None
    assert second.claim(0) is None
    assert second.claim(1) is not None


def test_a_released_chunk_can_be_claimed_at_once():
    storage = memory()
    first = ledger(storage, worker="w0").claim(0)
    first.release()
    assert not storage.list(".work/claims")
    assert first.lost()
    second = ledger(storage, worker="w1").claim(0)
    assert not second.lost()
    first.release()
    assert not second.lost()


def test_a_worker_that_gives_signs_of_life_keeps_its_claims_and_one_that_does_not_loses_them():
    storage = memory()
    first, second = ledger(storage, worker="w0"), ledger(storage, worker="w1")
    claim = first.claim(0)
    age(storage, CLAIM_FILE)
    first.heartbeat({})
    assert second.claim(0) is None
    assert not claim.lost()
    age(storage, SIGN)
    takeover = second.claim(0)
    assert takeover is not None
    assert claim.lost()
    assert not takeover.lost()


def test_a_worker_that_is_started_again_does_not_keep_its_predecessors_claims_alive():
    storage = memory()
    ledger(storage, worker="w0").claim(0)
    again = ledger(storage, worker="w0")
    again.heartbeat({})
    assert again.claim(0) is None
    age(storage, CLAIM_FILE)
    assert again.claim(0) is not None


def test_a_killed_process_of_this_host_is_known_to_be_dead_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", CLAIM, str(tmp_path / "run")], cwd=ROOT, check=False)
    storage = open_storage(str(tmp_path / "run"))
    assert [entry.name for entry in storage.list(".work/claims")] == [CLAIM_FILE]
    worker = ledger(storage, worker="w1")
    (state,) = worker.workers()
    assert not state.alive
    assert state.age < 60.0
    assert worker.claim(0) is not None
    assert work(ledger(storage, worker="w2", lease_seconds=0.0))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"worker": "w9"}', b"\xff"])
def test_a_damaged_claim_holds_as_long_as_any_other(content):
    storage = memory()
    worker = ledger(storage, worker="w0")
    storage.write(CLAIM_FILE, content)
    assert worker.claim(0) is None
    age(storage, CLAIM_FILE)
    assert worker.claim(0) is not None
    assert storage.exists(".work/claims/000000.1")


def test_of_two_that_take_over_one_does(monkeypatch):
    storage = memory()
    ledger(storage, worker="dead", lease_seconds=0.0).claim(0)
    late = ledger(storage, worker="late", lease_seconds=0.0)
    create, fast = storage.create, []

    def taken_meanwhile(name, content):
        monkeypatch.setattr(storage, "create", create)
        fast.append(ledger(storage, worker="fast", lease_seconds=0.0).claim(0))
        return create(name, content)

    monkeypatch.setattr(storage, "create", taken_meanwhile)
    assert late.claim(0) is None
    assert not fast[0].lost()


def test_workers_say_where_they_are_and_how_long_they_have_been_silent():
    storage = memory()
    worker = ledger(storage, worker="w0")
    worker.heartbeat({"images": 3})
    ledger(storage, worker="w1").heartbeat({"images": 4})
    age(storage, SIGN)
    states = worker.workers()
    assert [(state.worker, dict(state.state), state.alive) for state in states] == [
        ("w0", {"images": 3}, False),
        ("w1", {"images": 4}, True),
    ]
    assert 61.0 <= states[0].age < 70.0
    sign = json.loads(storage.read(SIGN))
    assert sign["process"] == processes.identity()
    assert (sign["host"], sign["pid"], sign["time"]) == (states[0].host, states[0].pid, states[0].time)
