"""Estimates with 95 % confidence intervals, by the percentile bootstrap with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from toprovar_jax.shapes import Float

RESAMPLES, RESAMPLING_SEED = 2000, 0


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(values: Sequence[float] | np.ndarray, statistic: Callable[..., Any] = np.mean) -> Interval:
    """The statistic of the values and its percentile bootstrap interval; ``statistic(array, axis=-1)``."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(RESAMPLING_SEED)
    resampled = statistic(values[rng.integers(0, len(values), (RESAMPLES, len(values)))], axis=-1)
    return _interval(float(statistic(values, axis=-1)), resampled)


def bootstrap_shares(groups: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Interval:
    """The mean of the groups' shares and its interval; stratified: each group's units are drawn anew within it.

    Args:
      groups: of each the hits and the trials of its units; its share is all hits over all trials.
    """
    rng = np.random.default_rng(RESAMPLING_SEED)
    shares, resampled = [], []
    for group in groups:
        hits, trials = (np.asarray(numbers, np.float64) for numbers in group)
        drawn = rng.integers(0, len(hits), (RESAMPLES, len(hits)))
        shares.append(hits.sum() / trials.sum())
        resampled.append(hits[drawn].sum(axis=-1) / trials[drawn].sum(axis=-1))
    return _interval(float(np.mean(shares)), np.mean(resampled, axis=0))


def _interval(value: float, resampled: Float[np.ndarray, " _"]) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value, float(low), float(high))
