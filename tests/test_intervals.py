"""Confidence intervals by the bootstrap."""

import numpy as np
import pytest

from toprovar_jax.intervals import RESAMPLES, RESAMPLING_SEED, bootstrap, bootstrap_shares


def test_the_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    value, low, high = bootstrap(values)
    error = values.std() / np.sqrt(len(values))
    assert value == values.mean()
    assert low == pytest.approx(value - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(value + 1.96 * error, abs=0.15 * error)
    assert bootstrap(values) == (value, low, high)


def test_the_interval_of_a_constant_has_no_width():
    assert bootstrap([2.0] * 5, np.median) == (2.0, 2.0, 2.0)


def test_shares_are_drawn_anew_unit_by_unit_within_each_group():
    groups = [([3, 0, 1], [4, 1, 2]), ([1, 1], [1, 3])]
    rng, resampled = np.random.default_rng(RESAMPLING_SEED), np.zeros(RESAMPLES)
    for hits, trials in groups:
        for number, drawn in enumerate(rng.integers(0, len(hits), (RESAMPLES, len(hits)))):
            resampled[number] += sum(hits[i] for i in drawn) / sum(trials[i] for i in drawn) / len(groups)
    value, low, high = bootstrap_shares(groups)
    assert value == pytest.approx((4 / 7 + 2 / 4) / 2, rel=1e-15)
    np.testing.assert_allclose((low, high), np.percentile(resampled, (2.5, 97.5)), rtol=1e-12)


def test_pictures_of_a_prompt_that_agree_tell_no_more_than_one_of_them():
    verdicts = [1, 0, 1, 1, 0, 1]
    alone = bootstrap_shares([(verdicts, [1] * 6)])
    together = bootstrap_shares([([4 * verdict for verdict in verdicts], [4] * 6)])
    apart = bootstrap_shares([(verdicts * 4, [1] * 24)])
    assert together == alone
    assert apart.high - apart.low < 0.7 * (alone.high - alone.low)
