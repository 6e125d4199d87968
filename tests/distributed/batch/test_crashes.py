"""A worker that ends at any operation on the storage leaves what the next one completes."""

from __future__ import annotations

import contextlib

import pytest

from .toy import Killed, every_operation, failing, ledger, memory, output, undisturbed, work

LAYOUTS = pytest.mark.parametrize("layout", ["files", "tar"])


@LAYOUTS
@pytest.mark.parametrize("after", [False, True])
def test_a_worker_killed_at_any_operation_is_replaced_by_another(layout, after):
    expected = undisturbed(layout, 1)
    for at in every_operation(layout, 1):
        storage = memory()
        with pytest.raises(Killed):
            work(ledger(failing(storage, at, Killed, after=after)[0], layout), 1)
        assert work(ledger(storage, layout, worker="w1", lease_seconds=0.0), 1), at
        assert output(storage) == expected, at


@LAYOUTS
def test_two_workers_killed_one_after_the_other_are_replaced_by_a_third(layout):
    expected = undisturbed(layout, 1)
    operations = list(every_operation(layout, 1))
    for at in operations[::6]:
        for second in operations[1::9]:
            storage = memory()
            with pytest.raises(Killed):
                work(ledger(failing(storage, at, Killed, after=True)[0], layout), 1)
            with contextlib.suppress(Killed):
                work(
                    ledger(failing(storage, second, Killed, after=False)[0], layout, worker="w1", lease_seconds=0.0), 1
                )
            assert work(ledger(storage, layout, worker="w2", lease_seconds=0.0), 1), (at, second)
            assert output(storage) == expected, (at, second)


@LAYOUTS
def test_a_worker_whose_storage_fails_once_can_go_on_itself(layout):
    expected = undisturbed(layout, 1)
    for at in every_operation(layout, 1):
        storage = memory()
        faulty, _ = failing(storage, at, ConnectionError, after=False)
        with pytest.raises(ConnectionError):
            work(ledger(faulty, layout, lease_seconds=0.0), 1)
        assert work(ledger(faulty, layout, lease_seconds=0.0), 1), at
        assert output(storage) == expected, at
