"""Constants chosen from measurements: each against its definition, and where the definitions leave no choice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar_jax.acceleration.fitting import (
    choose_beta,
    choose_depth,
    largest_passing,
    predicted_depths,
    score_patterns,
    stable_scales,
    strength_constants,
)
from toprovar_jax.errors import UserInputError


def test_a_picture_is_stable_from_the_first_scale_that_is_similar_enough():
    similarity = np.array([[0.1, 0.5, 0.8, 0.7, 1.0], [0.9, 0.2, 0.3, 0.4, 1.0], [0.0, 0.1, 0.2, 0.3, 1.0]])
    assert stable_scales(similarity, 0.8).tolist() == [3, 1, 5]


def test_the_family_of_strengths_runs_from_nothing_to_the_recommended_constants():
    assert strength_constants(0.0) == {"alpha_min": 0.0, "alpha_max": 0.0}
    assert strength_constants(1.0) == {"alpha_min": 0.3, "alpha_max": 0.95}
    assert strength_constants(0.5) == {"alpha_min": 0.15, "alpha_max": 0.475}


def crossing_at(stable: list[int], num_scales: int = 7, *, rising: bool = False) -> np.ndarray:
    """Salient shares that pass 0.4 exactly at each image's stable scale, with noise that never does."""
    scale = np.arange(1, num_scales + 1)
    noise = np.random.default_rng(0).uniform(0.01, 0.09, (len(stable), num_scales))
    crossed = scale >= np.array(stable)[:, None]
    return np.where(crossed == rising, 0.4 + noise, 0.4 - noise)


@pytest.mark.parametrize(("rising", "rule"), [(False, "le"), (True, "ge")])
def test_the_rule_that_finds_every_depth_is_chosen_with_a_threshold_that_does(rising, rule):
    stable = [2, 3, 3, 4, 5, 6]
    choice = choose_depth(crossing_at(stable, rising=rising), np.array(stable))
    assert (choice.rule, choice.errors[rule]) == (rule, 0.0)
    assert 0.31 < choice.tau < 0.49
    assert (choice.min_depth, choice.max_depth) == (3, 7)
    assert choice.errors["fixed"] == np.mean([2, 1, 1, 0, 1, 2])
    assert predicted_depths(crossing_at(stable, rising=rising), choice).tolist() == [3, 4, 4, 5, 6, 7]
    assert predicted_depths(np.full((1, 7), choice.tau + (-0.1 if rising else 0.1)), choice).tolist() == [8]


def test_one_depth_for_all_wins_where_the_share_says_nothing():
    stable = np.array([2, 3, 4, 5] * 5)
    choice = choose_depth(np.full((20, 7), 0.45), stable)
    assert (choice.rule, choice.depth) == ("fixed", 5)
    assert choice.tau == 0.45
    assert choice.errors["fixed"] == 1.0
    assert predicted_depths(np.full((3, 7), 0.1), choice).tolist() == [5, 5, 5]
    assert min(choice.errors["le"], choice.errors["ge"]) >= 1.0


def test_one_depth_for_all_wins_a_tie():
    stable = np.array([4, 4, 4])
    choice = choose_depth(crossing_at([4, 4, 4]), stable)
    assert choice.errors == {"fixed": 0.0, "le": 0.0, "ge": 0.0}
    assert (choice.rule, choice.depth, choice.min_depth, choice.max_depth) == ("fixed", 5, 5, 5)


def test_depths_lie_between_the_second_and_the_last_scale():
    late = choose_depth(crossing_at([5, 5]), np.array([5, 5]))
    assert (late.min_depth, late.max_depth, late.depth) == (6, 6, 6)
    last = choose_depth(crossing_at([7, 7]), np.array([7, 7]))
    assert (last.min_depth, last.max_depth, last.depth) == (7, 7, 7)
    first = choose_depth(crossing_at([1, 1]), np.array([1, 1]))
    assert (first.min_depth, first.max_depth, first.depth) == (2, 2, 2)


def test_of_two_depths_as_good_the_later_one_is_fixed():
    stable = np.array([2, 5])
    assert choose_depth(np.full((2, 7), 0.5), stable).depth == 6


def test_outliers_do_not_widen_the_bounds():
    stable = np.array([1] + [4] * 19 + [5] * 19 + [7])
    choice = choose_depth(crossing_at(stable.tolist()), stable)
    assert (choice.min_depth, choice.max_depth) == (5, 6)


@given(seed=st.integers(0, 2**16), images=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_no_threshold_of_a_fine_raster_beats_the_chosen_one(seed, images):
    rng = np.random.default_rng(seed)
    share, stable = rng.uniform(0.2, 0.6, (images, 5)), rng.integers(1, 6, images)
    choice = choose_depth(share, stable)

    def error(rule: str, tau: float) -> float:
        distances = []
        for image in range(images):
            tested = range(choice.min_depth, choice.max_depth + 1)
            passes = (depth for depth in tested if (share[image, depth - 2] - tau) * (1 if rule == "ge" else -1) >= 0)
            distances.append(abs(stable[image] + 1 - next(passes, 6)))
        return float(np.mean(distances))

    for rule in ("le", "ge"):
        assert choice.errors[rule] <= min(error(rule, tau) for tau in np.linspace(0.0, 1.0, 201)) + 1e-12
    if choice.rule != "fixed":
        assert error(choice.rule, choice.tau) == pytest.approx(choice.errors[choice.rule])
    assert choice.errors[choice.rule] == min(choice.errors.values())


def test_the_median_layer_is_half_detail():
    ratios = np.random.default_rng(1).uniform(1.2, 6.0, (9, 5))
    beta = choose_beta(ratios)
    means = ratios.mean(axis=0)
    median_layer = np.argsort(means)[2]
    assert math.exp(-beta * (means[median_layer] - 1)) == pytest.approx(0.5, rel=1e-12)


def test_a_layer_without_a_second_pattern_does_not_decide_beta():
    assert choose_beta(np.array([[np.inf, 2.0, 3.0]])) == choose_beta(np.array([[9.0, 2.0, 3.0]])) == math.log(2) / 2


@pytest.mark.parametrize("value", [1.0, np.inf, np.nan])
def test_maps_that_tell_no_layers_apart_are_refused(value):
    with pytest.raises(UserInputError, match="must be finite and above 1"):
        choose_beta(np.full((3, 4), value))


def test_patterns_are_the_centres_of_separate_groups():
    centres = np.array([[0.1, 0.9, 0.5], [0.5, 0.1, 0.5], [0.9, 0.9, 0.9]])
    rng = np.random.default_rng(2)
    rows = np.repeat(centres, (4, 7, 2), axis=0) + rng.uniform(-0.02, 0.02, (13, 3))
    rows = rows[rng.permutation(len(rows))]
    found = score_patterns(rows, 3)
    np.testing.assert_allclose(found, centres, atol=0.02)
    nearest = np.argmin(np.sum((rows[:, None] - centres) ** 2, axis=2), axis=1)
    np.testing.assert_allclose(found, [rows[nearest == index].mean(axis=0) for index in range(3)], rtol=1e-12)


def test_patterns_do_not_depend_on_the_order_of_the_images():
    rows = np.random.default_rng(3).uniform(size=(5, 2))
    want = score_patterns(rows)
    for order in itertools.permutations(range(5)):
        np.testing.assert_allclose(score_patterns(rows[list(order)]), want, rtol=1e-12)


def test_equal_rows_are_one_pattern_and_few_rows_few():
    row = np.array([0.2, 0.7])
    np.testing.assert_allclose(score_patterns(np.stack([row] * 6)), [row], rtol=1e-15)
    np.testing.assert_allclose(score_patterns(np.stack([row, 1 - row, row])), [row, 1 - row], rtol=1e-15)


@pytest.mark.parametrize("last", [0, 1, 5, 16])
def test_bisection_finds_the_last_that_passes_with_few_trials(last):
    for largest in range(last + 1):
        tried: list[int] = []

        def passes(value: int, largest: int = largest, tried: list[int] = tried) -> bool:
            tried.append(value)
            return value <= largest

        assert largest_passing(passes, last) == largest
        assert len(tried) == len(set(tried)) <= math.ceil(math.log2(last + 2))
        assert 0 not in tried
