"""The Frechet distance against closed forms, on features whose means and covariances are known exactly."""

import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes.quality import frechet_distance


def standard(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Numbers with mean zero and covariance one, exactly."""
    drawn = np.random.default_rng(seed).standard_normal((rows, columns))
    drawn -= drawn.mean(axis=0)
    return drawn @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(drawn, rowvar=False))).T)


def test_a_shift_costs_its_square():
    features = standard(50, 4) @ np.random.default_rng(1).standard_normal((4, 4))
    shift = np.array([1.0, -2.0, 0.5, 0.0])
    assert frechet_distance(features, features + shift) == pytest.approx(5.25, rel=1e-12)


def test_independent_features_differ_by_their_deviations():
    first, second = np.array([0.5, 2.0, 3.0]), np.array([1.5, 1.0, 3.5])
    ours = frechet_distance(standard(30, 3) * first, standard(40, 3, seed=1) * second)
    assert ours == pytest.approx(np.sum((first - second) ** 2), rel=1e-12)


def test_two_correlated_features_follow_the_closed_form():
    transforms = np.random.default_rng(2).standard_normal((2, 2, 2))
    first, second = (transform.T @ transform for transform in transforms)
    # The trace of the root of a 2x2 matrix M with positive eigenvalues is sqrt(tr M + 2 sqrt(det M)).
    product = first @ second
    mixed = np.sqrt(np.trace(product) + 2.0 * np.sqrt(np.linalg.det(product)))
    ours = frechet_distance(standard(20, 2) @ transforms[0], standard(25, 2, seed=3) @ transforms[1])
    assert ours == pytest.approx(np.trace(first) + np.trace(second) - 2.0 * mixed, rel=1e-10)


def test_equal_sets_are_at_no_distance_also_where_there_are_more_features_than_pictures():
    few = np.random.default_rng(3).standard_normal((5, 40)).astype(np.float32)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(few, few[::-1] + np.float32(0.5)) == pytest.approx(10.0, rel=1e-5)


def test_the_distance_is_the_same_from_either_side():
    a, b = standard(20, 5), standard(15, 5, seed=4) * 1.7 + 0.3
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(standard(9, 1), standard(9, 1) * 3.0) == pytest.approx(4.0, rel=1e-12)


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(UserInputError, match="lengths 3 and 4: must be of one kind"):
        frechet_distance(standard(9, 3), standard(9, 4))
    with pytest.raises(UserInputError, match="1 pictures: must be at least 2"):
        frechet_distance(standard(9, 3), standard(9, 3)[:1])
