"""The arithmetic of the overhead benchmark; no test looks at how long anything took."""

import importlib
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.acceleration import ToProVAR
from toprovar_jax.generation import make_plan
from toprovar_jax.sampling import Sampling
from toprovar_jax.schedule import ScaleSchedule

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
SCHEDULE = ScaleSchedule.of("1:1", 6)


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("pruning_overhead")


def test_the_share_is_of_what_is_added_over_dense(overhead):
    repeats = np.array([1.0, 1.0, 9.0])
    times = [
        {"dense": 10.0 * repeats, "toprovar": 11.0 * repeats},
        {"dense": 20.0 * repeats, "toprovar": 24.0 * repeats, "bare": 23.0 * repeats},
        {"dense": 30.0 * repeats[:2], "toprovar": 5.0 * repeats, "bare": 4.0 * repeats},
        {"dense": 40.0 * repeats},
    ]
    expected = [0.02, 0.02 + 0.01 + 0.03]
    np.testing.assert_allclose(overhead.shares(times, 2), expected)
    intervals = overhead.share_intervals(times, 2)
    assert (intervals[:, 0] <= expected).all()
    assert (intervals[:, 1] >= expected).all()


@pytest.mark.parametrize(("cheap", "counts"), [(False, (2, 2, 2)), (True, (2, 6, 6))])
def test_variants_take_turns(overhead, cheap, counts):
    called = []
    names = ("dense", "toprovar", "bare")
    runs = {name: lambda name=name: called.append(name) or 1.0 for name in names}
    times = overhead.seconds_at(runs, 2, cheap=cheap)
    assert tuple(len(times[name]) for name in names) == counts
    assert called[:3] == list(names)
    assert len(set(called[:2])) == len(set(called[-2:])) == 2


def test_what_pruning_is_measured_against_measures_nothing(overhead):
    plan = make_plan(SCHEDULE, Sampling(2.0), ToProVAR(depth_rule="fixed", depth=5), num_layers=4)
    step = plan.step(4)
    bare = overhead.without_measurement(step)
    assert step.with_entropy
    assert step.increments_from is not None
    assert not bare.with_entropy
    assert bare.increments_from is None
    assert [group.kept for group in bare.groups] == [group.kept for group in step.groups]
    assert overhead.without_measurement(plan.step(2)) == plan.step(2)


def test_the_fixed_list_is_as_long_as_the_choice_it_stands_for(overhead):
    chosen = overhead.fixed_list(jnp.ones((2, 36), jnp.float32), (6, 6), 8, regions=8)
    assert chosen.shape == (2, 8)
    assert chosen.dtype == jnp.int32
    assert (np.diff(np.asarray(chosen), axis=1) > 0).all()
    assert int(chosen.max()) < 36
