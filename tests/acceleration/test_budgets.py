"""Budgets against exact arithmetic and brute force."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar_jax.acceleration.budgets import (
    default_bucket,
    kept_tokens,
    layer_groups,
    prune_ratio,
    region_along,
    region_grid,
    region_minimums,
)
from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import ASPECT_RATIOS

GRIDS = sorted({grid for grids in ASPECT_RATIOS.values() for grid in grids})


def test_importing_budgets_loads_neither_jax_nor_numpy():
    code = "import sys, toprovar_jax.acceleration.budgets; print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("alpha_min", "alpha_max", "weight", "ratio"),
    [(0.3, 0.95, 0.0, 0.3), (0.3, 0.95, 1.0, 0.95), (0.3, 0.9, 0.5, 0.6), (0.5, 1.5, 0.9, 1.0), (0.0, 0.0, 1.0, 0.0)],
)
def test_the_ratio_runs_from_alpha_min_to_alpha_max_and_is_clipped(alpha_min, alpha_max, weight, ratio):
    assert prune_ratio(alpha_min, alpha_max, weight) == pytest.approx(ratio, abs=1e-15)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(4096, 128), (1024, 128), (576, 64), (256, 32), (144, 16), (64, 8), (16, 2), (4, 1), (1, 1)]
)
def test_the_bucket_is_an_eighth_of_the_scale_and_at_most_one_attention_tile(tokens, bucket):
    assert default_bucket(tokens) == bucket


@given(tokens=st.integers(1, 5000), percent=st.integers(0, 100), bucket=st.none() | st.integers(1, 300))
def test_kept_tokens_are_the_exact_ceiling_in_whole_buckets(tokens, percent, bucket):
    size = bucket or default_bucket(tokens)
    exact = math.ceil(tokens * (1 - Fraction(percent, 100)))
    assert kept_tokens(tokens, percent / 100, bucket) == min(tokens, -(-exact // size) * size)


def test_pruning_nothing_keeps_all_tokens_and_pruning_everything_none():
    for tokens in (1, 9, 144, 4095, 4096):
        assert kept_tokens(tokens, 0.0) == tokens
        assert kept_tokens(tokens, 1.0) == 0


@given(size=st.integers(1, 120), regions=st.integers(1, 120))
def test_regions_along_an_axis_are_contiguous_and_of_nearly_equal_length(size, regions):
    regions = min(size, regions)
    along = region_along(size, regions)
    assert list(along) == sorted(along)
    lengths = [along.count(region) for region in range(regions)]
    assert sum(lengths) == size
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((64, 64), (8, 8)), ((12, 12), (3, 3)), ((30, 15), (7, 3)), ((9, 6), (2, 1)), ((1, 1), (1, 1))],
)
def test_regions_are_never_narrower_than_four_tokens_unless_the_grid_is(grid, expected):
    assert region_grid(grid, 8) == expected
    assert region_grid(grid, 1) == (1, 1)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_region_minimums_are_the_share_of_each_region_rounded_up(share):
    for grid in GRIDS:
        down, across = region_grid(grid, 8)
        rows, columns = np.array(region_along(grid[0], down)), np.array(region_along(grid[1], across))
        sizes = [int(np.sum((rows == r)[:, None] & (columns == c)[None])) for r in range(down) for c in range(across)]
        exact = Fraction(str(share))
        assert region_minimums(grid, 8, share) == tuple(math.ceil(exact * size) for size in sizes)


def partitions(layers):
    """All ways to cut ``layers`` layers into contiguous groups."""
    for cuts in itertools.product([False, True], repeat=layers - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), layers]
        yield tuple(itertools.pairwise(edges))


def deviation(scores, groups):
    return sum(
        sum((value - np.mean(pattern[start:stop])) ** 2 for value in pattern[start:stop])
        for pattern in np.float64(scores)
        for start, stop in groups
    )


@settings(max_examples=60, deadline=None)
@given(
    scores=st.integers(1, 8).flatmap(
        lambda layers: st.lists(
            st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), min_size=layers, max_size=layers),
            min_size=1,
            max_size=3,
        )
    ),
    max_groups=st.integers(1, 5),
)
def test_layer_groups_are_the_best_of_all_partitions_with_the_fewest_groups(scores, max_groups):
    found = layer_groups(scores, max_groups)
    costs = [
        (deviation(scores, groups), len(groups)) for groups in partitions(len(scores[0])) if len(groups) <= max_groups
    ]
    best = min(cost for cost, _ in costs)
    assert found in set(partitions(len(scores[0])))
    assert deviation(scores, found) == pytest.approx(best, abs=1e-12)
    assert len(found) == min(count for cost, count in costs if cost <= best + 1e-12)
    layers = list(zip(*scores, strict=True))
    assert all(layers[start] != layers[start - 1] for start, _ in found[1:])


def test_equal_scores_make_one_group_and_a_step_makes_two():
    assert layer_groups([[1.0] * 6], 8) == ((0, 6),)
    assert layer_groups([[0.1, 0.1, 0.1, 0.8, 0.8]], 8) == ((0, 3), (3, 5))


def test_patterns_are_grouped_together():
    first, second = [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]
    assert layer_groups([first, second], 8) == ((0, 1), (1, 2), (2, 4))


def test_differences_that_are_only_rounding_do_not_open_a_group():
    assert layer_groups([[0.1 + 0.2, 0.3, 0.3, 0.9, 0.9]], 8) == ((0, 3), (3, 5))


@pytest.mark.parametrize(
    ("scores", "max_groups", "named"),
    [([[1.0, 0.5], [1.0]], 3, "[1, 2]"), ([], 3, "[]"), ([[]], 3, "[0]"), ([[1.0]], 0, "max_groups 0")],
)
def test_scores_that_cannot_be_grouped_are_refused(scores, max_groups, named):
    with pytest.raises(UserInputError) as error:
        layer_groups(scores, max_groups)
    assert named in error.value.value
